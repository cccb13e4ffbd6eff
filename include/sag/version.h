#pragma once

/// The library's version. CMake reads it from here.
#define SAG_VERSION_MAJOR 0
#define SAG_VERSION_MINOR 1
#define SAG_VERSION_PATCH 0

#pragma once

/// Marks what the shared library exports; everything else is hidden.
#if defined(_WIN32)
#define SAG_API
#else
#define SAG_API __attribute__((visibility("default")))
#endif

#pragma once

#if !defined(__linux__)
#error "sag is built and tested on Linux only."
#endif

/// Marks what the shared library exports; everything else is hidden.
#define SAG_API __attribute__((visibility("default")))

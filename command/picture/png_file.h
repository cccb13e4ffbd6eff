#pragma once

#include <string>

#include "picture/image.h"

namespace sag_sample {

/// Returns the picture as a PNG file, 8-bit RGB. Throws RunError when libpng fails.
std::string encode_png(const Image& image);

/// Returns the picture that a PNG file holds, as RGB. Throws RunError when it is not one.
Image decode_png(const std::string& bytes);

/// Returns whether a file begins as PNG files do.
bool is_png(const std::string& path);

/// Reads a PNG file that the user names; what is transparent becomes white. `option` is what
/// messages call it. Throws UsageError when there is no such file, or it has more than 2^26 pixels.
Image read_png(const std::string& option, const std::string& path);

}  // namespace sag_sample

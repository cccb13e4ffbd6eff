#pragma once

#include <string>

#include "image.h"

namespace sag_sample {

/// Returns the picture as a PNG file, 8-bit RGB. Throws RunError when libpng fails.
std::string encode_png(const Image& image);

/// Returns the picture that a PNG file holds, as RGB. Throws RunError when it is none.
Image decode_png(const std::string& bytes);

}  // namespace sag_sample

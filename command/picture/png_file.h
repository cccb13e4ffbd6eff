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

/// Throws UsageError, with the way out, for a file that holds a JPEG, WebP, GIF, AVIF or HEIC.
/// `option` is what messages call it.
void refuse_other_pictures(const std::string& option, const std::string& path);

enum class Transparent { white, refused };

/// Reads a PNG file that the user names. `option` is what messages call it. Throws UsageError when
/// there is no such file, it is another kind of picture, it has more than 2^26 pixels, or some of
/// them are transparent and that is refused.
Image read_png(const std::string& option, const std::string& path,
               Transparent transparent = Transparent::white);

}  // namespace sag_sample

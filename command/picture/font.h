#pragma once

#include <string>
#include <string_view>

#include "picture/image.h"

namespace sag_sample {

/// How text looks. The font is the command's own (see font.cpp): it needs no file and no library.
struct TextStyle {
  Rgb colour = {40, 40, 46};
  /// At 1 a capital is 10 pixels tall.
  double scale = 1.0;
  /// Thickness of the lines, in units of the font.
  double stroke = 1.3;
};

/// Height of a line of text, from the top of an ascender to the bottom of a descender.
int text_height(const TextStyle& style);

/// Returns how wide `text`, UTF-8, is drawn. What is not printable ASCII is drawn as an empty box.
int text_width(std::string_view text, const TextStyle& style);

/// Draws one line of text whose top left corner is (x, y). What lies outside the image is cut off.
void draw_text(Image& image, int x, int y, std::string_view text, const TextStyle& style);

/// Returns `text`, or its beginning and an ellipsis, so that it is at most `width` wide.
std::string shorten_text(std::string_view text, int width, const TextStyle& style);

}  // namespace sag_sample

#include "picture/font.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <vector>

namespace sag_sample {
namespace {

// A stroke font. Every glyph is a path, written like an SVG path, y upwards: M moves, L draws a
// line, Q a quadratic curve (control point, end). Baseline 0, lower case 7, capitals 10, descenders
// −3. Strokes have round ends and are antialiased, so the font looks right at any scale.
struct Glyph {
  double width;
  const char* path;
};

constexpr char kFirst = ' ';
constexpr std::array<Glyph, 95> kGlyphs = {{
    {2.5, ""},                                                    // space
    {0, "M0 10L0 3.2M0 0L0 0.1"},                                 // !
    {3, "M0 10L0 7.5M3 10L3 7.5"},                                // "
    {7, "M2.6 10L1.4 0M6 10L4.8 0M0.6 6.8L7 6.8M0 3.2L6.4 3.2"},  // #
    {6,
     "M6 7.6Q5 8.8 3 8.8Q0.4 8.8 0.4 7Q0.4 5.4 3.1 4.9Q6 4.3 6 2.7Q6 1 3 1Q1 1 0 2.4"
     "M3 10.4L3 -0.6"},  // $
    {9,
     "M1.8 10Q0 10 0 7.8Q0 5.6 1.8 5.6Q3.6 5.6 3.6 7.8Q3.6 10 1.8 10M7.4 10L1.6 0"
     "M7.2 4.4Q5.4 4.4 5.4 2.2Q5.4 0 7.2 0Q9 0 9 2.2Q9 4.4 7.2 4.4"},  // %
    {7,
     "M7 0L1.6 6.4Q0.8 7.5 0.8 8.2Q0.8 10 2.6 10Q4.4 10 4.4 8.2Q4.4 7 2.6 5.8Q0 4.2 0 2.4"
     "Q0 0 2.6 0Q5.6 0 6.2 4"},                                              // &
    {0, "M0 10L0 7.5"},                                                      // '
    {2.2, "M2.2 11Q0 8.4 0 4.5Q0 0.6 2.2 -2"},                               // (
    {2.2, "M0 11Q2.2 8.4 2.2 4.5Q2.2 0.6 0 -2"},                             // )
    {4.6, "M2.3 10L2.3 5.4M0.2 8.9L4.4 6.5M4.4 8.9L0.2 6.5"},                // *
    {6, "M3 7L3 1M0 4L6 4"},                                                 // +
    {0.6, "M0.6 0.2L0 -1.8"},                                                // ,
    {3.4, "M0 3.8L3.4 3.8"},                                                 // -
    {0, "M0 0L0 0.1"},                                                       // .
    {4, "M4 10.6L0 -1"},                                                     // /
    {5.6, "M2.8 10Q0 10 0 5Q0 0 2.8 0Q5.6 0 5.6 5Q5.6 10 2.8 10"},           // 0
    {5.6, "M0.6 8.2L3 10L3 0"},                                              // 1
    {5.6, "M0.3 7.8Q0.5 10 2.8 10Q5.4 10 5.4 7.5Q5.4 6 3.5 3.8L0 0L5.6 0"},  // 2
    {5.6,
     "M0.2 8.2Q0.8 10 2.7 10Q5.2 10 5.2 7.7Q5.2 5.4 2.2 5.4M2.4 5.4Q5.6 5.4 5.6 2.7"
     "Q5.6 0 2.7 0Q0.5 0 0 2"},                                                               // 3
    {5.8, "M4.3 0L4.3 10L0 3L5.8 3"},                                                         // 4
    {5.6, "M5.1 10L0.8 10L0.4 5.2Q1.3 6.2 2.9 6.2Q5.6 6.2 5.6 3.1Q5.6 0 2.7 0Q0.6 0 0 1.8"},  // 5
    {5.6, "M5 8.6Q4.4 10 2.9 10Q0 10 0 4.4Q0 0 2.9 0Q5.6 0 5.6 3Q5.6 6 2.9 6Q0.4 6 0 3.4"},   // 6
    {5.6, "M0 10L5.6 10L2 0"},                                                                // 7
    {5.6,
     "M2.8 5.4Q0.4 5.4 0.4 7.7Q0.4 10 2.8 10Q5.2 10 5.2 7.7Q5.2 5.4 2.8 5.4Q0 5.4 0 2.7"
     "Q0 0 2.8 0Q5.6 0 5.6 2.7Q5.6 5.4 2.8 5.4"},  // 8
    {5.6,
     "M0.6 1.4Q1.2 0 2.7 0Q5.6 0 5.6 5.6Q5.6 10 2.7 10Q0 10 0 7Q0 4 2.7 4Q5.2 4 5.6 6.6"},  // 9
    {0, "M0 6.6L0 6.7M0 0L0 0.1"},                                                          // :
    {0.6, "M0.6 6.6L0.6 6.7M0.6 0.2L0 -1.8"},                                               // ;
    {5.4, "M5.4 7L0 4L5.4 1"},                                                              // <
    {6, "M0 5.4L6 5.4M0 2.6L6 2.6"},                                                        // =
    {5.4, "M0 7L5.4 4L0 1"},                                                                // >
    {5, "M0 8Q0.4 10 2.5 10Q5 10 5 7.7Q5 6.3 3.6 5.2Q2.4 4.3 2.4 3M2.4 0L2.4 0.1"},         // ?
    {9,
     "M6.6 5.9Q6 6.6 4.8 6.6Q2.6 6.6 2.6 4.2Q2.6 1.8 4.6 1.8Q6.6 1.8 6.6 4.2L6.6 6.4M6.6 4.2"
     "Q6.6 1.8 7.8 1.8Q9 1.8 9 4.6Q9 9.2 4.6 9.2Q0 9.2 0 4.2Q0 -1 4.6 -1Q6.4 -1 7.4 -0.4"},  // @
    {7, "M0 0L3.5 10L7 0M1.2 3.4L5.8 3.4"},                                                  // A
    {6.2,
     "M0 0L0 10L2.9 10Q5.8 10 5.8 7.7Q5.8 5.4 2.9 5.4L0 5.4M2.9 5.4Q6.2 5.4 6.2 2.7"
     "Q6.2 0 2.9 0L0 0"},                                                                      // B
    {6.6, "M6.6 8Q5.8 10 3.6 10Q0 10 0 5Q0 0 3.6 0Q5.8 0 6.6 2"},                              // C
    {6.6, "M0 0L0 10L2.5 10Q6.6 10 6.6 5Q6.6 0 2.5 0L0 0"},                                    // D
    {5.4, "M5.4 10L0 10L0 0L5.4 0M0 5.2L4.8 5.2"},                                             // E
    {5.2, "M5.2 10L0 10L0 0M0 5.2L4.6 5.2"},                                                   // F
    {6.8, "M6.5 8.1Q5.6 10 3.6 10Q0 10 0 5Q0 0 3.6 0Q6.8 0 6.8 3L6.8 4.6L4 4.6"},              // G
    {6.5, "M0 0L0 10M6.5 0L6.5 10M0 5.2L6.5 5.2"},                                             // H
    {0, "M0 0L0 10"},                                                                          // I
    {4, "M4 10L4 3Q4 0 2 0Q0 0 0 2.4"},                                                        // J
    {6, "M0 0L0 10M5.8 10L0 4.2M2.1 6.2L6 0"},                                                 // K
    {5, "M0 10L0 0L5 0"},                                                                      // L
    {8, "M0 0L0 10L4 3L8 10L8 0"},                                                             // M
    {6.5, "M0 0L0 10L6.5 0L6.5 10"},                                                           // N
    {7.4, "M3.7 10Q0 10 0 5Q0 0 3.7 0Q7.4 0 7.4 5Q7.4 10 3.7 10"},                             // O
    {6, "M0 0L0 10L3 10Q6 10 6 7.3Q6 4.6 3 4.6L0 4.6"},                                        // P
    {7.4, "M3.7 10Q0 10 0 5Q0 0 3.7 0Q7.4 0 7.4 5Q7.4 10 3.7 10M4.8 2.4L7.4 -0.8"},            // Q
    {6.2, "M0 0L0 10L3 10Q6 10 6 7.3Q6 4.6 3 4.6L0 4.6M3.2 4.6L6.2 0"},                        // R
    {6, "M5.8 8.2Q5.2 10 3.1 10Q0.3 10 0.3 7.6Q0.3 5.8 3 5.2Q6 4.5 6 2.5Q6 0 3 0Q0.5 0 0 2"},  // S
    {7, "M0 10L7 10M3.5 10L3.5 0"},                                                            // T
    {6.5, "M0 10L0 3.5Q0 0 3.25 0Q6.5 0 6.5 3.5L6.5 10"},                                      // U
    {7, "M0 10L3.5 0L7 10"},                                                                   // V
    {10, "M0 10L2.6 0L5 9L7.4 0L10 10"},                                                       // W
    {6.4, "M0 0L6.4 10M0 10L6.4 0"},                                                           // X
    {7, "M0 10L3.5 5L7 10M3.5 5L3.5 0"},                                                       // Y
    {6.2, "M0.1 10L6 10L0 0L6.2 0"},                                                           // Z
    {2.4, "M2.4 11L0 11L0 -2L2.4 -2"},                                                         // [
    {4, "M0 10.6L4 -1"},                                                              // backslash
    {2.4, "M0 11L2.4 11L2.4 -2L0 -2"},                                                // ]
    {4.6, "M0 7.2L2.3 10L4.6 7.2"},                                                   // ^
    {6, "M0 -2L6 -2"},                                                                // _
    {1.6, "M0 10.6L1.6 8.6"},                                                         // `
    {5, "M0.4 5.6Q0.9 7 2.6 7Q5 7 5 4.4L5 0M5 4L2.4 4Q0 4 0 2Q0 0 2.1 0Q4.2 0 5 2"},  // a
    {5.5, "M0 10L0 0M0 3.5Q0 7 2.75 7Q5.5 7 5.5 3.5Q5.5 0 2.75 0Q0 0 0 3.5"},         // b
    {5, "M5 5.5Q4.4 7 2.8 7Q0 7 0 3.5Q0 0 2.8 0Q4.4 0 5 1.5"},                        // c
    {5.5, "M5.5 10L5.5 0M5.5 3.5Q5.5 7 2.75 7Q0 7 0 3.5Q0 0 2.75 0Q5.5 0 5.5 3.5"},   // d
    {5.4, "M0 3.7L5.4 3.7Q5.4 7 2.75 7Q0 7 0 3.5Q0 0 2.8 0Q4.6 0 5.2 1.5"},           // e
    {4, "M4 10L3.4 10Q1.6 10 1.6 8L1.6 0M0 7L3.7 7"},                                 // f
    {5.5,
     "M5.5 7L5.5 -0.3Q5.5 -3 2.8 -3Q1 -3 0.4 -2M5.5 3.5Q5.5 7 2.75 7Q0 7 0 3.5Q0 0 2.75 0"
     "Q5.5 0 5.5 3.5"},                                                              // g
    {5, "M0 10L0 0M0 4Q0 7 2.6 7Q5 7 5 4.2L5 0"},                                    // h
    {0, "M0 7L0 0M0 9.7L0 9.8"},                                                     // i
    {1.2, "M1.2 7L1.2 -1Q1.2 -3 -0.4 -3M1.2 9.7L1.2 9.8"},                           // j
    {5, "M0 10L0 0M4.7 7L0 2.6M1.8 4.3L5 0"},                                        // k
    {1.4, "M0 10L0 1.6Q0 0 1.4 0"},                                                  // l
    {8, "M0 7L0 0M0 4Q0 7 2.1 7Q4 7 4 4.4L4 0M4 4Q4 7 6.1 7Q8 7 8 4.4L8 0"},         // m
    {5, "M0 7L0 0M0 4Q0 7 2.6 7Q5 7 5 4.2L5 0"},                                     // n
    {5.6, "M2.8 7Q0 7 0 3.5Q0 0 2.8 0Q5.6 0 5.6 3.5Q5.6 7 2.8 7"},                   // o
    {5.5, "M0 7L0 -3M0 3.5Q0 7 2.75 7Q5.5 7 5.5 3.5Q5.5 0 2.75 0Q0 0 0 3.5"},        // p
    {5.5, "M5.5 7L5.5 -3M5.5 3.5Q5.5 7 2.75 7Q0 7 0 3.5Q0 0 2.75 0Q5.5 0 5.5 3.5"},  // q
    {3.2, "M0 7L0 0M0 4Q0 7 3.2 7"},                                                 // r
    {4.7,
     "M4.5 5.6Q4 7 2.4 7Q0.2 7 0.2 5.3Q0.2 4 2.4 3.6Q4.7 3.2 4.7 1.8Q4.7 0 2.3 0"
     "Q0.4 0 0 1.4"},                                                                        // s
    {3.8, "M1.6 9.4L1.6 2Q1.6 0 3.2 0L3.8 0M0 7L3.7 7"},                                     // t
    {5, "M0 7L0 2.8Q0 0 2.4 0Q5 0 5 3M5 7L5 0"},                                             // u
    {5.6, "M0 7L2.8 0L5.6 7"},                                                               // v
    {8, "M0 7L2 0L4 6.4L6 0L8 7"},                                                           // w
    {5, "M0 0L5 7M0 7L5 0"},                                                                 // x
    {5.6, "M0 7L2.8 0M5.6 7L2.5 -1.3Q1.9 -3 0.2 -3"},                                        // y
    {4.9, "M0.1 7L4.7 7L0 0L4.9 0"},                                                         // z
    {3, "M3 11Q1.4 11 1.4 9.4L1.4 6.2Q1.4 4.5 0 4.5Q1.4 4.5 1.4 2.8L1.4 -0.4Q1.4 -2 3 -2"},  // {
    {0, "M0 11L0 -2"},                                                                       // |
    {3, "M0 11Q1.6 11 1.6 9.4L1.6 6.2Q1.6 4.5 3 4.5Q1.6 4.5 1.6 2.8L1.6 -0.4Q1.6 -2 0 -2"},  // }
    {5.6, "M0 3.4Q0 5 1.5 5Q2.4 5 3 4.2Q3.4 3.6 4.2 3.6Q5.6 3.6 5.6 5.2"},                   // ~
}};
constexpr Glyph kUnknown = {5.6, "M0 0L5.6 0L5.6 10L0 10L0 0"};

constexpr double kAscent = 12, kDescent = 4, kSpacing = 2.8;

struct Point {
  double x, y;
};
struct Segment {
  Point from, to;
};

const Glyph& glyph_of(char c) {
  const auto index = static_cast<unsigned char>(c) - static_cast<unsigned char>(kFirst);
  return index >= 0 && index < static_cast<int>(kGlyphs.size())
             ? kGlyphs[static_cast<std::size_t>(index)]
             : kUnknown;
}

bool continues_utf8(char c) {
  return (static_cast<unsigned char>(c) & 0xC0) == 0x80;
}

int advance(char c, const TextStyle& style) {
  return static_cast<int>(std::lround((glyph_of(c).width + kSpacing) * style.scale));
}

void append_curve(std::vector<Segment>& segments, Point from, Point control, Point to) {
  constexpr int kPieces = 8;
  Point last = from;
  for (int i = 1; i <= kPieces; ++i) {
    const double t = static_cast<double>(i) / kPieces, s = 1 - t;
    const Point next = {s * s * from.x + 2 * s * t * control.x + t * t * to.x,
                        s * s * from.y + 2 * s * t * control.y + t * t * to.y};
    segments.push_back({last, next});
    last = next;
  }
}

std::vector<Segment> flatten(const char* path) {
  std::vector<Segment> segments;
  Point at = {0, 0};
  const auto number = [&path] {
    char* end = nullptr;
    const double value = std::strtod(path, &end);
    path = end;
    return value;
  };
  const auto point = [&number] {
    const double x = number();
    return Point{x, number()};
  };
  while (*path != '\0') {
    const char command = *path++;
    const Point first = point();
    if (command == 'Q') {
      const Point end = point();
      append_curve(segments, at, first, end);
      at = end;
    } else {
      if (command == 'L') segments.push_back({at, first});
      at = first;
    }
  }
  return segments;
}

double distance(Point p, const Segment& segment) {
  const double dx = segment.to.x - segment.from.x, dy = segment.to.y - segment.from.y;
  const double length2 = dx * dx + dy * dy;
  const double along = (p.x - segment.from.x) * dx + (p.y - segment.from.y) * dy;
  const double t = length2 > 0 ? std::clamp(along / length2, 0.0, 1.0) : 0.0;
  return std::hypot(p.x - segment.from.x - t * dx, p.y - segment.from.y - t * dy);
}

// `left`, `base`: the pixel whose centre is the glyph's origin.
void draw_glyph(Image& image, int left, int base, const Glyph& glyph, const TextStyle& style) {
  const auto segments = flatten(glyph.path);
  if (segments.empty()) return;
  const double radius = style.stroke * style.scale / 2;
  const int margin = static_cast<int>(std::ceil(radius + 1 + style.scale));
  const int right = left + static_cast<int>(std::ceil(glyph.width * style.scale)) + margin;
  const int top = base - static_cast<int>(std::ceil(kAscent * style.scale));
  const int bottom = base + static_cast<int>(std::ceil(kDescent * style.scale));
  for (int y = top; y <= bottom; ++y) {
    for (int x = left - margin; x <= right; ++x) {
      if (!image.contains(x, y)) continue;
      const Point p = {(x - left) / style.scale, (base - y) / style.scale};
      double nearest = 1e9;
      for (const auto& segment : segments) nearest = std::min(nearest, distance(p, segment));
      const double cover = std::clamp(radius + 0.5 - nearest * style.scale, 0.0, 1.0);
      if (cover > 0) image.at(x, y) = mix(image.at(x, y), style.colour, cover);
    }
  }
}

}  // namespace

int text_height(const TextStyle& style) {
  return static_cast<int>(std::ceil((kAscent + kDescent) * style.scale));
}

int text_width(std::string_view text, const TextStyle& style) {
  int width = 0;
  for (const char c : text) {
    if (!continues_utf8(c)) width += advance(c, style);
  }
  return width;
}

void draw_text(Image& image, int x, int y, std::string_view text, const TextStyle& style) {
  const int base = y + static_cast<int>(std::lround((kAscent - 1) * style.scale));
  const int bearing = static_cast<int>(std::lround(kSpacing / 2 * style.scale));
  for (const char c : text) {
    if (continues_utf8(c)) continue;
    draw_glyph(image, x + bearing, base, glyph_of(c), style);
    x += advance(c, style);
  }
}

std::string shorten_text(std::string_view text, int width, const TextStyle& style) {
  if (text_width(text, style) <= width) return std::string(text);
  const int room = width - text_width("...", style);
  std::size_t length = 0;
  int used = 0;
  while (length < text.size() && used + advance(text[length], style) <= room) {
    used += advance(text[length], style);
    do ++length;
    while (length < text.size() && continues_utf8(text[length]));
  }
  return std::string(text.substr(0, length)) + "...";
}

}  // namespace sag_sample

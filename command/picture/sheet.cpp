#include "picture/sheet.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "picture/font.h"

namespace sag_sample {
namespace {

// In pixels: the margin around the sheet, and the gaps between the pictures of a cell, cells side
// by side, rows of cells, and sections.
constexpr int kMargin = 24, kPictureGap = 6, kCellGap = 28, kRowGap = 14, kSectionGap = 14;
// Pictures of this size are not enlarged.
constexpr int kEasilySeen = 128;

constexpr Rgb kBorder = {222, 222, 228};
constexpr TextStyle kTitle = {.colour = {30, 30, 36}, .scale = 1.2, .stroke = 1.7};
constexpr TextStyle kHeader = {.colour = {120, 120, 130}, .scale = 0.9, .stroke = 1.35};
constexpr TextStyle kLabel = {};
constexpr int kLegendGap = 6, kFooterGap = 16;
constexpr const char *kNoneOfLegend = "  0 %", *kAllOfLegend = "100 % of steps";
constexpr TextStyle kFooter = {.colour = {120, 120, 130}, .scale = 0.9, .stroke = 1.35};
constexpr int kLegendWidth = 96, kLegendHeight = 10;

Rgb heat_colour(double heat) {
  // Light to dark, so that it also reads in grey.
  constexpr std::array<Rgb, 5> kRamp = {
      {{255, 255, 229}, {254, 217, 118}, {253, 141, 60}, {227, 26, 28}, {128, 0, 38}}};
  const double place = std::clamp(heat, 0.0, 1.0) * (kRamp.size() - 1);
  const auto index = std::min(static_cast<std::size_t>(place), kRamp.size() - 2);
  return mix(kRamp[index], kRamp[index + 1], place - static_cast<double>(index));
}

double heat_opacity(double heat) {
  return 0.12 + 0.68 * std::clamp(heat, 0.0, 1.0);
}

void paste(Image& onto, int left, int top, const Image& picture) {
  for (int y = 0; y < picture.height; ++y) {
    for (int x = 0; x < picture.width; ++x) {
      if (onto.contains(left + x, top + y)) onto.at(left + x, top + y) = picture.at(x, y);
    }
  }
}

// A frame just outside the given rectangle.
void frame(Image& onto, int left, int top, int width, int height) {
  const auto dot = [&onto](int x, int y) {
    if (onto.contains(x, y)) onto.at(x, y) = kBorder;
  };
  for (int x = left - 1; x <= left + width; ++x) dot(x, top - 1), dot(x, top + height);
  for (int y = top - 1; y <= top + height; ++y) dot(left - 1, y), dot(left + width, y);
}

// Where things are on a sheet.
struct Layout {
  int columns, zoom, picture_width, picture_height, pictures;
  bool headers, labels;
  int header_height, cell_width, cell_height, width;

  int cell_x(int column) const { return kMargin + column * (cell_width + kCellGap); }
  int picture_x(int picture) const { return picture * (picture_width + kPictureGap); }
};

int widest_section(const Sheet& sheet) {
  std::size_t cells = 1;
  for (const auto& section : sheet.sections) cells = std::max(cells, section.cells.size());
  return static_cast<int>(cells);
}

int count_cells(const Sheet& sheet) {
  std::size_t cells = 0;
  for (const auto& section : sheet.sections) cells += section.cells.size();
  return static_cast<int>(cells);
}

// About as wide as high, in a sheet that still fits on a screen.
int default_columns(int cells, int cell_width, int cell_height) {
  const double square = std::sqrt(cells * 1.3 * cell_height / cell_width);
  const int fitting = std::max(1, 1600 / (cell_width + kCellGap));
  return std::clamp(static_cast<int>(std::lround(square)), 1, fitting);
}

Layout arrange(const Sheet& sheet, const SheetOptions& options) {
  Layout layout = {};
  const Cell& first = sheet.sections.front().cells.front();
  const Image& picture = first.pictures.front();
  layout.zoom = options.zoom > 0 ? options.zoom : default_zoom(picture);
  layout.picture_width = picture.width * layout.zoom;
  layout.picture_height = picture.height * layout.zoom;
  layout.pictures = static_cast<int>(first.pictures.size());
  layout.headers = std::any_of(sheet.headers.begin(), sheet.headers.end(),
                               [](const auto& header) { return !header.empty(); });
  for (const auto& section : sheet.sections) {
    for (const auto& cell : section.cells) layout.labels |= !cell.label.empty();
  }
  layout.header_height = layout.headers ? text_height(kHeader) + 6 : 0;
  layout.cell_width = layout.picture_x(layout.pictures) - kPictureGap;
  layout.cell_height = (layout.labels ? text_height(kLabel) + 2 : 0) + layout.picture_height;
  const int cells = widest_section(sheet);
  layout.columns = options.columns > 0
                       ? std::min(options.columns, cells)
                       : std::min(cells, default_columns(count_cells(sheet), layout.cell_width,
                                                         layout.cell_height));
  layout.width = layout.cell_x(layout.columns) - kCellGap + kMargin;
  return layout;
}

int section_height(const Layout& layout, const Section& section) {
  const int rows = (static_cast<int>(section.cells.size()) + layout.columns - 1) / layout.columns;
  return (section.title.empty() ? 0 : text_height(kTitle) + 6) + layout.header_height +
         rows * layout.cell_height + (rows - 1) * kRowGap;
}

// A bar of colours between two texts; 0: there is none, or no room for it.
int legend_width(const Layout& layout, const std::string& legend) {
  if (legend.empty()) return 0;
  const int width = text_width(legend + kNoneOfLegend, kFooter) + kLegendWidth + 2 * kLegendGap +
                    text_width(kAllOfLegend, kFooter);
  return width <= layout.width - 2 * kMargin ? width : 0;
}

// Footer and legend share a line where both fit; else the footer is above.
int footer_lines(const Layout& layout, const Sheet& sheet) {
  const int legend = legend_width(layout, sheet.legend);
  if (sheet.footer.empty() || legend == 0) return sheet.footer.empty() && legend == 0 ? 0 : 1;
  const int both = text_width(sheet.footer, kFooter) + kFooterGap + legend;
  return both <= layout.width - 2 * kMargin ? 1 : 2;
}

int footer_height(const Layout& layout, const Sheet& sheet) {
  const int lines = footer_lines(layout, sheet);
  return lines == 0 ? 0 : kRowGap + lines * text_height(kFooter) + (lines - 1) * kLegendGap;
}

int sheet_height(const Layout& layout, const Sheet& sheet) {
  int height = 2 * kMargin + footer_height(layout, sheet);
  for (const auto& section : sheet.sections) height += section_height(layout, section);
  return height + (kRowGap + kSectionGap) * (static_cast<int>(sheet.sections.size()) - 1);
}

void draw_cell(Image& image, int x, int y, const Layout& layout, const Cell& cell) {
  if (layout.labels) {
    draw_text(image, x, y, shorten_text(cell.label, layout.cell_width, kLabel), kLabel);
    y += text_height(kLabel) + 2;
  }
  for (int i = 0; i < layout.pictures; ++i) {
    const int left = x + layout.picture_x(i);
    frame(image, left, y, layout.picture_width, layout.picture_height);
    paste(image, left, y, enlarge(cell.pictures[static_cast<std::size_t>(i)], layout.zoom));
  }
}

void draw_headers(Image& image, int y, const Layout& layout, const Sheet& sheet, int columns) {
  for (int column = 0; column < columns; ++column) {
    for (int i = 0; i < layout.pictures; ++i) {
      const auto text =
          shorten_text(sheet.headers[static_cast<std::size_t>(i)], layout.picture_width, kHeader);
      const int centred = (layout.picture_width - text_width(text, kHeader)) / 2;
      draw_text(image, layout.cell_x(column) + layout.picture_x(i) + centred, y, text, kHeader);
    }
  }
}

void draw_section(Image& image, int y, const Layout& layout, const Sheet& sheet,
                  const Section& section) {
  if (!section.title.empty()) {
    draw_text(image, kMargin, y, shorten_text(section.title, layout.width - 2 * kMargin, kTitle),
              kTitle);
    y += text_height(kTitle) + 6;
  }
  const int cells = static_cast<int>(section.cells.size());
  if (layout.headers) draw_headers(image, y, layout, sheet, std::min(cells, layout.columns));
  y += layout.header_height;
  for (int i = 0; i < cells; ++i) {
    draw_cell(image, layout.cell_x(i % layout.columns),
              y + i / layout.columns * (layout.cell_height + kRowGap), layout,
              section.cells[static_cast<std::size_t>(i)]);
  }
}

// At the right.
void draw_legend(Image& image, int y, const Layout& layout, const std::string& legend) {
  const int full_x = layout.width - kMargin - text_width(kAllOfLegend, kFooter);
  const int bar_x = full_x - kLegendGap - kLegendWidth;
  const auto none = legend + kNoneOfLegend;
  draw_text(image, full_x, y, kAllOfLegend, kFooter);
  draw_text(image, bar_x - kLegendGap - text_width(none, kFooter), y, none, kFooter);
  for (int x = 0; x < kLegendWidth; ++x) {
    const double heat = static_cast<double>(x) / (kLegendWidth - 1);
    const Rgb colour = mix({255, 255, 255}, heat_colour(heat), heat_opacity(heat));
    for (int row = 0; row < kLegendHeight; ++row) image.at(bar_x + x, y + 1 + row) = colour;
  }
  frame(image, bar_x, y + 1, kLegendWidth, kLegendHeight);
}

// Weights of the four samples around a place between the middle two, t of the way (Catmull-Rom).
std::array<double, 4> cubic_weights(double t) {
  return {0.5 * t * ((2 - t) * t - 1), 0.5 * (t * t * (3 * t - 5) + 2),
          0.5 * t * ((4 - 3 * t) * t + 1), 0.5 * t * t * (t - 1)};
}

using Plane = std::vector<std::array<double, 3>>;

// Enlarges one axis: `count` lines of `length` samples, which lie `stride` apart in `from`.
Plane enlarge_axis(const Plane& from, int count, int line_step, int length, int stride, int factor,
                   int to_line_step, int to_stride) {
  Plane to(from.size() * static_cast<std::size_t>(factor));
  for (int i = 0; i < length * factor; ++i) {
    const double place = (i + 0.5) / factor - 0.5;
    const int base = static_cast<int>(std::floor(place));
    const auto weights = cubic_weights(place - base);
    for (int line = 0; line < count; ++line) {
      auto& value = to[static_cast<std::size_t>(line * to_line_step + i * to_stride)];
      for (int k = 0; k < 4; ++k) {
        const int sample = std::clamp(base - 1 + k, 0, length - 1);
        const auto& source = from[static_cast<std::size_t>(line * line_step + sample * stride)];
        for (std::size_t c = 0; c < 3; ++c) {
          value[c] += weights[static_cast<std::size_t>(k)] * source[c];
        }
      }
    }
  }
  return to;
}

}  // namespace

int default_zoom(const Image& picture) {
  const int side = std::max(1, std::min(picture.width, picture.height));
  return std::max(1, (kEasilySeen + side - 1) / side);
}

Image enlarge(const Image& picture, int factor) {
  if (factor <= 1) return picture;
  Plane plane;
  for (const Rgb& p : picture.pixels) {
    plane.push_back({static_cast<double>(p.r), static_cast<double>(p.g), static_cast<double>(p.b)});
  }
  const int w = picture.width, h = picture.height, wide = w * factor;
  plane = enlarge_axis(plane, h, w, w, 1, factor, wide, 1);
  plane = enlarge_axis(plane, wide, 1, h, wide, factor, 1, wide);
  Image enlarged(wide, h * factor);
  const auto byte = [](double v) {
    return static_cast<std::uint8_t>(std::clamp(v + 0.5, 0.0, 255.0));
  };
  for (std::size_t i = 0; i < plane.size(); ++i) {
    enlarged.pixels[i] = {byte(plane[i][0]), byte(plane[i][1]), byte(plane[i][2])};
  }
  return enlarged;
}

Image heat_overlay(const Image& picture, const std::vector<float>& heat) {
  Image overlay = picture;
  for (std::size_t i = 0; i < overlay.pixels.size(); ++i) {
    const Rgb p = picture.pixels[i];
    const auto grey = static_cast<std::uint8_t>(0.299 * p.r + 0.587 * p.g + 0.114 * p.b + 0.5);
    const Rgb pale = mix({grey, grey, grey}, {255, 255, 255}, 0.35);
    const double value = heat[i];
    overlay.pixels[i] = mix(pale, heat_colour(value), heat_opacity(value));
  }
  return overlay;
}

Image draw_sheet(const Sheet& sheet, const SheetOptions& options) {
  const Layout layout = arrange(sheet, options);
  Image image(layout.width, sheet_height(layout, sheet));
  int y = kMargin;
  for (const auto& section : sheet.sections) {
    draw_section(image, y, layout, sheet, section);
    y += section_height(layout, section) + kRowGap + kSectionGap;
  }
  y = image.height - kMargin - text_height(kFooter);
  const int legend = legend_width(layout, sheet.legend);
  if (legend > 0) draw_legend(image, y, layout, sheet.legend);
  int room = layout.width - 2 * kMargin;
  if (footer_lines(layout, sheet) == 2) {
    y -= kLegendGap + text_height(kFooter);
  } else if (legend > 0) {
    room -= legend + kFooterGap;
  }
  draw_text(image, kMargin, y, shorten_text(sheet.footer, room, kFooter), kFooter);
  return image;
}

}  // namespace sag_sample

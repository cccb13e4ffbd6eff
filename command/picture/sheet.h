#pragma once

#include <string>
#include <vector>

#include "picture/image.h"

namespace sag_sample {

/// One drawing: a label, and one picture per column header of the sheet, all of one size.
struct Cell {
  std::string label;
  std::vector<Image> pictures;
};

/// Cells under one title, which may be empty.
struct Section {
  std::string title;
  std::vector<Cell> cells;
};

/// What to draw. All pictures have one size.
struct Sheet {
  /// Above the pictures of every cell; empty texts: none.
  std::vector<std::string> headers;
  std::vector<Section> sections;
  std::string footer;
  /// What the colours of `heat_overlay` mean; empty: no legend.
  std::string legend;
};

struct SheetOptions {
  /// Cells side by side; 0: as many as look right.
  int columns = 0;
  /// Factor by which pictures are enlarged; 0: as it takes to see them.
  int zoom = 0;
};

/// Draws the sheet: pictures in a grid, labelled, on white.
Image draw_sheet(const Sheet& sheet, const SheetOptions& options);

/// Returns the factor that brings a picture to a size that is easily seen: 1 from 128 pixels on.
int default_zoom(const Image& picture);

/// Enlarges a picture by a whole factor: smoothly (Catmull-Rom), so that it looks like a picture
/// and not like its pixels.
Image enlarge(const Image& picture, int factor);

/// Lays a heat map over a grey version of the picture. heat: 0 … 1, one value a pixel.
Image heat_overlay(const Image& picture, const std::vector<float>& heat);

}  // namespace sag_sample

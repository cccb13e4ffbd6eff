#include "sag/token_grid.h"

#include <cmath>

#include <c10/util/Exception.h>

namespace sag {

TokenGrid token_grid(std::int64_t tokens, std::int64_t height, std::int64_t width) {
  TORCH_CHECK_VALUE(tokens > 0 && height > 0 && width > 0,
                    "[token_grid] tokens, height and width must be positive, got ", tokens, ", ", height,
                    " and ", width, ".");
  // ⌈⌈n/2⌉/2⌉ = ⌈n/4⌉, so repeated halving visits every grid of a plain UNet.
  for (TokenGrid grid{height, width};; grid = {(grid.rows + 1) / 2, (grid.cols + 1) / 2}) {
    if (grid.rows * grid.cols == tokens) return grid;
    if (grid.rows == 1 && grid.cols == 1) break;
  }

  // No halving fits: of all factorisations take the one nearest in shape, by the logarithm of the ratio.
  const auto ratio = static_cast<double>(height) / static_cast<double>(width);
  TokenGrid best{1, tokens};
  auto best_distance = std::abs(std::log(1.0 / static_cast<double>(tokens) / ratio));
  for (std::int64_t rows = 2; rows <= tokens; ++rows) {
    if (tokens % rows != 0) continue;
    const auto cols = tokens / rows;
    const auto distance = std::abs(std::log(static_cast<double>(rows) / static_cast<double>(cols) / ratio));
    // Of two equally near ones the first, whatever the rounding: fewer rows.
    if (distance < best_distance - 1e-9) best = {rows, cols}, best_distance = distance;
  }
  return best;
}

}  // namespace sag

#include "sag/token_grid.h"

#include <algorithm>
#include <cmath>

#include <c10/util/Exception.h>

namespace sag {

TokenGrid token_grid(std::int64_t tokens, std::int64_t height, std::int64_t width) {
  // Products of two sides still fit into 64 bits.
  constexpr std::int64_t kLargest = std::int64_t{1} << 31;
  TORCH_CHECK_VALUE(
      tokens > 0 && height > 0 && width > 0 && std::max({tokens, height, width}) < kLargest,
      "[token_grid] tokens, height and width must be positive and below 2^31, got ", tokens, ", ",
      height, " and ", width, ".");
  // ⌈⌈n/2⌉/2⌉ = ⌈n/4⌉, so repeated halving visits every grid of a plain UNet.
  for (TokenGrid grid{height, width};; grid = {(grid.rows + 1) / 2, (grid.cols + 1) / 2}) {
    if (grid.rows * grid.cols == tokens) return grid;
    if (grid.rows == 1 && grid.cols == 1) break;
  }

  // No halving fits: take the factorisation nearest in shape, by the logarithm of the ratio.
  const auto ratio = static_cast<double>(height) / static_cast<double>(width);
  const auto distance = [ratio](const TokenGrid& grid) {
    return std::abs(
        std::log(static_cast<double>(grid.rows) / static_cast<double>(grid.cols) / ratio));
  };
  TokenGrid best{1, tokens};
  const auto consider = [&](const TokenGrid& grid) {
    // Of two equally near ones keep the first, whatever the rounding.
    if (distance(grid) < distance(best) - 1e-9) best = grid;
  };
  for (std::int64_t factor = 1; factor * factor <= tokens; ++factor) {
    if (tokens % factor != 0) continue;
    consider({factor, tokens / factor});
    consider({tokens / factor, factor});
  }
  return best;
}

}  // namespace sag

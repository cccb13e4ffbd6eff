#include "sag/token_grid.h"

#include <algorithm>
#include <cmath>

#include <c10/util/Exception.h>

#include "token_checks.h"

namespace sag {
namespace {

void check_arguments(std::int64_t tokens, std::int64_t height, std::int64_t width,
                     std::int64_t reduction) {
  // Products of two sides still fit into 64 bits.
  constexpr std::int64_t kLargest = std::int64_t{1} << 31;
  TORCH_CHECK_VALUE(
      tokens > 0 && height > 0 && width > 0 && std::max({tokens, height, width}) < kLargest,
      "[token_grid] tokens, height and width must be positive and below 2^31, got ", tokens, ", ",
      height, " and ", width, ".");
  TORCH_CHECK_VALUE(reduction >= 0, "[token_grid] reduction must be at least 0, got ", reduction,
                    ".");
}

// The grid of repeated halving that has as many tokens.
std::optional<TokenGrid> halved_grid(std::int64_t tokens, std::int64_t height, std::int64_t width,
                                     std::int64_t reduction) {
  std::int64_t f = 1;
  // ⌈⌈n/2⌉/2⌉ = ⌈n/4⌉, so repeated halving visits every grid of a plain UNet.
  for (TokenGrid grid{height, width};; grid = {(grid.rows + 1) / 2, (grid.cols + 1) / 2}, f *= 2) {
    if (grid.rows * grid.cols == tokens && (reduction == 0 || reduction == f)) return grid;
    if (grid.rows == 1 && grid.cols == 1) return std::nullopt;
  }
}

// Calls `consider` with every grid of a reduction by f. From c = 0 on, ⌊(n + c)/f⌋ grows once, by
// 1, at c = f − n mod f. So the side with the larger remainder grows first.
template <typename Consider>
void each_grid(std::int64_t height, std::int64_t width, std::int64_t f, const Consider& consider) {
  const auto row_rest = height % f, col_rest = width % f;
  for (const auto c : {std::int64_t{0}, f - std::max(row_rest, col_rest), f - 1}) {
    const TokenGrid grid{(height + c) / f, (width + c) / f};
    if (c < f && grid.rows > 0 && grid.cols > 0) consider(grid);
  }
}

}  // namespace

std::optional<TokenGrid> token_grid(std::int64_t tokens, std::int64_t height, std::int64_t width,
                                    std::int64_t reduction) {
  check_arguments(tokens, height, width, reduction);
  if (tokens > height * width) return std::nullopt;
  if (const auto grid = halved_grid(tokens, height, width, reduction)) return grid;

  // By the logarithm of the ratio of their sides.
  const auto ratio = static_cast<double>(height) / static_cast<double>(width);
  const auto distance = [ratio](const TokenGrid& grid) {
    return std::abs(
        std::log(static_cast<double>(grid.rows) / static_cast<double>(grid.cols) / ratio));
  };
  std::optional<TokenGrid> best;
  const auto consider = [&](const TokenGrid& grid) {
    if (grid.rows * grid.cols != tokens) return;
    // Of two equally near ones keep the first, whatever the rounding.
    if (!best || distance(grid) < distance(*best) - 1e-9) best = grid;
  };
  if (reduction > 0) {
    each_grid(height, width, reduction, consider);
    return best;
  }
  for (std::int64_t f = 1; f <= std::max(height, width); ++f) {
    // From here on every grid has fewer tokens.
    if ((height / f + 1) * (width / f + 1) < tokens) break;
    each_grid(height, width, f, consider);
  }
  return best;
}

void check_picture_tokens(const PictureTokens& where, std::string_view function) {
  constexpr auto kRest = PictureTokens::kRest;
  TORCH_CHECK_VALUE(
      where.before >= kRest && where.after >= kRest && where.before + where.after > 2 * kRest, "[",
      function, "] tokens.before and tokens.after must be at least 0, or one of them ", kRest,
      " for the rest, got ", where.before, " and ", where.after, ".");
  TORCH_CHECK_VALUE(where.reduction >= 0, "[", function,
                    "] tokens.reduction must be at least 0, got ", where.reduction, ".");
  TORCH_CHECK_VALUE(where.reduction > 0 || (where.before != kRest && where.after != kRest), "[",
                    function,
                    "] tokens.reduction must be given where tokens.before or tokens.after is the "
                    "rest, got 0.");
}

std::optional<TokenRange> find_picture_tokens(std::int64_t tokens, std::int64_t height,
                                              std::int64_t width, const PictureTokens& where) {
  constexpr auto kRest = PictureTokens::kRest;
  check_arguments(tokens, height, width, where.reduction);
  check_picture_tokens(where, "find_picture_tokens");
  if (where.before != kRest && where.after != kRest) {
    const auto count = tokens - where.before - where.after;
    if (count <= 0 || !token_grid(count, height, width, where.reduction)) return std::nullopt;
    return TokenRange{where.before, count};
  }
  // Otherwise it would be a guess which way the sides were rounded.
  if (height % where.reduction != 0 || width % where.reduction != 0) return std::nullopt;
  const auto count = height / where.reduction * (width / where.reduction);
  const auto begin = where.before == kRest ? tokens - where.after - count : where.before;
  if (begin < 0 || begin + count > tokens) return std::nullopt;
  return TokenRange{begin, count};
}

}  // namespace sag

#include "sag/token_grid.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/reference.h"
#include "support/toy.h"

namespace sag {
namespace {

// The size after k stride-2, pad-1, 3×3 convolutions.
std::int64_t halved(std::int64_t side, int k) {
  for (; k > 0; --k) side = (side + 1) / 2;
  return side;
}

class EveryLatent : public testing::TestWithParam<int> {};

TEST_P(EveryLatent, FindsItsTrueGrid) {
  const int halvings = GetParam();
  for (std::int64_t height = 5; height <= 96; ++height)
    for (std::int64_t width = 5; width <= 96; ++width) {
      const TokenGrid grid{halved(height, halvings), halved(width, halvings)};
      ASSERT_EQ(token_grid(grid.rows * grid.cols, height, width), grid) << height << " x " << width;
    }
}
INSTANTIATE_TEST_SUITE_P(Halvings, EveryLatent, testing::Values(2, 3));

// Sizes that ComfyUI 0.3.64 gets wrong or crashes on (golden toy.json, T3 and T4).
TEST(TokenGridOf, SizesTheReferenceFailsOn) {
  // In ComfyUI: 18 × 8.
  EXPECT_EQ(token_grid(144, 128, 66), (TokenGrid{16, 9}));
  // In ComfyUI: TypeError.
  EXPECT_EQ(token_grid(4, 16, 9), (TokenGrid{2, 2}));
  EXPECT_EQ(token_grid(1, 8, 8), (TokenGrid{1, 1}));
  EXPECT_EQ(token_grid(25, 1, 100), (TokenGrid{1, 25}));
}

TEST(TokenGridOf, SizesTheReferenceIsRightOn) {
  int right = 0;
  for (const auto& entry : test::toy_entries("T3")) {
    const auto& size = entry.at("params");
    const std::int64_t tokens = size.at("n"), height = size.at("lh"), width = size.at("lw");
    const auto grid = token_grid(tokens, height, width);
    EXPECT_EQ(grid.rows * grid.cols, tokens) << size;
    if (grid.rows != halved(height, 3) || grid.cols != halved(width, 3)) continue;
    const auto& theirs = entry.at("value");
    if (theirs.is_null() || theirs == std::vector<double>{18, 8}) continue;
    EXPECT_EQ(theirs, (std::vector<double>{double(grid.rows), double(grid.cols)})) << size;
    ++right;
  }
  EXPECT_EQ(right, 3);
}

TEST(TokenGridOf, ActivationsResizedByAnotherFactorHaveTheNearestShape) {
  // Kohya's deep shrink, factor 2.
  EXPECT_EQ(token_grid(24, 64, 96), (TokenGrid{4, 6}));
  EXPECT_EQ(token_grid(11 * 13, 65, 77), (TokenGrid{11, 13}));
  // A prime has no better grid.
  EXPECT_EQ(token_grid(7, 64, 64), (TokenGrid{1, 7}));
  EXPECT_EQ(token_grid(7, 96, 12), (TokenGrid{7, 1}));
}

TEST(TokenGridOf, NeverFails) {
  for (std::int64_t tokens = 1; tokens <= 300; ++tokens)
    for (const auto& [height, width] :
         {std::pair<std::int64_t, std::int64_t>{64, 64}, {5, 90}, {33, 64}, {1, 1}}) {
      const auto grid = token_grid(tokens, height, width);
      ASSERT_EQ(grid.rows * grid.cols, tokens);
    }
}

TEST(TokenGridOf, PositiveNumbersOnly) {
  EXPECT_THROW(token_grid(0, 8, 8), c10::ValueError);
  EXPECT_THROW(token_grid(4, -8, 8), c10::ValueError);
  EXPECT_THROW(token_grid(4, 8, 0), c10::ValueError);
  EXPECT_THROW(token_grid(4, std::int64_t{1} << 62, 8), c10::ValueError);
}

}  // namespace
}  // namespace sag

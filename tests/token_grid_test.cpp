#include "sag/token_grid.h"

#include <cstdint>
#include <optional>
#include <vector>

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
    if (!grid) continue;
    EXPECT_EQ(grid->rows * grid->cols, tokens) << size;
    if (grid->rows != halved(height, 3) || grid->cols != halved(width, 3)) continue;
    const auto& theirs = entry.at("value");
    if (theirs.is_null() || theirs == std::vector<double>{18, 8}) continue;
    EXPECT_EQ(theirs, (std::vector<double>{double(grid->rows), double(grid->cols)})) << size;
    ++right;
  }
  EXPECT_EQ(right, 3);
}

TEST(TokenGridOf, ActivationsResizedByAnotherFactor) {
  // Kohya's deep shrink, factor 2 and 1.5.
  EXPECT_EQ(token_grid(24, 64, 96), (TokenGrid{4, 6}));
  EXPECT_EQ(token_grid(6 * 8, 72, 96), (TokenGrid{6, 8}));
  EXPECT_EQ(token_grid(11 * 13, 65, 77), (TokenGrid{11, 13}));
}

// A layer of stride `stride` that rounds the size of its result up or down.
struct Layer {
  std::int64_t stride;
  bool up;

  std::int64_t operator()(std::int64_t side) const {
    return up ? (side + stride - 1) / stride : side / stride;
  }
};
using Chain = std::vector<Layer>;

// Patches or a stem, and up to four halvings, each rounded its own way.
std::vector<Chain> chains() {
  std::vector<Chain> chains;
  for (const std::int64_t stem : {1, 2, 3, 4, 5, 7, 8, 14, 16})
    for (const bool stem_up : {false, true})
      for (int halvings = 0; halvings <= 4; ++halvings)
        for (int ups = 0; ups < 1 << halvings; ++ups) {
          Chain chain = {{stem, stem_up}};
          for (int k = 0; k < halvings; ++k) chain.push_back({2, (ups >> k) % 2 == 1});
          chains.push_back(chain);
        }
  return chains;
}

TEST(TokenGridOf, EveryChainOfStridesIsFound) {
  std::int64_t found = 0;
  for (const auto& chain : chains())
    for (std::int64_t height = 5; height <= 200; ++height)
      for (std::int64_t width = 5; width <= 200; ++width) {
        TokenGrid grid{height, width};
        std::int64_t stride = 1;
        for (const auto& layer : chain) {
          grid = {layer(grid.rows), layer(grid.cols)};
          stride *= layer.stride;
        }
        if (grid.rows == 0 || grid.cols == 0) continue;
        const auto tokens = grid.rows * grid.cols;
        ASSERT_EQ(token_grid(tokens, height, width, stride), grid) << height << " x " << width;
        ASSERT_EQ(token_grid(tokens, height, width), grid) << height << " x " << width;
        ++found;
      }
  EXPECT_GT(found, 5'000'000);
}

TEST(TokenGridOf, OtherNumbersHaveNone) {
  // Class token, registers, text, beside 16 x 16, 8 x 8 and 32 x 32 tokens.
  for (const std::int64_t extra : {-1, 1, 2, 4, 5, 8, 16, 77, 154, 256, 333}) {
    EXPECT_EQ(token_grid(256 + extra, 16, 16), std::nullopt) << extra;
    EXPECT_EQ(token_grid(256 + extra, 32, 32), std::nullopt) << extra;
    EXPECT_EQ(token_grid(1024 + extra, 64, 64), std::nullopt) << extra;
    EXPECT_EQ(token_grid(64 + extra, 64, 64), std::nullopt) << extra;
  }
  // More tokens than cells, primes, and other shapes than the latent's.
  EXPECT_EQ(token_grid(65, 8, 8), std::nullopt);
  EXPECT_EQ(token_grid(7, 64, 64), std::nullopt);
  EXPECT_EQ(token_grid(8 * 16, 64, 64), std::nullopt);
  EXPECT_EQ(token_grid(16 * 16, 64, 96), std::nullopt);
}

// Strides with padding round a side up, patches round it down.
enum class Rounded { up, down };

// How often tokens beside the picture's make a number that is a grid by accident, of all latents of
// 16 ... 128 cells a side and these reductions. In percent.
double accidents(std::int64_t extra, Rounded rounded, std::vector<std::int64_t> reductions) {
  std::int64_t found = 0, all = 0;
  for (const auto f : reductions) {
    const auto more = rounded == Rounded::up ? f - 1 : 0;
    for (std::int64_t height = 16; height <= 128; ++height)
      for (std::int64_t width = 16; width <= 128; ++width) {
        const auto picture = ((height + more) / f) * ((width + more) / f);
        found += token_grid(picture + extra, height, width).has_value();
        ++all;
      }
  }
  return 100 * static_cast<double>(found) / static_cast<double>(all);
}

// docs/hooks.md names these shares.
TEST(TokenGridOf, AccidentsAreRareWhereThereAreManyTokens) {
  const std::vector<std::int64_t> patches = {1, 2, 4}, middle = {8, 16};
  for (const auto rounded : {Rounded::up, Rounded::down}) {
    const bool up = rounded == Rounded::up;
    EXPECT_EQ(accidents(1, rounded, patches), 0);
    EXPECT_NEAR(accidents(4, rounded, patches), up ? 0 : 0.9, 0.05);
    EXPECT_NEAR(accidents(8, rounded, patches), up ? 0 : 1.2, 0.05);
    EXPECT_NEAR(accidents(16, rounded, patches), up ? 0.03 : 1.4, 0.05);
    for (const std::int64_t extra : {77, 154, 256, 333})
      EXPECT_LT(accidents(extra, rounded, patches), 0.3) << extra;
    // In a UNet's middle there are few tokens, and more numbers are some grid.
    EXPECT_NEAR(accidents(1, rounded, middle), up ? 0.8 : 11, 0.05);
    EXPECT_NEAR(accidents(4, rounded, middle), up ? 24.9 : 23.8, 0.05);
    EXPECT_NEAR(accidents(8, rounded, middle), up ? 22.9 : 18.9, 0.05);
    EXPECT_NEAR(accidents(16, rounded, middle), up ? 16.9 : 18.5, 0.05);
    EXPECT_NEAR(accidents(77, rounded, middle), up ? 3.3 : 3.9, 0.05);
    for (const std::int64_t extra : {154, 256, 333})
      EXPECT_LT(accidents(extra, rounded, middle), 2.6) << extra;
  }
}

TEST(TokenGridOf, PositiveNumbersOnly) {
  EXPECT_THROW(token_grid(0, 8, 8), c10::ValueError);
  EXPECT_THROW(token_grid(4, -8, 8), c10::ValueError);
  EXPECT_THROW(token_grid(4, 8, 0), c10::ValueError);
  EXPECT_THROW(token_grid(4, std::int64_t{1} << 62, 8), c10::ValueError);
  EXPECT_THROW(token_grid(4, 8, 8, -1), c10::ValueError);
}

constexpr auto kRest = PictureTokens::kRest;

TEST(FindPictureTokens, CountsFromBothEnds) {
  EXPECT_EQ(find_picture_tokens(256, 16, 16, {}), (TokenRange{0, 256}));
  EXPECT_EQ(find_picture_tokens(257, 16, 16, {.before = 1}), (TokenRange{1, 256}));
  EXPECT_EQ(find_picture_tokens(338, 16, 16, {.before = 5, .after = 77}), (TokenRange{5, 256}));
  EXPECT_EQ(find_picture_tokens(257, 16, 16, {.before = 2}), std::nullopt);
  EXPECT_EQ(find_picture_tokens(3, 16, 16, {.before = 1, .after = 2}), std::nullopt);
}

TEST(FindPictureTokens, TakesATextOfAnyLength) {
  for (const std::int64_t text : {0, 1, 77, 192, 256, 300}) {
    EXPECT_EQ(find_picture_tokens(text + 64, 16, 16, {.before = kRest, .reduction = 2}),
              (TokenRange{text, 64}));
    EXPECT_EQ(find_picture_tokens(text + 65, 16, 16, {.before = kRest, .after = 1, .reduction = 2}),
              (TokenRange{text, 64}));
    EXPECT_EQ(find_picture_tokens(text + 65, 16, 16, {.before = 1, .after = kRest, .reduction = 2}),
              (TokenRange{1, 64}));
  }
  EXPECT_EQ(find_picture_tokens(63, 16, 16, {.before = kRest, .reduction = 2}), std::nullopt);
  EXPECT_EQ(find_picture_tokens(64, 16, 16, {.before = 1, .after = kRest, .reduction = 2}),
            std::nullopt);
  // 8 x 8 or 9 x 9?
  EXPECT_EQ(find_picture_tokens(177, 17, 17, {.before = kRest, .reduction = 2}), std::nullopt);
}

TEST(FindPictureTokens, HoldsTheReductionAgainstTheNumber) {
  EXPECT_EQ(find_picture_tokens(64, 16, 16, {.reduction = 2}), (TokenRange{0, 64}));
  EXPECT_EQ(find_picture_tokens(64, 16, 16, {.reduction = 4}), std::nullopt);
}

TEST(FindPictureTokens, RefusesWhatItCannotUnderstand) {
  EXPECT_THROW(find_picture_tokens(64, 16, 16, {.before = -2}), c10::ValueError);
  EXPECT_THROW(find_picture_tokens(64, 16, 16, {.before = kRest}), c10::ValueError);
  EXPECT_THROW(find_picture_tokens(64, 16, 16, {.before = kRest, .after = kRest, .reduction = 2}),
               c10::ValueError);
  EXPECT_THROW(find_picture_tokens(64, 16, 16, {.reduction = -1}), c10::ValueError);
  EXPECT_THROW(find_picture_tokens(0, 16, 16, {}), c10::ValueError);
}

}  // namespace
}  // namespace sag

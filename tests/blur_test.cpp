#include "sag/blur.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "support/device.h"
#include "support/reference.h"
#include "support/toy.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::max_diff;

class Blur : public test::BackendTest {};

TEST_P(Blur, IsAConvolutionWithTheOuterProduct) {
  torch::manual_seed(0);
  for (const auto& [h, w] :
       {std::pair<std::int64_t, std::int64_t>{16, 24}, {5, 5}, {33, 7}, {3, 20}, {1, 9}, {1, 1}})
    for (const std::int64_t taps : {1, 3, 9, 13})
      for (const double sigma : {0.3, 2.0, 10.0}) {
        const auto x = torch::randn({2, 3, h, w}, device());
        EXPECT_LT(
            max_diff(gaussian_blur_2d(x, taps, sigma), test::reference_blur(x, taps / 2, sigma)),
            2e-6)
            << h << " x " << w << ", " << taps << " taps, sigma " << sigma;
      }
}

// Golden toy.json, T6: an impulse at (2, 3) in 6 × 7.
TEST_P(Blur, SpreadsAnImpulseLikeTheReference) {
  auto x = torch::zeros({1, 1, 6, 7});
  x[0][0][2][3] = 1;
  const auto y = gaussian_blur_2d(x.to(device()), 9, 2.0)[0][0];
  EXPECT_LT(max_diff(y[0], torch::tensor(
                               {.032831, .037512, .044622, .050564, .044622, .037512, .032831})),
            1e-6);
  EXPECT_LT(max_diff(y[5], torch::tensor(
                               {.017573, .020078, .023885, .027065, .023885, .020078, .017573})),
            1e-6);
}

// T7 and blur_weights of golden/toy.json.
TEST_P(Blur, GivesTheReferencesNumbers) {
  const auto y = gaussian_blur_2d(test::fill({1, 2, 6, 7}, .9, .2, 1).to(device()), 9, 2.0).cpu();
  const auto entry = test::toy_entries("T7").front();
  const auto seen = torch::stack({y.sum(), y[0][0][0][0], y[0][1][5][6], y[0][0][3][3]});
  EXPECT_LT(max_diff(seen, torch::tensor(entry.at("value").get<std::vector<double>>())),
            entry.at("tolerance").get<double>());

  auto impulse = torch::zeros({1, 1, 1, 17}, device());
  impulse[0][0][0][8] = 1;
  for (const auto& weights : test::toy_entries("blur_weights")) {
    const double sigma = weights.at("params").at("blur_sigma");
    const auto outward = gaussian_blur_2d(impulse, 9, sigma).flatten().narrow(0, 8, 5);
    EXPECT_LT(max_diff(outward, torch::tensor(weights.at("value").get<std::vector<double>>())),
              weights.at("tolerance").get<double>())
        << "sigma " << sigma;
  }
}

TEST_P(Blur, KeepsTheDtypeAndSumsHalfPrecisionInFp32) {
  const auto x = torch::randn({1, 2, 12, 12}, device());
  for (const auto& [dtype, step] : {std::pair{torch::kHalf, 1e-3}, {torch::kBFloat16, 1e-2}}) {
    const auto y = gaussian_blur_2d(x.to(dtype), 9, 2.0);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_LT(max_diff(y, gaussian_blur_2d(x, 9, 2.0)), step);
  }
}

TEST_P(Blur, OfSigma0IsTheIdentity) {
  const auto x = torch::randn({1, 2, 8, 8}, device());
  EXPECT_TRUE(torch::equal(gaussian_blur_2d(x, 9, 0.0), x));
  EXPECT_LT(max_diff(gaussian_blur_2d(x, 9, 0.05), x), 1e-6);
}

TEST_P(Blur, WithKernelSize0IsAsWideAsSigmaNeeds) {
  const auto x = torch::randn({1, 1, 64, 64}, device());
  EXPECT_TRUE(torch::equal(gaussian_blur_2d(x, 0, 4.0), gaussian_blur_2d(x, 25, 4.0)));
  EXPECT_TRUE(gaussian_blur_2d(x, 0, 1e300).isfinite().all().item<bool>());
}

// Golden toy.json, T8 and T9: x0 = fill((1,4,16,24),.11,.5,1) with the attention of T1.
TEST_P(Blur, MapBlursWhatIsAttendedTo) {
  const auto q = test::split_heads(fill({2, 6, 8}, .5, .1, 2), 2),
             k = test::split_heads(fill({2, 6, 8}, .3, .4, 2), 2);
  const auto map = attention_map(q, k).to(device());
  const auto x0 = fill({1, 4, 16, 24}, .11, .5, 1).to(device());
  const auto blurred = create_blur_map(x0, map.narrow(0, 0, 1));
  const auto at = blurred.flatten().cpu().index_select(0, torch::tensor({0, 100, 777, 1535}));
  EXPECT_LT(max_diff(at, torch::tensor({.029953, .009182, -.911534, -.291700})), 2e-6);
  EXPECT_NEAR(blurred.abs().sum(torch::kDouble).item<double>(), 499.929920, 5e-5);
  EXPECT_EQ((blurred != x0).any(1).sum().item<std::int64_t>(), 192) << "tokens 0, 3 and 4 of 6";

  const auto both = create_blur_map(fill({2, 4, 16, 24}, .11, .5, 1).to(device()), map);
  EXPECT_NEAR(both.abs().sum(torch::kDouble).item<double>(), 843.079456, 1e-4);
  EXPECT_LT(max_diff(both.narrow(0, 0, 1), blurred), 1e-7);
}

TEST_P(Blur, MapKeepsTheRestToTheBit) {
  const auto x0 = torch::randn({1, 4, 16, 16}, device());
  const auto map = torch::tensor({{2.0, 0.5, 0.5, 1.0}})
                       .to(device(), torch::kFloat);  // 2 × 2 tokens; 1 is not above 1
  const auto blurred = create_blur_map(x0, map);
  EXPECT_FALSE(
      torch::equal(blurred.narrow(2, 0, 8).narrow(3, 0, 8), x0.narrow(2, 0, 8).narrow(3, 0, 8)));
  EXPECT_TRUE(torch::equal(blurred.narrow(2, 8, 8), x0.narrow(2, 8, 8)));
  EXPECT_TRUE(torch::equal(blurred.narrow(3, 8, 8), x0.narrow(3, 8, 8)));
}

TEST_P(Blur, MapTakesAMapOfLatentSize) {
  const auto x0 = torch::randn({2, 4, 17, 9}, device()), map = torch::rand({2, 6}, device()) * 2;
  EXPECT_TRUE(torch::equal(create_blur_map(x0, upsample_attention_map(map, 17, 9)),
                           create_blur_map(x0, map)));
}

// Golden toy.json, T5: run lengths of the nearest rule, for example 9 → 65.
TEST_P(Blur, UpsamplesByTheNearestCell) {
  const auto runs = [&](std::int64_t tokens, std::int64_t side) {
    const auto row = upsample_attention_map(
        torch::arange(tokens, device()).to(torch::kFloat).view({1, tokens}), 1, side);
    std::vector<std::int64_t> lengths;
    for (std::int64_t i = 0; i < tokens; ++i)
      lengths.push_back((row == i).sum().item<std::int64_t>());
    return lengths;
  };
  EXPECT_EQ(runs(9, 65), (std::vector<std::int64_t>{8, 7, 7, 7, 8, 7, 7, 7, 7}));
  EXPECT_EQ(runs(5, 33), (std::vector<std::int64_t>{7, 7, 6, 7, 6}));
  EXPECT_EQ(runs(3, 20), (std::vector<std::int64_t>{7, 7, 6}));
  EXPECT_EQ(runs(7, 50), (std::vector<std::int64_t>{8, 7, 7, 7, 7, 7, 7}));
}

INSTANTIATE_TEST_SUITE_P(Backends, Blur, test::backends(), test::backend_name);

TEST(BlurArguments, AreChecked) {
  const auto x = torch::zeros({1, 4, 8, 8});
  EXPECT_THROW(gaussian_blur_2d(torch::zeros({4, 8, 8}), 9, 2), c10::ValueError);
  EXPECT_THROW(gaussian_blur_2d(torch::zeros({1, 4, 0, 8}), 9, 2), c10::ValueError);
  EXPECT_THROW(gaussian_blur_2d(x.to(torch::kInt), 9, 2), c10::TypeError);
  EXPECT_THROW(gaussian_blur_2d(x, 8, 2), c10::ValueError);
  EXPECT_THROW(gaussian_blur_2d(x, -1, 2), c10::ValueError);
  EXPECT_THROW(gaussian_blur_2d(x, 9, -2), c10::ValueError);
  EXPECT_THROW(gaussian_blur_2d(x, 9, NAN), c10::ValueError);
  EXPECT_THROW(upsample_attention_map(torch::ones({4}), 8, 8), c10::ValueError);
  EXPECT_THROW(upsample_attention_map(torch::ones({1, 4}, torch::kInt), 8, 8), c10::TypeError);
  EXPECT_THROW(create_blur_map(x, torch::ones({2, 4})), c10::ValueError);
  EXPECT_THROW(create_blur_map(x, torch::ones({1, 1, 4, 4})), c10::ValueError);
  EXPECT_THROW(create_blur_map(x, torch::ones({1, 4}), {.threshold = NAN}), c10::ValueError);
}

}  // namespace
}  // namespace sag

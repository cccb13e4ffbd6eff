#include "model/conditioning_checks.h"

#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/reference.h"

namespace sag {
namespace {

void check(const Conditioning& cond) {
  check_conditioning(cond, 2, 8, 12, "test");
}

TEST(Conditioning, IsActiveOnAClosedInterval) {
  const Conditioning cond{.sigma_start = 5, .sigma_end = 1};
  EXPECT_TRUE(is_active(cond, 5));
  EXPECT_TRUE(is_active(cond, 1));
  EXPECT_FALSE(is_active(cond, 5.001));
  EXPECT_FALSE(is_active(cond, 0.999));
  EXPECT_TRUE(is_active({}, 1e9));
}

TEST(CheckConditioning, TakesWhatFits) {
  check({});
  check({.context = torch::zeros({1, 77, 8}),
         .y = torch::zeros({2, 16}),
         .concat = torch::zeros({2, 5, 8, 12}),
         .extra = {{"c", torch::zeros({1, 4})}}});
  check({.area = Area{4, 4, 6, 10}, .mask = torch::zeros({8, 12})});
  check({.mask = torch::zeros({2, 8, 12})});
}

TEST(CheckConditioning, NamesWhatDoesNotFit) {
  const auto refuses = [](const Conditioning& cond, const std::string& what) {
    try {
      check(cond);
      ADD_FAILURE() << "accepted a wrong " << what;
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what_without_backtrace(), testing::StartsWith("[test] " + what));
    }
  };
  refuses({.context = torch::zeros({77, 8})}, "context must have shape");
  refuses({.context = torch::zeros({3, 77, 8})}, "context must have 1 or 2 rows");
  refuses({.context = torch::zeros({1, 77, 8}, torch::kInt)}, "context must be floating");
  refuses({.y = torch::zeros({1, 2, 3})}, "y must have shape");
  refuses({.y = torch::zeros({5, 3})}, "y must have 1 or 2 rows");
  refuses({.concat = torch::zeros({5, 8, 12})}, "concat must have shape");
  refuses({.concat = torch::zeros({1, 0, 8, 12})}, "concat must have shape");
  refuses({.concat = torch::zeros({3, 5, 8, 12})}, "concat must have 1 or 2 rows");
  refuses({.concat = torch::zeros({1, 5, 12, 8})},
          "concat must have the latent's height and width");
  refuses({.concat = torch::zeros({1, 5, 8, 12}, torch::kBool)}, "concat must be floating");
  refuses({.extra = {{"c", torch::zeros({5, 3})}}}, "extra input \"c\" must have 1 or 2 rows");
  refuses({.extra = {{"c", torch::Tensor()}}}, "extra input \"c\" must be a tensor");
  refuses({.strength = NAN}, "strength");
  refuses({.area = Area{0, 4, 0, 0}}, "area must have positive sides");
  refuses({.area = Area{4, 4, 8, 0}}, "area must touch the latent");
  refuses({.area = Area{4, 4, -1, 0}}, "area must have positive sides");
  refuses({.mask = torch::zeros({12, 8})}, "mask must have the latent's size");
  refuses({.mask = torch::zeros({3, 8, 12})}, "mask must have 1 or 2 rows");
  refuses({.mask = torch::zeros({8, 12}, torch::kBool)}, "mask must be floating");
  refuses({.sigma_start = 1, .sigma_end = 2}, "sigma_end must be at most");
}

TEST(CheckConditioningValues, NamesWhatHoldsNanOrInfinity) {
  const auto refuses = [](const Conditioning& cond, const std::string& what) {
    try {
      check_conditioning_values(cond, "test");
      ADD_FAILURE() << "accepted a wrong " << what;
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what_without_backtrace(), testing::StartsWith("[test] " + what));
    }
  };
  const auto with = [](torch::IntArrayRef shape, double value) {
    auto t = torch::full(shape, 0.5);
    t.view(-1)[-1] = value;
    return t;
  };
  check_conditioning_values({}, "test");
  check_conditioning_values({.context = with({1, 3, 4}, 1e30),
                             .y = with({1, 4}, -7),
                             .extra = {{"ids", torch::ones({1, 2}, torch::kLong)}},
                             .mask = with({3, 4}, 1)},
                            "test");
  for (const double bad : {double(NAN), double(INFINITY), -double(INFINITY)}) {
    refuses({.context = with({1, 3, 4}, bad)}, "context must be finite");
    refuses({.y = with({1, 4}, bad)}, "y must be finite");
    refuses({.concat = with({1, 5, 3, 4}, bad)}, "concat must be finite");
    refuses({.extra = {{"c", with({1, 4}, bad)}}}, "extra input \"c\" must be finite");
    refuses({.mask = with({3, 4}, bad)}, "mask must be finite");
  }
  refuses({.mask = with({3, 4}, 1.001)}, "mask must be between 0 and 1, got 0.5 to 1.001");
  refuses({.mask = with({3, 4}, -0.1)}, "mask must be between 0 and 1, got -0.1");
  refuses({.context = torch::zeros({3, 4})}, "context must have shape");
  refuses({.y = torch::zeros({4})}, "y must have shape");
}

// diffusers' get_guidance_scale_embedding(w, size) with w = guidance_scale − 1.
TEST(GuidanceScaleEmbedding, GivesDiffusersNumbers) {
  const auto eight = guidance_scale_embedding(8.5, 8);
  EXPECT_LT(test::max_diff(
                eight, torch::tensor({{-0.85123587f, 0.56267112f, -0.43523303f, 0.68163872f,
                                       -0.52478325f, -0.82668084f, -0.90031785f, 0.73168892f}})),
            1e-6);
  EXPECT_EQ(eight.scalar_type(), torch::kFloat);
  const auto odd = guidance_scale_embedding(8.5, 9);
  EXPECT_TRUE(odd.narrow(1, 0, 8).equal(eight));
  EXPECT_EQ(odd[0][8].item<double>(), 0);
  EXPECT_THROW(guidance_scale_embedding(NAN, 8), c10::ValueError);
  EXPECT_THROW(guidance_scale_embedding(8, 3), c10::ValueError);
}

}  // namespace
}  // namespace sag

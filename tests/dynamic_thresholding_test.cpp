// Dynamic thresholding, against its formula in fp64, cell by cell.

#include <algorithm>
#include <cmath>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/dynamic_thresholding.h"
#include "support/device.h"
#include "support/error.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;
using testing::HasSubstr;

constexpr double kScale = 7, kSigma = 0.75, kStretch = 1.25;

using Numbers = std::vector<double>;

double mean_of(const Numbers& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

// The magnitudes of the values less their mean, sorted.
Numbers distances(const Numbers& values) {
  const double mean = mean_of(values);
  Numbers sorted;
  for (const double v : values) sorted.push_back(std::abs(v - mean));
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

// Between two values as much of each as the rank says.
double quantile_of(const Numbers& sorted, double p) {
  const double rank = p * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(rank);
  const auto above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (rank - std::floor(rank)) * (sorted[above] - sorted[below]);
}

// One channel of one image.
Numbers expected_channel(const Numbers& d, const Numbers& cond, const Numbers& uncond,
                         const DynamicThresholdingOptions& options) {
  Numbers mimic, result;
  for (std::size_t i = 0; i < d.size(); ++i)
    mimic.push_back(uncond[i] + options.mimic_scale * (cond[i] - uncond[i]));
  const double aim = distances(mimic).back(), mean = mean_of(d);
  const double limit = std::max(aim, quantile_of(distances(d), options.threshold_percentile));
  for (const double v : d) {
    const double clamped = std::min(std::max(v - mean, -limit), limit);
    result.push_back(mean + (limit > 0 ? clamped / limit * aim : 0));
  }
  return result;
}

Numbers channel_of(const torch::Tensor& t, std::int64_t image, std::int64_t channel) {
  const auto flat = t[image][channel].to(torch::kCPU, torch::kDouble).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

// The toy's prompts only shift what it predicts. Here they stretch it, too.
ModelPatcher stretched(ModelPatcher model) {
  model.set_pre_cfg_function([](const CfgArgs& args) -> CfgPredictions {
    return {args.cond_denoised * kStretch, args.uncond_denoised};
  });
  return model;
}

class DynamicThresholdingOn : public test::BackendTest {
 protected:
  ModelPatcher model(ModelSampling sampling = ModelSampling::discrete()) const {
    return stretched({std::make_shared<test::ToyUNet>(device()), std::move(sampling)});
  }
  torch::Tensor x(torch::ScalarType dtype = torch::kFloat) const {
    return test::fill({2, 4, 13, 19}, .262, .3, 6).to(device(), dtype);
  }
  torch::Tensor denoise(const ModelPatcher& patched, const torch::Tensor& at) const {
    CfgGuider guider(patched, {toy_prompt(1, device())}, {toy_prompt(-1, device())},
                     {.cond_scale = kScale});
    return guider(at, kSigma);
  }
  // Compares with the formula at every cell.
  void expect_formula(const ModelPatcher& base, const torch::Tensor& at,
                      const DynamicThresholdingOptions& options) const {
    const auto guided = denoise(apply_dynamic_thresholding(base, options), at);
    const auto so_far = denoise(base, at);
    const auto cond = kStretch * base.denoiser()(at, kSigma, toy_prompt(1, device()));
    const auto uncond = base.denoiser()(at, kSigma, toy_prompt(-1, device()));
    for (std::int64_t i = 0; i < at.size(0); ++i)
      for (std::int64_t c = 0; c < at.size(1); ++c) {
        const auto expected = expected_channel(channel_of(so_far, i, c), channel_of(cond, i, c),
                                               channel_of(uncond, i, c), options);
        const auto result = channel_of(guided, i, c);
        double apart = 0;
        for (std::size_t cell = 0; cell < result.size(); ++cell)
          apart = std::max(apart, std::abs(result[cell] - expected[cell]));
        EXPECT_LT(apart, 1e-4) << "image " << i << ", channel " << c << ", mimic "
                               << options.mimic_scale << ", percentile "
                               << options.threshold_percentile;
      }
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, DynamicThresholdingOn, test::backends());

TEST_P(DynamicThresholdingOn, IsItsFormula) {
  for (const auto& sampling :
       {ModelSampling::discrete(), ModelSampling::discrete(Prediction::v), ModelSampling::flow()})
    for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16})
      for (const double mimic_scale : {0.0, 3.0, 7.0, 12.0})
        for (const double percentile : {1.0, 0.9, 0.37, 0.0})
          expect_formula(model(sampling), x(dtype),
                         {.mimic_scale = mimic_scale, .threshold_percentile = percentile});
}

TEST_P(DynamicThresholdingOn, ActsOnWhatOthersMade) {
  auto base = model();
  base.set_cfg_function(
      [](const CfgArgs& args) { return args.uncond_denoised - 2 * args.cond_denoised; });
  base.set_post_cfg_function(
      [](const PostCfgArgs& args) { return args.denoised + 3 * args.x.flip({3}) * args.x; });
  expect_formula(base, x(), {.mimic_scale = 3, .threshold_percentile = 0.9});
}

TEST_P(DynamicThresholdingOn, LowersTheSpreadAndKeepsTheMeans) {
  const auto plain = denoise(model(), x());
  const auto guided = denoise(apply_dynamic_thresholding(model(), {.mimic_scale = 3}), x());
  const auto mean = [](const torch::Tensor& t) { return t.mean(at::IntArrayRef{2, 3}); };
  EXPECT_LT(max_diff(mean(guided), mean(plain)), 1e-4);
  EXPECT_TRUE((guided.amax({2, 3}) < plain.amax({2, 3})).all().item<bool>());
  EXPECT_TRUE((guided.amin({2, 3}) > plain.amin({2, 3})).all().item<bool>());
}

TEST_P(DynamicThresholdingOn, LeavesWhatSpreadsLessThanItsScale) {
  const auto plain = denoise(model(), x());
  for (const double mimic_scale : {kScale, 12.0})
    EXPECT_LT(
        max_diff(denoise(apply_dynamic_thresholding(model(), {.mimic_scale = mimic_scale}), x()),
                 plain),
        2e-5);
}

class DynamicThresholding : public testing::Test {
 protected:
  ModelPatcher base{std::make_shared<test::ToyUNet>(), ModelSampling::discrete()};
  torch::Tensor x = test::fill({2, 4, 16, 24}, .262, .3, 6);
};

TEST_F(DynamicThresholding, SaysWhereThereIsNothingToGuide) {
  using Conds = std::vector<Conditioning>;
  const auto reason = [&](const ModelPatcher& model, const Conds& positive, const Conds& negative,
                          double cond_scale) {
    CfgGuider guider(model, positive, negative, {.cond_scale = cond_scale});
    CfgGuider plain(base, positive, negative, {.cond_scale = cond_scale});
    EXPECT_TRUE(torch::equal(guider(x, 4), plain(x, 4)));
    const auto note = guider.report().evaluations.front().guidances.at(0);
    EXPECT_EQ(note.name, "dynamic_thresholding");
    EXPECT_FALSE(note.guided);
    return note.reason;
  };
  const auto model = apply_dynamic_thresholding(base, {.mimic_scale = 1});
  const Conds cond = {toy_prompt(1)}, uncond = {toy_prompt(-1)};
  EXPECT_EQ(reason(model, cond, uncond, 1), "cond_scale is 1");
  EXPECT_EQ(reason(model, cond, {}, 7), "there is no unconditional prediction at this sigma");
  EXPECT_EQ(reason(model, {}, uncond, 7), "there is no conditional prediction at this sigma");
  EXPECT_EQ(reason(apply_dynamic_thresholding(base, {.window = {.sigma_end = 5}}), cond, uncond, 7),
            "sigma is outside the window");
}

TEST_F(DynamicThresholding, SaysThatItGuided) {
  CfgGuider guider(apply_dynamic_thresholding(base), {toy_prompt(1)}, {toy_prompt(-1)},
                   {.cond_scale = 7});
  guider(x, 4);
  EXPECT_TRUE(guider.report().evaluations.front().guidances.at(0).guided);
}

TEST_F(DynamicThresholding, LeavesFlatChannelsAsTheyAre) {
  const auto flat = torch::zeros({2, 4, 8, 8});
  const auto result = [&](const ModelPatcher& model) {
    return CfgGuider(model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7})(flat, 4);
  };
  EXPECT_LT(max_diff(result(apply_dynamic_thresholding(base)), result(base)), 1e-5);
}

TEST_F(DynamicThresholding, RefusesOptionsThatCannotBe) {
  const auto error = [&](const DynamicThresholdingOptions& options) {
    return test::error_of<c10::ValueError>([&] { apply_dynamic_thresholding(base, options); });
  };
  EXPECT_THAT(error({.mimic_scale = -1}), HasSubstr("mimic_scale must be finite and at least 0"));
  EXPECT_THAT(error({.mimic_scale = std::nan("")}), HasSubstr("mimic_scale must be finite"));
  EXPECT_THAT(error({.threshold_percentile = 1.5}),
              HasSubstr("threshold_percentile must be between 0 and 1"));
  EXPECT_THAT(error({.window = {.start_percent = 2}}), HasSubstr("must be in [0, 1]"));
}

}  // namespace
}  // namespace sag

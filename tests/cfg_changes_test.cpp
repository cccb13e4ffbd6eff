// Guidances that need no rows: APG, CFG-Zero* and CFG rescale, against their formulas in fp64, cell
// by cell.

#include <cmath>
#include <functional>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/adaptive_projected_guidance.h"
#include "sag/cfg_guider.h"
#include "sag/cfg_zero_star.h"
#include "sag/rescale_cfg.h"
#include "support/device.h"
#include "support/error.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;
using testing::HasSubstr;

constexpr double kScale = 7;

using Numbers = std::vector<double>;

// The latent of one image.
Numbers numbers_of(const torch::Tensor& t, std::int64_t image) {
  const auto flat = t[image].to(torch::kCPU, torch::kDouble).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

double dot(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double deviation(const Numbers& a) {
  double mean = 0, sum = 0;
  for (const double v : a) mean += v / static_cast<double>(a.size());
  for (const double v : a) sum += (v - mean) * (v - mean);
  return std::sqrt(sum / static_cast<double>(a.size() - 1));
}

Numbers combine(const Numbers& a, const Numbers& b,
                const std::function<double(double, double)>& of) {
  Numbers result;
  for (std::size_t i = 0; i < a.size(); ++i) result.push_back(of(a[i], b[i]));
  return result;
}

double apart(const torch::Tensor& t, std::int64_t image, const Numbers& expected) {
  double largest = 0;
  const auto given = numbers_of(t, image);
  for (std::size_t i = 0; i < given.size(); ++i)
    largest = std::max(largest, std::abs(given[i] - expected[i]));
  return largest;
}

ModelSampling sampling_of(Prediction prediction) {
  if (prediction == Prediction::edm) return ModelSampling::edm();
  if (prediction == Prediction::flow) return ModelSampling::flow();
  return ModelSampling::discrete(prediction);
}

class CfgChangesOn : public test::BackendTest {
 protected:
  ModelPatcher model(Prediction prediction = Prediction::eps) const {
    return {std::make_shared<test::ToyUNet>(device()), sampling_of(prediction)};
  }
  Conditioning prompt(double value) const { return toy_prompt(value, device()); }
  torch::Tensor x(double phase = .3) const {
    return test::fill({3, 4, 12, 17}, .262, phase, 6).to(device());
  }
  torch::Tensor prediction(const ModelPatcher& base, const torch::Tensor& at, double sigma,
                           double prompted) const {
    return base.denoiser()(at, sigma, prompt(prompted));
  }
  torch::Tensor denoise(const ModelPatcher& patched, const torch::Tensor& at, double sigma) const {
    CfgGuider guider(patched, {prompt(1)}, {prompt(-1)}, {.cond_scale = kScale});
    guider.begin_run({sigma, sigma / 2, 0});
    return guider(at, sigma);
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, CfgChangesOn, test::backends());

// Algorithm 1 of the paper, over a run of three steps, the second of them evaluated twice.
TEST_P(CfgChangesOn, ApgIsItsAlgorithmThroughARun) {
  const double eta = 0.25, r = 4, beta = -0.5;
  const auto base = model();
  CfgGuider guider(
      apply_adaptive_projected_guidance(base, {.eta = eta, .norm_threshold = r, .momentum = beta}),
      {prompt(1)}, {prompt(-1)}, {.cond_scale = kScale});
  const auto expect_run = [&] {
    std::vector<Numbers> kept(3);
    guider.begin_run({8, 4, 2, 0});
    std::vector<Numbers> before = kept;
    for (const auto& [sigma, phase] : {std::pair{8.0, .3}, {4.0, .9}, {4.0, 1.4}, {2.0, .1}}) {
      const auto at = x(phase);
      const auto guided = guider(at, sigma);
      const auto c = prediction(base, at, sigma, 1), u = prediction(base, at, sigma, -1);
      // The second evaluation of a step starts from the step before, too.
      if (sigma == 2.0 || phase == .9) before = kept;
      for (std::int64_t i = 0; i < 3; ++i) {
        const auto cond = numbers_of(c, i);
        auto d = combine(cond, numbers_of(u, i), [](double a, double b) { return a - b; });
        const auto& last = before[static_cast<std::size_t>(i)];
        if (!last.empty()) d = combine(d, last, [&](double a, double b) { return a + beta * b; });
        kept[static_cast<std::size_t>(i)] = d;
        const double shrink = std::min(1.0, r / std::sqrt(dot(d, d)));
        const double share = shrink * dot(d, cond) / dot(cond, cond);
        const auto expected = combine(d, cond, [&](double a, double b) {
          const double along = share * b;
          return b + (kScale - 1) * (shrink * a - along + eta * along);
        });
        EXPECT_LT(apart(guided, i, expected), 2e-4) << "sigma " << sigma << ", image " << i;
      }
    }
  };
  expect_run();
  // A second run starts without what the first one kept.
  expect_run();
}

TEST_P(CfgChangesOn, ApgWithNothingToDoIsCfg) {
  const auto base = model();
  const auto apg =
      apply_adaptive_projected_guidance(base, {.eta = 1, .norm_threshold = 0, .momentum = 0});
  EXPECT_LT(max_diff(denoise(apg, x(), 4), denoise(base, x(), 4)), 1e-4);
}

TEST_P(CfgChangesOn, CfgZeroStarIsItsFormulaInTheModelsOwnSpace) {
  for (const auto prediction_type :
       {Prediction::eps, Prediction::v, Prediction::x0, Prediction::edm, Prediction::flow}) {
    const auto base = model(prediction_type);
    const double sigma = 0.75;
    const auto& sampling = base.model_sampling();
    const auto guided = denoise(apply_cfg_zero_star(base), x(), sigma);
    const auto output = [&](double prompted) {
      auto conditioned = prompt(prompted);
      const auto zero = torch::zeros_like(x());
      const auto at_0 = sampling.calculate_denoised(sigma, zero, x());
      const auto at_1 = sampling.calculate_denoised(sigma, zero + 1, x());
      return (prediction(base, x(), sigma, prompted) - at_0) / (at_1 - at_0);
    };
    const auto c = output(1), u = output(-1);
    for (std::int64_t i = 0; i < 3; ++i) {
      const auto cond = numbers_of(c, i), uncond = numbers_of(u, i);
      const double alpha = dot(cond, uncond) / dot(uncond, uncond);
      const auto v = combine(
          cond, uncond, [&](double a, double b) { return alpha * b + kScale * (a - alpha * b); });
      const auto tensor = torch::tensor(v, torch::kDouble).view(x()[i].sizes());
      const auto expected =
          sampling.calculate_denoised(sigma, tensor, x()[i].to(torch::kCPU, torch::kDouble));
      EXPECT_LT(max_diff(guided[i], expected), 2e-4)
          << to_string(prediction_type) << ", image " << i;
    }
  }
}

// x does not move where the output is 0: the flow model's denoised latent is x.
TEST_P(CfgChangesOn, CfgZeroStarLeavesXInItsFirstSteps) {
  const auto base = model(Prediction::flow);
  CfgGuider guider(apply_cfg_zero_star(base, {.zero_init_steps = 1}), {prompt(1)}, {prompt(-1)},
                   {.cond_scale = kScale});
  guider.begin_run({0.9, 0.5, 0});
  EXPECT_LT(max_diff(guider(x(), 0.9), x()), 1e-5);
  EXPECT_GT(max_diff(guider(x(), 0.5), x()), 0.1);
}

TEST_P(CfgChangesOn, RescaleGivesTheResultTheConditionalSpread) {
  for (const auto prediction_type : {Prediction::eps, Prediction::v, Prediction::flow})
    for (const double phi : {1.0, 0.7}) {
      const auto base = model(prediction_type);
      const double sigma = 0.75;
      const auto guided = denoise(apply_rescale_cfg(base, {.multiplier = phi}), x(), sigma);
      const auto plain = denoise(base, x(), sigma);
      const auto cond = prediction(base, x(), sigma, 1);
      const bool flow = prediction_type == Prediction::flow;
      const double s = std::sqrt(sigma * sigma + 1);
      // In v: (x/(σ² + 1) − D) · √(σ² + 1)/σ, or a flow model's (x − D)/σ.
      const auto v = [&](const torch::Tensor& denoised, std::int64_t i) {
        return combine(numbers_of(x(), i), numbers_of(denoised, i), [&](double a, double b) {
          return flow ? (a - b) / sigma : (a / (s * s) - b) * s / sigma;
        });
      };
      for (std::int64_t i = 0; i < 3; ++i) {
        const auto wide = v(plain, i);
        const double factor = phi * deviation(v(cond, i)) / deviation(wide) + 1 - phi;
        const auto expected = combine(numbers_of(x(), i), wide, [&](double a, double b) {
          return flow ? a - sigma * factor * b : a / (s * s) - factor * b * sigma / s;
        });
        EXPECT_LT(apart(guided, i, expected), 2e-4) << to_string(prediction_type);
      }
    }
}

class CfgChanges : public testing::Test {
 protected:
  ModelPatcher base{std::make_shared<test::ToyUNet>(), ModelSampling::discrete()};
  torch::Tensor x = test::fill({2, 4, 16, 24}, .262, .3, 6);
};

TEST_F(CfgChanges, SayWhereThereIsNothingToGuide) {
  const auto reason = [&](const ModelPatcher& model, const CfgGuiderOptions& options) {
    CfgGuider guider(model, {toy_prompt(1)}, {toy_prompt(-1)}, options);
    CfgGuider plain(base, {toy_prompt(1)}, {toy_prompt(-1)}, options);
    guider.begin_run({4, 0});
    EXPECT_TRUE(torch::equal(guider(x, 4), plain(x, 4)));
    return guider.report().evaluations.front().guidances.at(0).reason;
  };
  EXPECT_EQ(reason(apply_adaptive_projected_guidance(base), {.cond_scale = 1}), "cond_scale is 1");
  EXPECT_EQ(reason(apply_cfg_zero_star(base, {.zero_init_steps = 1}), {.cond_scale = 1}),
            "cond_scale is 1");
  EXPECT_EQ(reason(apply_cfg_zero_star(base, {.window = {.sigma_end = 5}}), {.cond_scale = 7}),
            "sigma is outside the window");
  EXPECT_EQ(reason(apply_rescale_cfg(base, {.multiplier = 0}), {.cond_scale = 7}),
            "multiplier is 0");
}

TEST_F(CfgChanges, RefuseOptionsThatCannotBe) {
  const auto error = [&](const auto& apply) { return test::error_of<c10::ValueError>(apply); };
  EXPECT_THAT(error([&] { apply_adaptive_projected_guidance(base, {.momentum = 1}); }),
              HasSubstr("momentum must be between -1 and 1"));
  EXPECT_THAT(error([&] { apply_adaptive_projected_guidance(base, {.norm_threshold = -1}); }),
              HasSubstr("norm_threshold must be"));
  EXPECT_THAT(error([&] { apply_cfg_zero_star(base, {.zero_init_steps = -1}); }),
              HasSubstr("zero_init_steps must be at least 0"));
  EXPECT_THAT(error([&] { apply_rescale_cfg(base, {.multiplier = 1.5}); }),
              HasSubstr("multiplier must be between 0 and 1"));
  CfgGuider guider(apply_adaptive_projected_guidance(base), {toy_prompt(1)}, {toy_prompt(-1)},
                   {.cond_scale = 7});
  EXPECT_THAT(error([&] { guider(x, 4); }), HasSubstr("call begin_run"));
}

// Latents that are all 0 have no direction and no spread.
TEST_F(CfgChanges, LeaveBlackLatentsFinite) {
  auto model = apply_adaptive_projected_guidance(base, {.momentum = 0});
  model = apply_rescale_cfg(apply_cfg_zero_star(model));
  CfgGuider guider(model, {toy_prompt(0)}, {toy_prompt(0)}, {.cond_scale = 7});
  EXPECT_TRUE(guider(torch::zeros({1, 4, 8, 8}), 4).isfinite().all().item<bool>());
}

}  // namespace
}  // namespace sag

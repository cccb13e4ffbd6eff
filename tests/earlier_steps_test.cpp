// Guidances that compare a step with the ones before it, momentum guidance and SG-prev: against
// their formulas in fp64, and what they keep through a run.

#include <cmath>
#include <functional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/momentum_guidance.h"
#include "sag/sample.h"
#include "sag/self_guidance.h"
#include "support/device.h"
#include "support/error.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr double kScale = 7;
constexpr const char* kFirst = "there is no step before this one";

ModelSampling sampling_of(Prediction prediction) {
  if (prediction == Prediction::edm) return ModelSampling::edm();
  if (prediction == Prediction::flow) return ModelSampling::flow();
  return ModelSampling::discrete(prediction);
}

// One evaluation: at which noise level and where, and whether it is the first one of its step.
struct At {
  double sigma, phase;
  bool first = true;
};

// Three steps, the second of them evaluated twice.
const std::vector<double> kSigmas = {0.9, 0.6, 0.3, 0};
const std::vector<At> kRun = {{0.9, .3}, {0.6, .9}, {0.6, 1.4, false}, {0.3, .1}};

class EarlierStepsOn : public test::BackendTest {
 protected:
  ModelPatcher model(Prediction prediction) const {
    return {std::make_shared<test::ToyUNet>(device()), sampling_of(prediction)};
  }
  torch::Tensor x(double phase, torch::ScalarType dtype = torch::kFloat) const {
    return test::fill({2, 4, 13, 19}, .262, phase, 6).to(device(), dtype);
  }
  CfgGuider guider(const ModelPatcher& patched) const {
    return {patched, {toy_prompt(1, device())}, {toy_prompt(-1, device())}, {.cond_scale = kScale}};
  }
  // What the network itself returns for a prompt, in fp64.
  torch::Tensor output(const ModelPatcher& base, const torch::Tensor& at, double sigma,
                       double prompted) const {
    const auto input = base.denoiser().unet_input(at, sigma, toy_prompt(prompted, device()));
    return base.unet().forward(input).to(torch::kCPU, torch::kDouble);
  }
  // CFG of the network's outputs.
  torch::Tensor cfg(const ModelPatcher& base, const torch::Tensor& at, double sigma) const {
    const auto c = output(base, at, sigma, 1), u = output(base, at, sigma, -1);
    return kScale * c - (kScale - 1) * u;
  }
  torch::Tensor denoised(const ModelPatcher& base, const torch::Tensor& at, double sigma,
                         const torch::Tensor& out) const {
    return base.model_sampling().calculate_denoised(sigma, out, at.to(torch::kCPU, torch::kDouble));
  }
  // Calls `check` for every prediction of models and every dtype of latents.
  void for_each_kind(
      const std::function<void(const ModelPatcher& base, torch::ScalarType dtype)>& check) const {
    for (const auto prediction :
         {Prediction::eps, Prediction::v, Prediction::x0, Prediction::edm, Prediction::flow})
      for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
        SCOPED_TRACE(testing::Message() << to_string(prediction) << ", " << dtype);
        check(model(prediction), dtype);
      }
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, EarlierStepsOn, test::backends());

TEST_P(EarlierStepsOn, MomentumIsItsRecurrenceThroughARun) {
  const double alpha = 0.8, beta = 0.6;
  for_each_kind([&](const ModelPatcher& base, torch::ScalarType dtype) {
    auto guided = guider(apply_momentum_guidance(base, {.momentum = alpha, .ema = beta}));
    const auto expect_run = [&] {
      guided.begin_run(kSigmas);
      // Of every clean latent so far its weight in the average: β^k (1 − β), and β^k of the first.
      std::vector<torch::Tensor> steps;
      for (const auto& [sigma, phase, first] : kRun) {
        const auto at = x(phase, dtype);
        const auto d = denoised(base, at, sigma, cfg(base, at, sigma));
        if (!first) steps.pop_back();
        auto expected = d;
        if (!steps.empty()) {
          auto average = torch::zeros_like(d);
          const auto n = steps.size();
          for (std::size_t k = 0; k < n; ++k)
            average +=
                std::pow(beta, static_cast<double>(n - 1 - k)) * (k == 0 ? 1 : 1 - beta) * steps[k];
          expected = (1 + alpha) * d - alpha * average;
        }
        EXPECT_LT(max_diff(guided(at, sigma), expected), 1e-4) << "sigma " << sigma;
        steps.push_back(d);
      }
    };
    expect_run();
    // A second run starts without what the first one kept.
    expect_run();
  });
}

// As the authors' pipelines do it: the networks' outputs for the prompt, of this step and the last.
TEST_P(EarlierStepsOn, SelfGuidanceIsTheAuthorsFormInTheModelsOwnSpace) {
  const double scale = 3;
  for_each_kind([&](const ModelPatcher& base, torch::ScalarType dtype) {
    auto guided = guider(apply_self_guidance(base, {.scale = scale}));
    const auto expect_run = [&] {
      guided.begin_run(kSigmas);
      torch::Tensor before, latest;
      for (const auto& [sigma, phase, first] : kRun) {
        const auto at = x(phase, dtype);
        const auto c = output(base, at, sigma, 1);
        if (first) before = latest;
        auto out = cfg(base, at, sigma);
        if (before.defined()) out = out + scale * (c - before);
        EXPECT_LT(max_diff(guided(at, sigma), denoised(base, at, sigma, out)), 1e-4)
            << "sigma " << sigma;
        latest = c;
      }
    };
    expect_run();
    expect_run();
  });
}

// Where no other guidance bends the path, the two forms of the formula are one.
TEST_P(EarlierStepsOn, SelfGuidanceOfEulersSecondStepIsTheChangeOfTheCleanLatent) {
  for (const auto prediction : {Prediction::eps, Prediction::flow}) {
    const auto base = model(prediction);
    CfgGuider guided(apply_self_guidance(base, {.scale = 2}), {toy_prompt(1, device())}, {},
                     {.cond_scale = 1});
    guided.begin_run({0.9, 0.5, 0});
    const auto start = x(.3);
    const auto first = guided(start, 0.9);
    const auto next = start + (start - first) / 0.9 * (0.5 - 0.9);
    const auto second = base.denoiser()(next, 0.5, toy_prompt(1, device()));
    EXPECT_LT(max_diff(guided(next, 0.5), second + 2 * (second - first)), 2e-5)
        << to_string(prediction);
  }
}

// The one or the other.
struct Kind {
  std::string name;
  std::function<ModelPatcher(const ModelPatcher&, double scale, const GuidanceWindow&)> apply;
};

void PrintTo(const Kind& kind, std::ostream* out) {
  *out << kind.name;
}

class EarlierSteps : public testing::TestWithParam<Kind> {
 protected:
  ModelPatcher base{std::make_shared<test::ToyUNet>(), ModelSampling::discrete()};

  ModelPatcher apply(double scale = 1, const GuidanceWindow& window = {}) const {
    return GetParam().apply(base, scale, window);
  }
  CfgGuider guider(const ModelPatcher& model) const {
    return {model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = kScale}};
  }
  static torch::Tensor x(double phase, std::int64_t width = 24) {
    return test::fill({2, 4, 16, width}, .262, phase, 6);
  }
  // Why each evaluation did not guide; empty where it did.
  std::vector<std::string> reasons(const CfgGuider& guided) const {
    std::vector<std::string> found;
    for (const auto& evaluation : guided.report().evaluations) {
      const auto& note = evaluation.guidances.at(0);
      EXPECT_EQ(note.name, GetParam().name);
      EXPECT_EQ(note.guided, note.reason.empty());
      found.push_back(note.reason);
    }
    return found;
  }
};
INSTANTIATE_TEST_SUITE_P(
    Kinds, EarlierSteps,
    testing::Values(Kind{"momentum_guidance",
                         [](const auto& model, double scale, const auto& window) {
                           return apply_momentum_guidance(model,
                                                          {.momentum = scale, .window = window});
                         }},
                    Kind{"self_guidance",
                         [](const auto& model, double scale, const auto& window) {
                           return apply_self_guidance(model, {.scale = scale, .window = window});
                         }}),
    [](const auto& info) { return info.param.name; });

TEST_P(EarlierSteps, TheFirstStepIsLeftAndSaysSo) {
  auto guided = guider(apply()), plain = guider(base);
  guided.begin_run({8, 4, 0});
  EXPECT_TRUE(torch::equal(guided(x(.3), 8), plain(x(.3), 8)));
  EXPECT_GT(max_diff(guided(x(.9), 4), plain(x(.9), 4)), 0.1);
  EXPECT_THAT(reasons(guided), ElementsAre(kFirst, ""));
}

TEST_P(EarlierSteps, ANewRunStartsAnew) {
  auto guided = guider(apply());
  const auto run = [&] {
    guided.begin_run({8, 4, 0});
    const auto first = guided(x(.3), 8);
    return torch::stack({first, guided(x(.9), 4)});
  };
  const auto once = run();
  EXPECT_TRUE(torch::equal(run(), once));
  EXPECT_THAT(reasons(guided), ElementsAre(kFirst, ""));
}

TEST_P(EarlierSteps, TwoRunsOfOneModelShareNothing) {
  const auto model = apply();
  auto one = guider(model), other = guider(model);
  one.begin_run({8, 4, 0});
  other.begin_run({8, 4, 0});
  one(x(.3), 8);
  other(x(.9), 4);
  EXPECT_THAT(reasons(other), ElementsAre(kFirst));
}

TEST_P(EarlierSteps, ALatentOfAnotherShapeStartsAnew) {
  auto guided = guider(apply());
  guided.begin_run({8, 4, 2, 0});
  guided(x(.3), 8);
  guided(x(.3, 16), 4);
  guided(x(.9, 16), 2);
  EXPECT_THAT(reasons(guided), ElementsAre(kFirst, kFirst, ""));
}

TEST_P(EarlierSteps, AStepEvaluatedTwiceIsComparedWithTheStepBefore) {
  auto guided = guider(apply());
  guided.begin_run({8, 4, 2, 0});
  guided(x(.3), 8);
  const auto once = guided(x(.9), 4);
  EXPECT_TRUE(torch::equal(guided(x(.9), 4), once));
  guided(x(.1), 2);
  EXPECT_THAT(reasons(guided), ElementsAre(kFirst, "", "", ""));
}

TEST_P(EarlierSteps, GuideEveryEvaluationOfHeunButTheFirst) {
  auto guided = guider(apply());
  const auto result = sample(guided, x(.3), {.sampler = "heun", .schedule = "karras", .steps = 3});
  EXPECT_TRUE(result.isfinite().all().item<bool>());
  EXPECT_THAT(reasons(guided), ElementsAre(kFirst, "", "", "", ""));
}

TEST_P(EarlierSteps, AtScale0AreCfgAndSaySo) {
  auto guided = guider(apply(0)), plain = guider(base);
  for (const double sigma : {8.0, 4.0})
    EXPECT_TRUE(torch::equal(guided(x(sigma), sigma), plain(x(sigma), sigma)));
  for (const auto& reason : reasons(guided)) EXPECT_THAT(reason, HasSubstr(" is 0"));
}

TEST_P(EarlierSteps, CompareWithStepsOutsideOfTheWindow) {
  auto guided = guider(apply(1, {.sigma_start = 5, .sigma_end = 3})), all = guider(apply());
  guided.begin_run({8, 4, 2, 0});
  all.begin_run({8, 4, 2, 0});
  for (const double sigma : {8.0, 4.0, 2.0}) {
    const auto in_window = guided(x(sigma), sigma), everywhere = all(x(sigma), sigma);
    if (sigma == 4) {
      EXPECT_TRUE(torch::equal(in_window, everywhere));
    }
  }
  constexpr const char* kOutside = "sigma is outside the window";
  EXPECT_THAT(reasons(guided), ElementsAre(kOutside, "", kOutside));
}

TEST_P(EarlierSteps, GuideWithoutANegativeAndWithoutAPrompt) {
  for (const bool prompted : {true, false}) {
    std::vector<Conditioning> positive, negative;
    (prompted ? positive : negative) = {toy_prompt(1)};
    CfgGuider guided(apply(), positive, negative, {.cond_scale = 1});
    CfgGuider plain(base, positive, negative, {.cond_scale = 1});
    guided.begin_run({8, 4, 0});
    guided(x(.3), 8);
    EXPECT_GT(max_diff(guided(x(.9), 4), plain(x(.9), 4)), 0.1);
    EXPECT_EQ(guided.report().unet_rows(), 4) << "two images in two steps";
  }
}

TEST_P(EarlierSteps, KeepCopiesOfTheirOwn) {
  for (const auto prediction : {Prediction::eps, Prediction::x0}) {
    base = {std::make_shared<test::ToyUNet>(), ModelSampling::discrete(prediction)};
    const auto second_step = [&](bool overwrite) {
      CfgGuider guided(apply(), {toy_prompt(1)}, {}, {.cond_scale = 1});
      guided.begin_run({8, 4, 0});
      auto first = guided(x(.3), 8);
      if (overwrite) first.zero_();
      return guided(x(.9), 4);
    };
    EXPECT_TRUE(torch::equal(second_step(true), second_step(false))) << to_string(prediction);
  }
}

TEST_P(EarlierSteps, RefuseWhatCannotBe) {
  const auto error = [&](const std::function<void()>& act) {
    return test::error_of<c10::ValueError>(act);
  };
  EXPECT_THAT(error([&] { apply(std::nan("")); }), HasSubstr("must be finite, got"));
  EXPECT_THAT(error([&] { apply(1, {.sigma_start = 1, .sigma_end = 2}); }),
              HasSubstr("sigma_end must be at most sigma_start"));
  auto guided = guider(apply());
  EXPECT_THAT(error([&] { guided(x(.3), 4); }), HasSubstr("call begin_run"));
}

TEST(MomentumGuidance, RefusesAveragesThatAreNone) {
  const ModelPatcher base(std::make_shared<test::ToyUNet>(), ModelSampling::discrete());
  for (const double ema : {-0.1, 1.1, std::nan("")})
    EXPECT_THAT(
        test::error_of<c10::ValueError>([&] { apply_momentum_guidance(base, {.ema = ema}); }),
        HasSubstr("ema must be between 0 and 1"));
}

// A prompt that begins within the run has no output of its own in the step before.
TEST(SelfGuidance, NeverComparesAPromptWithItsNegative) {
  const ModelPatcher base(std::make_shared<test::ToyUNet>(), ModelSampling::discrete());
  auto late = toy_prompt(1);
  late.sigma_start = 5;
  CfgGuider guided(apply_self_guidance(base), {late}, {toy_prompt(-1)}, {.cond_scale = kScale});
  guided.begin_run({16, 8, 4, 2, 0});
  for (const double sigma : {16.0, 8.0, 4.0, 2.0})
    guided(test::fill({1, 4, 16, 24}, .262, sigma, 6), sigma);
  std::vector<std::string> reasons;
  for (const auto& evaluation : guided.report().evaluations)
    reasons.push_back(evaluation.guidances.at(0).reason);
  EXPECT_THAT(reasons, ElementsAre(kFirst, "", kFirst, ""));
}

}  // namespace
}  // namespace sag

// SAG at every k-th step, and with its own rows in the main call.

#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "sag/blur.h"
#include "sag/cfg_guider.h"
#include "sag/samplers.h"
#include "sag/self_attention_guidance.h"
#include "support/denoise.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::max_diff;
using test::toy_prompt;
using test::ToyUNet;
using ::testing::ElementsAre;

const std::vector<double> kSigmas = {10, 4, 1.5, 0.5, 0};

struct Run {
  torch::Tensor samples;
  GuiderReport report;

  std::vector<std::int64_t> rows() const {
    std::vector<std::int64_t> rows;
    for (const auto& evaluation : report.evaluations) rows.push_back(evaluation.unet_rows);
    return rows;
  }
  std::vector<std::int64_t> calls() const {
    std::vector<std::int64_t> calls;
    for (const auto& evaluation : report.evaluations) calls.push_back(evaluation.unet_calls);
    return calls;
  }
  std::vector<bool> guided() const {
    std::vector<bool> guided;
    for (const auto& evaluation : report.evaluations)
      guided.push_back(evaluation.guidances.front().guided);
    return guided;
  }
};

Run run(const std::vector<SelfAttentionGuidanceOptions>& guidances, double cond_scale = 7,
        const char* sampler = "euler", Prediction prediction = Prediction::eps) {
  const bool flow = prediction == Prediction::flow;
  ModelPatcher model(std::make_shared<ToyUNet>(),
                     flow ? ModelSampling::flow({}) : ModelSampling::discrete(prediction));
  for (const auto& options : guidances) model = apply_self_attention_guidance(model, options);
  const auto sigmas = flow ? std::vector<double>{1, .75, .5, .25, 0} : kSigmas;
  CfgGuider guider(model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = cond_scale});
  guider.begin_run(sigmas);
  const auto x = fill({2, 4, 16, 24}, .7, .3, 1.5) * sigmas.front();
  const auto& info = sampler_info(sampler);
  const auto denoise = test::denoise_with(guider, info);
  return {info.sample(denoise, x, sigmas, {.flow = flow}), guider.report()};
}

TEST(SagInterval, GuidesEveryKthStep) {
  const auto every_second = run({{.scale = .75, .interval = 2}});
  EXPECT_THAT(every_second.guided(), ElementsAre(true, false, true, false));
  EXPECT_THAT(every_second.rows(), ElementsAre(6, 4, 6, 4));
  EXPECT_EQ(every_second.report.skipped().at("between guided steps"), 2);
  // The same steps, given by their sigmas.
  const auto named = run({{.scale = .75, .sigma_start = 10, .sigma_end = 10},
                          {.scale = .75, .sigma_start = 1.5, .sigma_end = 1.5}});
  EXPECT_TRUE(every_second.samples.equal(named.samples));
  EXPECT_TRUE(run({{.scale = .75, .interval = 1}}).samples.equal(run({{.scale = .75}}).samples));
}

TEST(SagInterval, CostsNothingBetweenAtCfg1) {
  EXPECT_THAT(run({{.interval = 3}}, 1.0).rows(), ElementsAre(6, 2, 2, 6));
}

TEST(SagInterval, CountsHeunsCorrectorAsTheNextStep) {
  EXPECT_THAT(run({{.interval = 2}}, 7, "heun").guided(),
              ElementsAre(true, false, false, true, true, false, false));
}

// The formula in the header, in a loop of its own.
torch::Tensor one_pass_reference(const SelfAttentionGuidanceOptions& options, double cond_scale,
                                 Prediction prediction) {
  const bool flow = prediction == Prediction::flow;
  const auto sampling = flow ? ModelSampling::flow({}) : ModelSampling::discrete(prediction);
  ModelPatcher model(std::make_shared<ToyUNet>(), sampling);
  torch::Tensor map;
  model.set_attn1_replace(
      [&map](const AttentionCall& call, const Pass&, const NextAttention& next) {
        map = attention_map(call.q, call.k, call.scale);
        return next(call);
      },
      AttentionSite("middle.0.0"));
  CfgGuider cond(model, {toy_prompt(1)}, {}), uncond(model, {}, {toy_prompt(-1)});
  const auto sigmas = flow ? std::vector<double>{1, .75, .5, .25, 0} : kSigmas;
  auto x = fill({2, 4, 16, 24}, .7, .3, 1.5) * sigmas.front();
  torch::Tensor last_change;
  for (std::size_t i = 0; i + 1 < sigmas.size(); ++i) {
    const double sigma = sigmas[i], a = sampling.renoise_scale(sigma);
    const auto c = cond(x, sigma), u = uncond(x, sigma);
    const auto change = create_blur_map(u, map, {.blur_sigma = options.blur_sigma}) - u;
    auto denoised = u + (c - u) * cond_scale;
    if (i % static_cast<std::size_t>(options.interval) == 0) {
      const auto& used = last_change.defined() ? last_change : change;
      denoised = denoised + options.scale * (u + used - uncond(x + a * used, sigma));
    }
    last_change = change;
    x = x + (x - denoised) / sigma * (sigmas[i + 1] - sigma);
  }
  return x;
}

TEST(SagOnePass, IsItsFormula) {
  for (const auto prediction : {Prediction::eps, Prediction::v, Prediction::flow}) {
    for (const std::int64_t interval : {1, 2}) {
      const SelfAttentionGuidanceOptions options{
          .scale = .75, .interval = interval, .one_pass = true};
      const auto expected = one_pass_reference(options, 7, prediction);
      const auto samples = run({options}, 7, "euler", prediction).samples;
      EXPECT_LT(max_diff(samples, expected), 1e-5 * expected.abs().max().item<double>())
          << to_string(prediction) << " " << interval;
    }
  }
}

TEST(SagOnePass, AsksTheUNetOncePerStepAfterTheFirst) {
  const auto one_pass = run({{.one_pass = true}});
  EXPECT_THAT(one_pass.calls(), ElementsAre(2, 1, 1, 1));
  EXPECT_THAT(one_pass.rows(), ElementsAre(6, 6, 6, 6));
  EXPECT_THAT(one_pass.guided(), ElementsAre(true, true, true, true));
}

ModelPatcher one_pass_model() {
  return apply_self_attention_guidance({std::make_shared<ToyUNet>(), ModelSampling::discrete()},
                                       {.one_pass = true});
}

TEST(SagOnePass, BeginsAnewWithASecondRun) {
  const std::vector<double> sigmas = {10, 8, 6, 5, 4, 3, 2, 1, 0};
  CfgGuider guider(one_pass_model(), {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7});
  guider.begin_run(sigmas);
  const auto x = fill({1, 4, 16, 24}, .7, .3, 15);
  const auto first = sample_euler(std::ref(guider), x, sigmas);
  EXPECT_TRUE(sample_euler(std::ref(guider), x, sigmas).equal(first));
}

TEST(SagOnePass, TakesStepsInAnyOrder) {
  const std::vector<double> sigmas = {10, 8, 6, 4, 2, 0};
  CfgGuider guider(one_pass_model(), {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7});
  guider.begin_run(sigmas);
  const auto x = fill({1, 4, 16, 24}, .7, .3, 15);
  for (const double sigma : {10, 6, 4, 8})
    EXPECT_TRUE(guider(x, sigma).isfinite().all().item<bool>()) << sigma;
}

TEST(SagOnePass, TakesTheLatestStepWhetherThatWasGuidedOrNot) {
  const auto both = run({{.interval = 2, .one_pass = true}});
  EXPECT_THAT(both.calls(), ElementsAre(2, 1, 1, 1));
  EXPECT_THAT(both.rows(), ElementsAre(6, 4, 6, 4));
}

TEST(SagOnePass, StartsExactlyInsideItsWindow) {
  const auto windowed = run({{.sigma_start = 5, .one_pass = true}});
  EXPECT_THAT(windowed.calls(), ElementsAre(1, 2, 1, 1));
  EXPECT_THAT(windowed.rows(), ElementsAre(4, 6, 6, 6));
  // Its first guided step is the exact one.
  const auto exact = run({{.sigma_start = 4, .sigma_end = 4}});
  const auto first = run({{.sigma_start = 4, .sigma_end = 4, .one_pass = true}});
  EXPECT_TRUE(first.samples.equal(exact.samples));
}

TEST(SagOnePass, GoesWithOtherGuidances) {
  const auto both = run({{.scale = .5, .one_pass = true}, {.scale = .25}});
  EXPECT_THAT(both.calls(), ElementsAre(3, 2, 2, 2));
  EXPECT_THAT(both.rows(), ElementsAre(8, 8, 8, 8));
  const auto two = run({{.scale = .5, .one_pass = true}, {.scale = .25, .one_pass = true}});
  EXPECT_THAT(two.calls(), ElementsAre(3, 1, 1, 1));
  EXPECT_THAT(two.rows(), ElementsAre(8, 8, 8, 8));
}

TEST(SagOnePass, GoesWithEverySamplerAndKeepsNoTimeOfItsOwn) {
  for (const auto name : sampler_names()) {
    const std::string sampler(name);
    const auto once = run({{.one_pass = true}}, 7, sampler.c_str());
    EXPECT_TRUE(once.samples.isfinite().all().item<bool>()) << sampler;
    EXPECT_TRUE(once.samples.equal(run({{.one_pass = true}}, 7, sampler.c_str()).samples))
        << sampler;
    // One call per evaluation, except before the first δ: step 0 has none, however often it is
    // evaluated.
    const auto& evaluations = once.report.evaluations;
    const auto first_step = std::count_if(
        evaluations.begin(), evaluations.end(),
        [](const EvaluationReport& evaluation) { return evaluation.step_index == 0; });
    EXPECT_EQ(once.report.unet_calls(), static_cast<std::int64_t>(evaluations.size()) + first_step)
        << sampler;
  }
}

TEST(SagOnePass, WantsTheRunsSigmas) {
  for (const SelfAttentionGuidanceOptions& options :
       {SelfAttentionGuidanceOptions{.one_pass = true},
        SelfAttentionGuidanceOptions{.interval = 2}}) {
    const auto model = apply_self_attention_guidance(
        {std::make_shared<ToyUNet>(), ModelSampling::discrete()}, options);
    CfgGuider guider(model, {toy_prompt(1)}, {toy_prompt(-1)});
    const auto x = fill({1, 4, 16, 24}, .7, .3, 15);
    EXPECT_THROW(guider(x, 4), c10::ValueError);
    EXPECT_TRUE(guider.report().evaluations.empty());
    guider.begin_run({4, 0});
    EXPECT_NO_THROW(guider(x, 4));
  }
}

// With η = 1 these evaluate at σ_next itself, except for the last bit, which must not decide the
// step.
TEST(SagInterval, DoesNotDependOnTheLastBitOfASigma) {
  for (const char* sampler : {"dpm_2_ancestral", "dpmpp_2s_ancestral"}) {
    const auto guided = run({{.interval = 2}}, 7, sampler).guided();
    EXPECT_THAT(guided, ElementsAre(true, false, false, true, true, false, false)) << sampler;
  }
}

TEST(SagOnePass, SaysWhyItDidNotGuideAtCfg1) {
  EXPECT_EQ(run({{.interval = 2, .one_pass = true}}, 1).report.skipped().at("between guided steps"),
            2);
}

TEST(Guidance, RefusesRowsInTheNameOfTheMainPass) {
  ModelPatcher early(std::make_shared<ToyUNet>(), ModelSampling::discrete()), again = early;
  early.set_post_cfg_function([](const PostCfgArgs& args) { return args.denoised; },
                              {.early = [](const EarlyArgs& args) {
                                return EarlyRows{Branch::uncond, Owner::main, args.x};
                              }});
  again.set_post_cfg_function(
      [](const PostCfgArgs& args) { return args.predict(args.x, Branch::uncond, Owner()); });
  for (const auto& model : {early, again}) {
    CfgGuider guider(model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7});
    EXPECT_THROW(guider(fill({1, 4, 16, 24}, .7, .3, 15), 4.0), c10::ValueError);
  }
}

TEST(SagInterval, RefusesWhatIsNone) {
  const ModelPatcher model(std::make_shared<ToyUNet>(), ModelSampling::discrete());
  EXPECT_THROW(apply_self_attention_guidance(model, {.interval = 0}), c10::ValueError);
}

}  // namespace
}  // namespace sag

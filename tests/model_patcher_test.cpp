#include "sag/model_patcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/calc_cond_batch.h"
#include "sag/cfg_guider.h"
#include "sag/self_attention_guidance.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

ModelPatcher toy() {
  return {std::make_shared<test::ToyUNet>(), ModelSampling::discrete()};
}

torch::Tensor pass_on(const AttentionCall& call, const Pass&, const NextAttention& next) {
  return next(call);
}

TEST(ModelPatcher, ClonesShareTheModelAndNoPatches) {
  auto model = toy();
  auto clone = model.clone();
  clone.set_attn1_replace(pass_on, {"middle", 0, 0});
  clone.set_post_cfg_function([](const PostCfgArgs& args) { return args.denoised; });
  clone.set_pre_cfg_function([](const CfgArgs& args) {
    return CfgPredictions{args.cond_denoised, args.uncond_denoised};
  });
  clone.set_cfg_function([](const CfgArgs& args) { return args.cond_denoised; });
  EXPECT_EQ(&model.unet(), &clone.unet());
  EXPECT_TRUE(model.attention_hooks().empty() && model.post_cfg_functions().empty() &&
              model.pre_cfg_functions().empty() && !model.cfg_function());

  model.set_post_cfg_function([](const PostCfgArgs& args) { return args.denoised; });
  model.set_post_cfg_function([](const PostCfgArgs& args) { return args.denoised; });
  EXPECT_EQ(clone.post_cfg_functions().size(), 1u);
}

TEST(ModelPatcher, RefusesUnknownSitesAndEmptyFunctions) {
  auto model = toy();
  EXPECT_THROW(model.set_attn1_replace(pass_on, {"middle", 0, 1}), c10::ValueError);
  EXPECT_THROW(model.set_attn1_replace({}, {"middle", 0, 0}), c10::ValueError);
  EXPECT_THROW(model.set_cfg_function({}), c10::ValueError);
  EXPECT_THROW(model.set_pre_cfg_function({}), c10::ValueError);
  EXPECT_THROW(model.set_post_cfg_function({}), c10::ValueError);
  EXPECT_TRUE(model.attention_hooks().empty());
}

TEST(RunContext, ReturnsTheLatestEarlierStepsValue) {
  RunContext run;
  const Owner a("a"), b("b");
  EXPECT_FALSE(run.latest_before(a, 5).defined());
  const auto at = [&](std::int64_t step) { return run.latest_before(a, step).item<double>(); };
  run.keep(a, 0, torch::tensor(0.0));
  run.keep(a, 1, torch::tensor(1.0));
  // Heun evaluates a step twice.
  run.keep(a, 1, torch::tensor(1.5));
  EXPECT_EQ(at(1), 0.0);
  EXPECT_EQ(at(2), 1.5);
  run.keep(a, 4, torch::tensor(4.0));
  EXPECT_EQ(at(9), 4.0);
  EXPECT_FALSE(run.latest_before(b, 9).defined());
  // A new run begins.
  run.keep(a, 7, torch::tensor(7.0));
  run.keep(a, 0, torch::tensor(0.5));
  EXPECT_EQ(at(1), 0.5);
  run.keep(a, 1, torch::tensor(1.25));
  EXPECT_EQ(at(9), 1.25);
}

TEST(DecideSites, ProbesWhereNamesDoNotTell) {
  // Over 8 x 8, 4 x 4 and 8 x 8 cells: "a" and "c" have as few tokens as each other, "b" has more.
  const auto only = std::make_shared<test::ManySitesUNet>(std::vector<std::string>{"a", "b"});
  auto model = apply_self_attention_guidance({only, ModelSampling::discrete()});
  ASSERT_EQ(model.site_choices().size(), 1u);
  EXPECT_EQ(model.site_choices().front().site, "") << "undecided until a latent is known";
  const auto x = test::fill({2, 4, 16, 24}, .7, .3, 1);
  StepContext step(1, 0, 16, 24);
  const std::vector<CondRequest> requests = {{.x = x, .conds = {test::toy_prompt(1)}}};
  EXPECT_THROW(calc_cond_batch(model, requests, 1, step), c10::ValueError)
      << "or its hook would never run";

  CfgGuider guider(model, {test::toy_prompt(1)}, {test::toy_prompt(-1)}, {.cond_scale = 3});
  guider(x, 4);
  guider(x, 2);
  const auto& report = guider.report();
  ASSERT_EQ(report.sites.size(), 1u);
  EXPECT_EQ(report.sites.front().site, "a");
  EXPECT_THAT(report.sites.front().reason, testing::HasSubstr("fewest tokens, 6,"));
  EXPECT_EQ(report.guided(), 2);
  EXPECT_EQ(report.evaluations[0].unet_rows, 7) << "the probe is one row";
  EXPECT_EQ(report.evaluations[1].unet_rows, 6);

  // The same as when the site is named.
  CfgGuider named(apply_self_attention_guidance({only, ModelSampling::discrete()}, {.site = "a"}),
                  {test::toy_prompt(1)}, {test::toy_prompt(-1)}, {.cond_scale = 3});
  EXPECT_TRUE(named(x, 4).equal(guider(x, 4)));
  EXPECT_EQ(named.report().sites.front().reason, "it was named");
}

// Where SAG has nothing to do it costs nothing, and a choice that stays open hurts nobody.
TEST(DecideSites, WaitsForAHookThatIsActive) {
  const auto equal = std::make_shared<test::ManySitesUNet>(std::vector<std::string>{"a", "b", "c"});
  const auto x = test::fill({1, 4, 16, 24}, .7, .3, 1);
  for (const SelfAttentionGuidanceOptions& idle :
       {SelfAttentionGuidanceOptions{.scale = 0}, SelfAttentionGuidanceOptions{.sigma_end = 1e6}}) {
    CfgGuider guider(apply_self_attention_guidance({equal, ModelSampling::discrete()}, idle),
                     {test::toy_prompt(1)}, {test::toy_prompt(-1)}, {.cond_scale = 3});
    guider(x, 4);
    EXPECT_EQ(guider.report().unet_calls(), 1);
    EXPECT_EQ(guider.report().unet_rows(), 2);
  }
}

TEST(DecideSites, SaysWhatTheConditioningMustBe) {
  const auto unet = std::make_shared<test::ManySitesUNet>(std::vector<std::string>{"a", "b"});
  auto prompt = test::toy_prompt(1);
  prompt.extra["size"] = torch::tensor(1.0);
  CfgGuider guider(apply_self_attention_guidance({unet, ModelSampling::discrete()}), {prompt},
                   {test::toy_prompt(-1)}, {.cond_scale = 3});
  EXPECT_THAT(
      [&] {
        guider(test::fill({1, 4, 16, 24}, .7, .3, 1), 4);
      },
      testing::ThrowsMessage<c10::ValueError>(testing::HasSubstr("\"size\"")));
}

TEST(DecideSites, RefusesToGuess) {
  const auto equal = std::make_shared<test::ManySitesUNet>(std::vector<std::string>{"a", "b", "c"});
  CfgGuider guider(apply_self_attention_guidance({equal, ModelSampling::discrete()}),
                   {test::toy_prompt(1)}, {test::toy_prompt(-1)}, {.cond_scale = 3});
  EXPECT_THAT(
      [&] {
        guider(test::fill({1, 4, 16, 24}, .7, .3, 1), 4);
      },
      testing::ThrowsMessage<c10::ValueError>(testing::HasSubstr("a with 6 tokens")));
}

}  // namespace
}  // namespace sag

#include "sag/model_patcher.h"

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
  run.keep(a, 1, torch::tensor(1.5));  // Heun evaluates a step twice
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

}  // namespace
}  // namespace sag

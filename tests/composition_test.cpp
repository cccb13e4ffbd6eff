// SAG with other guidances, hooks and functions: each as if alone, in the order given.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "sag/blur.h"
#include "sag/cfg_guider.h"
#include "sag/self_attention_guidance.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;

constexpr double kSigma = 4;

class Composition : public testing::Test {
 protected:
  torch::Tensor denoise(const ModelPatcher& model) const {
    return CfgGuider(model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7})(x, kSigma);
  }
  torch::Tensor prediction(double prompt) const {
    return base.denoiser()(x, kSigma, toy_prompt(prompt));
  }

  ModelPatcher base{std::make_shared<test::ManySitesUNet>(
                        std::vector<std::string>{"middle.0.0", "middle.0.1", "output.3.0"}),
                    ModelSampling::discrete()};
  torch::Tensor x = test::fill({2, 4, 16, 24}, .262, .3, 6);
  SelfAttentionGuidanceOptions middle{.scale = .75};
  SelfAttentionGuidanceOptions output{
      .scale = .25, .blur_sigma = 1, .site = AttentionSite("output", 3, 0)};
};

TEST_F(Composition, TwoSagsAtDifferentSitesAddUp) {
  const auto plain = denoise(base);
  const auto by_middle = denoise(apply_self_attention_guidance(base, middle)) - plain;
  const auto by_output = denoise(apply_self_attention_guidance(base, output)) - plain;
  EXPECT_GT(max_diff(by_middle, by_output), 0.1) << "they do different things";
  const auto expected = plain + by_middle + by_output;
  EXPECT_LT(max_diff(denoise(apply_self_attention_guidance(
                         apply_self_attention_guidance(base, middle), output)),
                     expected),
            1e-4);
  EXPECT_LT(max_diff(denoise(apply_self_attention_guidance(
                         apply_self_attention_guidance(base, output), middle)),
                     expected),
            1e-4);
}

TEST_F(Composition, TwoSagsEachHaveTheirNoteAndTheirRow) {
  const auto both =
      apply_self_attention_guidance(apply_self_attention_guidance(base, middle), output);
  CfgGuider guider(both, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7});
  guider(x, kSigma);
  const auto& notes = guider.report().evaluations.front().guidances;
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_TRUE(notes[0].guided && notes[1].guided);
  EXPECT_FALSE(torch::equal(notes[0].mask, notes[1].mask));
  EXPECT_EQ(guider.report().unet_calls(), 3);
}

TEST_F(Composition, AHookThatWatchesTheSameSiteChangesNoBit) {
  const auto expected = denoise(apply_self_attention_guidance(base, middle));
  const auto watched = [&](bool first) {
    std::int64_t calls = 0;
    const auto watch = [&](const AttentionCall& call, const Pass&, const NextAttention& next) {
      ++calls;
      return next(call);
    };
    auto model = base.clone();
    if (first) model.set_attn1_replace(watch, {"middle", 0, 0});
    model = apply_self_attention_guidance(model, middle);
    if (!first) model.set_attn1_replace(watch, {"middle", 0, 0});
    const auto denoised = denoise(model);
    EXPECT_EQ(calls, 2) << "the main pass and SAG's own";
    return denoised;
  };
  EXPECT_TRUE(torch::equal(watched(true), expected));
  EXPECT_TRUE(torch::equal(watched(false), expected));
}

// The first installed is outermost: SAG sees the call as changed by the hooks before it.
TEST_F(Composition, SagSeesTheCallAsHooksBeforeItLeaveIt) {
  const auto flatten = [](const AttentionCall& call, const Pass&, const NextAttention& next) {
    auto changed = call;
    changed.q = call.q * 0.1;
    return next(changed);
  };
  const auto mask_of = [&](const ModelPatcher& model) {
    CfgGuider guider(model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7});
    guider(x, kSigma);
    return guider.report().evaluations.front().guidances.front().mask;
  };
  auto before = base.clone(), after = apply_self_attention_guidance(base, middle);
  before.set_attn1_replace(flatten, {"middle", 0, 0});
  before = apply_self_attention_guidance(before, middle);
  after.set_attn1_replace(flatten, {"middle", 0, 0});

  const auto pooled = torch::avg_pool2d(x / std::sqrt(kSigma * kSigma + 1), 8);
  const auto tokens = pooled.flatten(2).transpose(1, 2);
  const auto expected = [&](double factor) {
    const auto map =
        test::reference_attention_map(test::split_heads(6 * factor * tokens, 2),
                                      test::split_heads(5 * tokens, 2), 1 / std::sqrt(2.0));
    return upsample_attention_map(map, 16, 24) > 1;
  };
  EXPECT_FALSE(torch::equal(expected(1), expected(0.1)));
  EXPECT_TRUE(torch::equal(mask_of(before), expected(0.1)));
  EXPECT_TRUE(torch::equal(mask_of(after), expected(1)));
}

TEST_F(Composition, SagComesOnTopOfACfgFunction) {
  const auto half = [](const CfgArgs& args) {
    return args.uncond_denoised + (args.cond_denoised - args.uncond_denoised) * 3.5;
  };
  const auto by_sag = denoise(apply_self_attention_guidance(base, middle)) - denoise(base);
  auto before = base.clone();
  before.set_cfg_function(half);
  const auto alone = denoise(before);
  EXPECT_LT(max_diff(alone, prediction(-1) + (prediction(1) - prediction(-1)) * 3.5), 1e-4);
  EXPECT_LT(max_diff(denoise(apply_self_attention_guidance(before, middle)), alone + by_sag), 1e-4);
  auto after = apply_self_attention_guidance(base, middle);
  after.set_cfg_function(half);
  EXPECT_LT(max_diff(denoise(after), alone + by_sag), 1e-4);
}

TEST_F(Composition, PostCfgFunctionsRunInOrder) {
  const auto by_sag = denoise(apply_self_attention_guidance(base, middle)) - denoise(base);
  const auto rescale = [](const PostCfgArgs& args) { return args.denoised * 0.5 + 1; };
  auto before = base.clone();
  before.set_post_cfg_function(rescale);
  EXPECT_LT(max_diff(denoise(apply_self_attention_guidance(before, middle)),
                     denoise(base) * 0.5 + 1 + by_sag),
            1e-4);
  auto after = apply_self_attention_guidance(base, middle);
  after.set_post_cfg_function(rescale);
  EXPECT_LT(max_diff(denoise(after), (denoise(base) + by_sag) * 0.5 + 1), 1e-4);
}

// SAG works on the predictions that entered CFG: those that pre-CFG functions returned.
TEST_F(Composition, SagWorksOnWhatPreCfgFunctionsHandOn) {
  const auto change = [](const CfgArgs& args) {
    return CfgPredictions{args.cond_denoised * 0.9, args.uncond_denoised + 0.5};
  };
  std::vector<torch::Tensor> maps;
  auto watched = base.clone();
  watched.set_attn1_replace(
      [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
        for (const auto& rows : pass.rows(Branch::uncond))
          maps.push_back(attention_map(pass.select(rows, call.q), pass.select(rows, call.k)));
        return next(call);
      },
      {"middle", 0, 0});
  denoise(watched);
  const auto c = prediction(1) * 0.9, u = prediction(-1) + 0.5;
  const auto expected = self_attention_guidance(
      u + (c - u) * 7, x, u, maps.at(0),
      [&](const torch::Tensor& again) { return base.denoiser()(again, kSigma, toy_prompt(-1)); },
      {.scale = .75});

  auto before = base.clone();
  before.set_pre_cfg_function(change);
  EXPECT_LT(max_diff(denoise(apply_self_attention_guidance(before, middle)), expected), 1e-4);
  auto after = apply_self_attention_guidance(base, middle);
  after.set_pre_cfg_function(change);
  EXPECT_LT(max_diff(denoise(after), expected), 1e-4);
}

// PAG on several sites: its own pass has v as the attention's output there, and nowhere else.
TEST_F(Composition, APerturbationReallyPerturbsItsOwnPass) {
  const Owner pag("pag");
  std::vector<std::string> perturbed;
  const auto with_pag = [&](const ModelPatcher& model) {
    auto patched = model.clone();
    for (const std::string site : {"middle.0.0", "output.3.0"})
      patched.set_attn1_replace(
          [&, pag, site](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
            if (pass.rows(Branch::cond, pag).empty()) return next(call);
            perturbed.push_back(site);
            return call.v;
          },
          AttentionSite(site));
    patched.set_post_cfg_function([pag](const PostCfgArgs& args) {
      return args.denoised + 3 * (args.cond_denoised - args.predict(args.x, Branch::cond, pag));
    });
    return patched;
  };
  const auto plain = denoise(base);
  const auto by_sag = denoise(apply_self_attention_guidance(base, middle)) - plain;
  const auto by_pag = denoise(with_pag(base)) - plain;
  EXPECT_GT(by_pag.abs().max().item<double>(), 0.1);
  perturbed.clear();
  EXPECT_LT(max_diff(denoise(with_pag(apply_self_attention_guidance(base, middle))),
                     plain + by_sag + by_pag),
            1e-4);
  EXPECT_EQ(perturbed, (std::vector<std::string>{"middle.0.0", "output.3.0"}));
  EXPECT_LT(max_diff(denoise(apply_self_attention_guidance(with_pag(base), middle)),
                     plain + by_sag + by_pag),
            1e-4);
}

// T33 of golden/toy.json: in ComfyUI the more specific of two keys wins; here every hook names one
// attention, and several hooks on one attention run one inside the other.
TEST_F(Composition, HooksOfOneSiteChain) {
  std::vector<std::string> trace;
  const auto named = [&](const std::string& name) {
    return [&trace, name](const AttentionCall& call, const Pass&, const NextAttention& next) {
      trace.push_back(name + " in");
      auto out = next(call);
      trace.push_back(name + " out");
      return out;
    };
  };
  auto model = base.clone();
  model.set_attn1_replace(named("f0"), {"middle", 0, 0});
  model.set_attn1_replace(named("f1"), {"middle", 0, 1});
  model.set_attn1_replace(named("g1"), {"middle", 0, 1});
  denoise(model);
  EXPECT_EQ(trace,
            (std::vector<std::string>{"f0 in", "f0 out", "f1 in", "g1 in", "g1 out", "f1 out"}));
}

}  // namespace
}  // namespace sag

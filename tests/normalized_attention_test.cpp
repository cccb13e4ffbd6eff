// NAG, and the hooks on cross-attention that it needs: against an implementation in two runs, the
// first of which only collects the negative prompt's keys and values.

#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/cuda_graph_unet.h"
#include "sag/normalized_attention_guidance.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/cross_unet.h"
#include "support/device.h"
#include "support/error.h"
#include "support/files.h"
#include "support/reference.h"

namespace sag {
namespace {

using test::CrossLayout;
using test::CrossUNet;
using test::error_of;
using test::max_diff;
using testing::HasSubstr;

constexpr double kSigma = 4;

Conditioning prompt(std::int64_t tokens, double phase, torch::Device device = torch::kCPU,
                    std::int64_t images = 1, std::int64_t width = 6) {
  return {.context = test::fill({images, tokens, width}, 2.1, phase, 1).to(device)};
}

torch::Tensor latent(torch::Device device = torch::kCPU, std::int64_t images = 2) {
  return test::fill({images, 4, 12, 19}, .262, .3, 6).to(device);
}

// Written apart from the library: fp64, the norm over heads and features at once.
torch::Tensor by_formula(const torch::Tensor& plus, const torch::Tensor& minus,
                         const NormalizedAttentionGuidanceOptions& options) {
  const auto away = (1 + options.scale) * plus - options.scale * minus;
  const auto norm = [](const torch::Tensor& z) {
    return at::linalg_vector_norm(z, 1, torch::IntArrayRef{1, 3}, true);
  };
  const auto ratio = norm(away) / norm(plus);
  const auto shorter = torch::where(ratio > options.tau, away * (options.tau / ratio), away);
  return plus + options.alpha * (shorter - plus);
}

torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v) {
  const auto scores = q.matmul(k.transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
  return scores.softmax(-1).matmul(v);
}

// What the model predicts for a prompt with NAG, by two runs of one branch without other guidances.
torch::Tensor in_two_runs(const ModelPatcher& model, const torch::Tensor& x,
                          const Conditioning& positive, const Conditioning& negative,
                          const NormalizedAttentionGuidanceOptions& options) {
  std::map<std::string, std::pair<torch::Tensor, torch::Tensor>> kept;
  auto collects = model.clone(), guides = model.clone();
  for (const auto& site : model.unet().cross_attention_sites()) {
    auto& of_site = kept[site.path];
    collects.set_attn2_replace(
        [&of_site](const AttentionCall& call, const Pass&, const NextAttention& next) {
          of_site = {call.k.to(torch::kDouble), call.v.to(torch::kDouble)};
          return next(call);
        },
        site.path);
    guides.set_attn2_replace(
        [&of_site, options](const AttentionCall& call, const Pass&, const NextAttention&) {
          const auto q = call.q.to(torch::kDouble);
          const auto plus = attend(q, call.k.to(torch::kDouble), call.v.to(torch::kDouble));
          const auto minus = attend(q, of_site.first, of_site.second);
          return by_formula(plus, minus, options).to(call.q.scalar_type());
        },
        site.path);
  }
  CfgGuider(collects, {negative}, {})(x, kSigma);
  return CfgGuider(guides, {positive}, {})(x, kSigma);
}

class NagOn : public test::BackendTest {
 protected:
  ModelPatcher cross(const CrossLayout& layout = {}) const {
    return {std::make_shared<CrossUNet>(layout, device()), ModelSampling::discrete()};
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, NagOn, test::backends());

TEST_P(NagOn, IsItsFormula) {
  const auto model = cross();
  const auto x = latent(device());
  const auto negative = prompt(7, .4, device());
  for (const std::int64_t tokens : {7, 14, 5}) {
    const auto positive = prompt(tokens, 1.1, device());
    for (const auto& options : {NormalizedAttentionGuidanceOptions{.scale = 2},
                                NormalizedAttentionGuidanceOptions{.scale = 9, .tau = 1.2},
                                NormalizedAttentionGuidanceOptions{.scale = 4, .alpha = 1}}) {
      const auto guided = apply_normalized_attention_guidance(model, options);
      const auto cond = in_two_runs(model, x, positive, negative, options);
      const auto plain = CfgGuider(model, {positive}, {})(x, kSigma);
      EXPECT_GT(max_diff(cond, plain), 1e-3);
      // CFG 1: no rows but the conditional ones.
      CfgGuider alone(guided, {positive}, {negative});
      EXPECT_LT(max_diff(alone(x, kSigma), cond), 2e-5) << tokens;
      EXPECT_EQ(alone.report().unet_rows(), 2);
      EXPECT_EQ(alone.report().guided(), 1);
      // Beside CFG.
      const auto uncond = CfgGuider(model, {negative}, {})(x, kSigma);
      CfgGuider both(guided, {positive}, {negative}, {.cond_scale = 5});
      EXPECT_LT(max_diff(both(x, kSigma), uncond + 5 * (cond - uncond)), 2e-4) << tokens;
      EXPECT_EQ(both.report().unet_rows(), 4);
      EXPECT_EQ(both.report().unet_calls(), tokens == 5 ? 2 : 1);
    }
  }
}

TEST_P(NagOn, WorksInEveryLayoutOfAttention) {
  const auto x = latent(device());
  const auto positive = prompt(5, 1.1, device(), 2), negative = prompt(7, .4, device());
  const auto expected = in_two_runs(cross(), x, positive, negative, {});
  for (const auto& layout :
       {CrossLayout{.folded = true}, CrossLayout{.unfused = true}, CrossLayout{.halves = true}}) {
    const auto guided = apply_normalized_attention_guidance(cross(layout));
    EXPECT_LT(max_diff(CfgGuider(guided, {positive}, {negative})(x, kSigma), expected), 2e-5);
    // One row in each call.
    EXPECT_LT(
        max_diff(CfgGuider(guided, {positive}, {negative}, {.max_rows = 1})(x, kSigma), expected),
        2e-5);
  }
}

TEST_P(NagOn, WorksOnFiles) {
  for (const auto* file : {"comfy_sd15_tiny.ts", "comfy_sd2v_tiny.ts", "diffusers_tiny.ts"}) {
    const auto unet = TorchScriptUNet::load(test::kGoldenDir + file, {.device = device()});
    const ModelPatcher model(unet, ModelSampling::discrete());
    const auto x = latent(device()).narrow(2, 0, 8).narrow(3, 0, 16);
    const auto positive = prompt(77, 1.1, device(), 1, 32),
               negative = prompt(77, .4, device(), 1, 32);
    const NormalizedAttentionGuidanceOptions options{.scale = 4};
    const auto cond = in_two_runs(model, x, positive, negative, options);
    EXPECT_GT(max_diff(cond, CfgGuider(model, {positive}, {})(x, kSigma)), 1e-4) << file;
    const auto guided = apply_normalized_attention_guidance(model, options);
    EXPECT_LT(max_diff(CfgGuider(guided, {positive}, {negative})(x, kSigma), cond), 1e-4) << file;
  }
}

TEST_P(NagOn, WorksInHalfPrecision) {
  const auto dtype = device().is_cuda() ? torch::kHalf : torch::kBFloat16;
  const ModelPatcher half(std::make_shared<CrossUNet>(CrossLayout{}, device(), dtype),
                          ModelSampling::discrete());
  const auto x = latent(device());
  const auto positive = prompt(7, 1.1, device()), negative = prompt(7, .4, device());
  const auto expected = in_two_runs(cross(), x, positive, negative, {});
  const auto guided = apply_normalized_attention_guidance(half);
  const auto got = CfgGuider(guided, {positive}, {negative})(x, kSigma);
  EXPECT_LT(max_diff(got, expected), device().is_cuda() ? 0.05 : 0.4);
  EXPECT_TRUE(got.isfinite().all().item<bool>());
}

TEST_P(NagOn, GuidesTheRowsOfOtherGuidances) {
  const auto model = cross();
  const auto x = latent(device());
  const auto positive = prompt(7, 1.1, device()), negative = prompt(7, .4, device());
  const auto run = [&](const ModelPatcher& patched) {
    return CfgGuider(patched, {positive}, {negative}, {.cond_scale = 3})(x, kSigma);
  };
  // PAG's perturbed prediction is one with NAG as well.
  auto perturbed = model.clone();
  perturbed.set_attn1_replace(
      [](const AttentionCall& call, const Pass&, const NextAttention&) { return call.v; },
      "middle.0.0");
  const auto cond = in_two_runs(model, x, positive, negative, {}),
             without = in_two_runs(perturbed, x, positive, negative, {});
  const auto nag = [](const ModelPatcher& m) { return apply_normalized_attention_guidance(m); };
  const auto pag = [](const ModelPatcher& m) {
    return apply_perturbed_attention_guidance(m, {.scale = 2});
  };
  const auto expected = run(nag(model)) + 2 * (cond - without);
  EXPECT_LT(max_diff(run(pag(nag(model))), expected), 2e-4);
  EXPECT_LT(max_diff(run(nag(pag(model))), expected), 2e-4);
  // SAG's rows are unconditional.
  const auto by_sag = run(apply_self_attention_guidance(model)) - run(model);
  EXPECT_LT(max_diff(run(apply_self_attention_guidance(nag(model))), run(nag(model)) + by_sag),
            2e-4);
}

// Several positives of different lengths, one of them on a part of the picture, in one call.
TEST_P(NagOn, GuidesEveryPositiveByItself) {
  const auto model = cross();
  const auto x = latent(device());
  const auto negative = prompt(7, .4, device());
  const auto first = prompt(7, 1.1, device()), second = prompt(14, 2.2, device());
  auto masked = second;
  masked.mask = torch::zeros({12, 19}, device());
  masked.mask.narrow(1, 0, 8).fill_(1);
  const auto by_first = in_two_runs(model, x, first, negative, {}),
             by_second = in_two_runs(model, x, second, negative, {});
  const auto weight = masked.mask / (1 + masked.mask);
  const auto expected = by_first + weight * (by_second - by_first);
  const auto guided = apply_normalized_attention_guidance(model);
  for (const std::int64_t max_rows : {0, 1, 3}) {
    CfgGuider guider(guided, {first, masked}, {negative}, {.max_rows = max_rows});
    EXPECT_LT(max_diff(guider(x, kSigma), expected), 2e-5) << max_rows;
  }
}

// Rows that only fill calls up are nobody's.
TEST_P(NagOn, WorksInFilesOfAFixedNumberOfRows) {
  const auto load = [&](std::int64_t rows) {
    return ModelPatcher(TorchScriptUNet::load(test::kGoldenDir + "comfy_sd15_tiny.ts",
                                              {.device = device(), .rows = rows}),
                        ModelSampling::discrete());
  };
  const auto x = latent(device(), 3).narrow(2, 0, 8).narrow(3, 0, 16);
  const auto positive = prompt(77, 1.1, device(), 1, 32),
             negative = prompt(77, .4, device(), 1, 32);
  const auto run = [&](const ModelPatcher& model) {
    CfgGuider guider(apply_normalized_attention_guidance(model), {positive}, {negative});
    const auto denoised = guider(x, kSigma);
    EXPECT_EQ(guider.report().guided(), 1);
    return denoised;
  };
  EXPECT_LT(max_diff(run(load(2)), run(load(0))), 1e-4);
}

TEST(Nag, ServesSeveralThreads) {
  const auto model = apply_normalized_attention_guidance(
      ModelPatcher(std::make_shared<CrossUNet>(), ModelSampling::discrete()));
  const auto run = [&](std::int64_t i) {
    const auto phase = static_cast<double>(i);
    return CfgGuider(model, {prompt(5 + i, phase)}, {prompt(7, .4)}, {.cond_scale = 3})(latent(),
                                                                                        kSigma);
  };
  std::vector<torch::Tensor> alone, together(8);
  for (std::int64_t i = 0; i < 8; ++i) alone.push_back(run(i));
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < 8; ++i)
    threads.emplace_back([&, i] { together[static_cast<std::size_t>(i)] = run(i); });
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < 8; ++i) EXPECT_EQ(max_diff(together[i], alone[i]), 0) << i;
}

// A negative of two prompts that nobody joined keeps all its keys.
TEST(Nag, LeavesOtherRowsAsTheyAre) {
  const ModelPatcher model(std::make_shared<CrossUNet>(), ModelSampling::discrete());
  auto two = prompt(14, .4);
  two.context_parts = {7, 7};
  const auto own = prompt(7, .9);
  const auto run = [&](const ModelPatcher& patched, double cond_scale) {
    return CfgGuider(patched, {prompt(7, 1.1)}, {two}, {.cond_scale = cond_scale})(latent(),
                                                                                   kSigma);
  };
  const auto guided = apply_normalized_attention_guidance(model, {.negative = own});
  const auto cond = in_two_runs(model, latent(), prompt(7, 1.1), own, {});
  EXPECT_LT(max_diff(run(guided, 0), run(model, 0)), 1e-5) << "unconditional";
  EXPECT_LT(max_diff(run(guided, 1), cond), 2e-5);
}

TEST(Nag, TakesANegativeOfItsOwn) {
  const ModelPatcher model(std::make_shared<CrossUNet>(), ModelSampling::discrete());
  const auto x = latent();
  const auto own = prompt(9, 2.5);
  const auto guided = apply_normalized_attention_guidance(model, {.negative = own});
  const auto expected = in_two_runs(model, x, prompt(7, 1.1), own, {});
  EXPECT_LT(max_diff(CfgGuider(guided, {prompt(7, 1.1)}, {})(x, kSigma), expected), 2e-5);
  EXPECT_LT(max_diff(CfgGuider(guided, {prompt(7, 1.1)}, {prompt(7, .4), prompt(7, .6)})(x, kSigma),
                     expected),
            2e-5);
}

TEST(Nag, WithoutEffectIsThePlainPrediction) {
  const ModelPatcher model(std::make_shared<CrossUNet>(), ModelSampling::discrete());
  const auto run = [&](const ModelPatcher& patched) {
    return CfgGuider(patched, {prompt(7, 1.1)}, {prompt(7, .4)}, {.cond_scale = 4})(latent(),
                                                                                    kSigma);
  };
  EXPECT_LT(max_diff(run(apply_normalized_attention_guidance(model, {.alpha = 0})), run(model)),
            1e-5);
  EXPECT_LT(max_diff(run(apply_normalized_attention_guidance(model, {.scale = 0})), run(model)),
            1e-5);
}

TEST(Nag, SaysWhyItDoesNothing) {
  const ModelPatcher model(std::make_shared<CrossUNet>(), ModelSampling::discrete());
  const auto positive = prompt(7, 1.1), negative = prompt(7, .4);
  auto with_area = negative;
  with_area.area = Area{4, 4, 0, 0};
  const auto check = [&](const NormalizedAttentionGuidanceOptions& options,
                         std::vector<Conditioning> positives, std::vector<Conditioning> negatives,
                         const std::string& reason) {
    const CfgGuiderOptions cfg{.cond_scale = 3};
    CfgGuider guider(apply_normalized_attention_guidance(model, options), positives, negatives,
                     cfg);
    const auto plain = CfgGuider(model, positives, negatives, cfg)(latent(), kSigma);
    EXPECT_EQ(max_diff(guider(latent(), kSigma), plain), 0) << reason;
    EXPECT_THAT(guider.report().skipped(), testing::ElementsAre(testing::Pair(reason, 1)));
  };
  check({.window = {.sigma_start = 3}}, {positive}, {negative}, "sigma is outside the window");
  check({.scale = 0}, {positive}, {negative}, "scale is 0");
  check({.alpha = 0}, {positive}, {negative}, "alpha is 0");
  check({}, {positive}, {}, "there is no negative prompt");
  check({}, {positive}, {negative, negative}, "there are several negative prompts");
  check({}, {positive}, {with_area}, "the negative prompt has an area or a mask");
  check({}, {}, {negative}, "there is no prompt");
  auto ended = negative;
  ended.sigma_end = 5;
  check({}, {positive}, {ended}, "there is no negative prompt");
}

// What would draw both prompts is an error.
TEST(Nag, RefusesWhatCannotTellThePromptsApart) {
  const auto run = [](const ModelPatcher& model) {
    CfgGuider(model, {prompt(7, 1.1)}, {prompt(7, .4)})(latent(), kSigma);
  };
  const auto of = [](const CrossLayout& layout) {
    return apply_normalized_attention_guidance(
        {std::make_shared<CrossUNet>(layout), ModelSampling::discrete()});
  };
  EXPECT_THAT(error_of<c10::Error>([&] { run(of({.skips_one = true})); }),
              HasSubstr("\"output.attn2\" did not"));
  EXPECT_THAT(error_of<c10::Error>([&] { run(of({.masked = true})); }),
              HasSubstr("must have no mask"));
  EXPECT_THAT(error_of<c10::ValueError>([&] { run(apply_normalized_attention_guidance(of({}))); }),
              HasSubstr("must not be joined already"));
  const auto with_negative = [](const Conditioning& negative) {
    return apply_normalized_attention_guidance(
        {std::make_shared<CrossUNet>(), ModelSampling::discrete()}, {.negative = negative});
  };
  EXPECT_THAT(
      error_of<c10::ValueError>([&] { run(with_negative(prompt(7, .4, torch::kCPU, 1, 5))); }),
      HasSubstr("must have the prompts' width, 6, got 5"));
  EXPECT_THAT(error_of<c10::ValueError>([&] { run(with_negative(prompt(7, .4, torch::kCPU, 3))); }),
              HasSubstr("must have 1 or 2 rows"));
  const ModelPatcher toy(std::make_shared<test::ToyUNet>(), ModelSampling::discrete());
  EXPECT_THAT(error_of<c10::ValueError>([&] { apply_normalized_attention_guidance(toy); }),
              HasSubstr("must list its cross-attentions"));
  const ModelPatcher model(std::make_shared<CrossUNet>(), ModelSampling::discrete());
  for (const auto& options :
       {NormalizedAttentionGuidanceOptions{.scale = NAN},
        NormalizedAttentionGuidanceOptions{.tau = 0},
        NormalizedAttentionGuidanceOptions{.alpha = 1.5},
        NormalizedAttentionGuidanceOptions{.window = {.sigma_start = 1, .sigma_end = 2}}})
    EXPECT_THROW(apply_normalized_attention_guidance(model, options), c10::ValueError);
}

TEST(CrossAttentionSites, AreFoundInFilesByTheNamesOfThoseBesideThem) {
  const auto unet = TorchScriptUNet::load(test::kGoldenDir + "comfy_sd15_tiny.ts");
  const auto self = unet->attention_sites(), cross = unet->cross_attention_sites();
  ASSERT_EQ(cross.size(), self.size());
  for (std::size_t i = 0; i < self.size(); ++i) {
    EXPECT_EQ(cross[i].name, self[i].name);
    EXPECT_EQ(cross[i].ordinal, self[i].ordinal + 1);
    EXPECT_TRUE(cross[i].path.ends_with(".attn2"));
  }
  const auto input = UNetInput{.x = torch::zeros({1, 4, 8, 8}),
                               .timesteps = torch::ones({1}),
                               .context = torch::zeros({1, 77, 32})};
  const auto probed = probe_cross_attention_sites(*unet, input),
             beside = probe_attention_sites(*unet, input);
  ASSERT_EQ(probed.size(), cross.size());
  for (std::size_t i = 0; i < probed.size(); ++i) {
    EXPECT_EQ(probed[i].key_tokens, 77);
    EXPECT_EQ(probed[i].tokens, beside[i].tokens);
    EXPECT_EQ(probed[i].heads, beside[i].heads);
  }
}

TEST(CrossAttentionSites, TakeHooksByTheRulesOfSelfAttention) {
  const auto unet = std::make_shared<CrossUNet>();
  const auto x = latent();
  std::vector<std::string> order;
  const auto noting = [&order](const char* name) {
    return [&order, name](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
      order.emplace_back(name);
      EXPECT_EQ(pass.groups.front().context_parts, std::vector<std::int64_t>{7});
      return next(call);
    };
  };
  ModelPatcher model(unet, ModelSampling::discrete());
  auto hooked = model.clone();
  hooked.set_attn2_replace(noting("outer"), {"middle", 0, 0})
      .set_attn2_replace(noting("inner"), "middle")
      .set_attn2_replace(noting("by path"), "output.attn2")
      .set_attn2_replace(noting("by number"), "#2");
  EXPECT_TRUE(hooked.site_choices().empty());
  EXPECT_EQ(max_diff(CfgGuider(hooked, {prompt(7, 1)}, {})(x, kSigma),
                     CfgGuider(model, {prompt(7, 1)}, {})(x, kSigma)),
            0);
  EXPECT_EQ(order, (std::vector<std::string>{"outer", "inner", "by path", "by number"}));
  EXPECT_THAT(error_of<c10::ValueError>([&] { hooked.set_attn2_replace(noting(""), "input.1.0"); }),
              HasSubstr("Its cross-attentions are middle.0.0 (middle.attn2, #1), output.3.0"));
  EXPECT_THROW(hooked.set_attn2_replace({}, "middle"), c10::ValueError);
}

TEST(Conditionings, MayBeChangedBeforeAnEvaluation) {
  const ModelPatcher model(std::make_shared<CrossUNet>(), ModelSampling::discrete());
  auto patched = model.clone();
  patched.set_conditioning_function([](Conditionings prompts, StepContext& step) {
    if (step.sigma() > 3) prompts.positive = {prompt(7, 3)};
    return prompts;
  });
  const auto of = [](const ModelPatcher& m, double phase, double sigma) {
    return CfgGuider(m, {prompt(7, phase)}, {prompt(7, .4)}, {.cond_scale = 3})(latent(), sigma);
  };
  EXPECT_EQ(max_diff(of(patched, 1, 4), of(model, 3, 4)), 0);
  EXPECT_EQ(max_diff(of(patched, 1, 2), of(model, 1, 2)), 0);
  auto wrong = prompt(7, 1);
  wrong.context_parts = {3, 3};
  EXPECT_THAT(error_of<c10::ValueError>([&] { CfgGuider(model, {wrong}, {})(latent(), 4); }),
              HasSubstr("must add up to the context's tokens, 7, got 6"));
}

TEST(NagCuda, IsTheSameInAGraph) {
  SAG_SKIP_WITHOUT_CUDA(torch::Device("cuda"));
  const torch::Device device("cuda");
  const auto unet =
      TorchScriptUNet::load(test::kGoldenDir + "comfy_sd15_tiny.ts", {.device = device});
  const auto graphs = std::make_shared<CudaGraphUNet>(unet);
  const auto x = latent(device).narrow(2, 0, 8).narrow(3, 0, 16);
  const auto run = [&](const std::shared_ptr<const UNet>& network, std::int64_t tokens) {
    const auto model = apply_normalized_attention_guidance({network, ModelSampling::discrete()});
    CfgGuider guider(model, {prompt(77, 1.1, device, 1, 32)}, {prompt(tokens, .4, device, 1, 32)},
                     {.cond_scale = 3});
    guider(x, kSigma);
    const auto second = guider(0.5 * x, kSigma);
    EXPECT_EQ(guider.report().guided(), 2);
    return second;
  };
  for (const std::int64_t tokens : {77, 154})
    EXPECT_LT(max_diff(run(graphs, tokens), run(unet, tokens)), 1e-5) << tokens;
  EXPECT_GE(graphs->report().replays, 4);
  EXPECT_TRUE(graphs->report().eager.empty());
}

}  // namespace
}  // namespace sag

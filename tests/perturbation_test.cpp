// Guidance by perturbed self-attention, PAG and SEG: against the formulas in fp64, on any layout of
// attention, and what they cost.

#include <cmath>
#include <limits>
#include <memory>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "../examples/own_guidance.h"
#include "sag/cfg_guider.h"
#include "sag/cuda_graph_unet.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/smoothed_energy_guidance.h"
#include "support/device.h"
#include "support/error.h"
#include "support/reference.h"
#include "support/token_unets.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;
using testing::HasSubstr;

constexpr double kSigma = 4, kInfinity = std::numeric_limits<double>::infinity();

// What the toy's attention does with q, k and v, [rows, heads, tokens, head_dim], over a grid.
using Attend = std::function<torch::Tensor(const torch::Tensor& q, const torch::Tensor& k,
                                           const torch::Tensor& v, const TokenGrid& grid)>;

torch::Tensor usual(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                    const TokenGrid&) {
  const auto scores = q.matmul(k.transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
  return scores.softmax(-1).matmul(v);
}

torch::Tensor identity(const torch::Tensor&, const torch::Tensor&, const torch::Tensor& v,
                       const TokenGrid&) {
  return v;
}

// Along the last dimension, cell by cell.
torch::Tensor blurred_along(const torch::Tensor& t, double sigma) {
  const auto side = t.size(-1);
  const auto radius = std::min(static_cast<std::int64_t>(std::ceil(6 * sigma)) | 1, side | 1) / 2;
  const auto weight = [sigma](std::int64_t k) {
    return std::exp(-0.5 * static_cast<double>(k * k) / (sigma * sigma));
  };
  double total = 0;
  for (auto k = -radius; k <= radius; ++k) total += weight(k);
  auto blurred = torch::zeros_like(t);
  for (std::int64_t i = 0; i < side; ++i)
    for (auto k = -radius; k <= radius; ++k)
      blurred.select(-1, i) += weight(k) / total * t.select(-1, test::reflect(i + k, side));
  return blurred;
}

Attend smooth(double sigma) {
  return [sigma](const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                 const TokenGrid& grid) {
    if (std::isinf(sigma)) return usual(q.mean(2, true).expand_as(q), k, v, grid);
    const auto picture = q.transpose(2, 3).unflatten(3, {grid.rows, grid.cols});
    const auto down = blurred_along(picture.transpose(3, 4), sigma).transpose(3, 4);
    return usual(blurred_along(down, sigma).flatten(3).transpose(2, 3), k, v, grid);
  };
}

// The toy's eps model in fp64, written again: the clean latent that it predicts.
torch::Tensor predicted(const torch::Tensor& given, double prompt, const Attend& attend) {
  const auto x = given.to(torch::kCPU, torch::kDouble);
  const auto input = x / std::sqrt(kSigma * kSigma + 1);
  const auto pooled = torch::avg_pool2d(input, 8, {}, 0, true);
  const auto tokens = pooled.flatten(2).transpose(1, 2);
  const auto out = attend(test::split_heads(6 * tokens, 2), test::split_heads(5 * tokens, 2),
                          test::split_heads(tokens, 2), {pooled.size(2), pooled.size(3)});
  const auto picture = out.transpose(1, 2).flatten(2).transpose(1, 2).reshape(pooled.sizes());
  const auto up = picture.repeat_interleave(8, 2).repeat_interleave(8, 3);
  const auto eps =
      0.5 * input + 0.3 * up.narrow(2, 0, x.size(2)).narrow(3, 0, x.size(3)) + 0.1 * prompt;
  return x - kSigma * eps;
}

// CFG at 7 and a guidance of scale 3 on top.
torch::Tensor expected(const torch::Tensor& x, const Attend& attend) {
  const auto cond = predicted(x, 1, usual), uncond = predicted(x, -1, usual);
  return uncond + 7 * (cond - uncond) + 3 * (cond - predicted(x, 1, attend));
}

class PerturbationOn : public test::BackendTest {
 protected:
  ModelPatcher base() const {
    return {std::make_shared<test::ToyUNet>(device()), ModelSampling::discrete()};
  }
  torch::Tensor x(std::int64_t height = 20, std::int64_t width = 29) const {
    return test::fill({2, 4, height, width}, .262, .3, 6).to(device());
  }
  torch::Tensor denoise(const ModelPatcher& model, const torch::Tensor& at) const {
    return CfgGuider(model, {toy_prompt(1, device())}, {toy_prompt(-1, device())},
                     {.cond_scale = 7})(at, kSigma);
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, PerturbationOn, test::backends());

TEST_P(PerturbationOn, PagIsItsFormula) {
  const auto by_pag = denoise(apply_perturbed_attention_guidance(base()), x());
  EXPECT_LT(max_diff(by_pag, expected(x(), identity)), 1e-4);
  EXPECT_GT(max_diff(by_pag, expected(x(), usual)), 0.1);
}

// The example of docs/guidances.md.
TEST_P(PerturbationOn, AGuidanceOfOnesOwnIsItsFormula) {
  const Attend uniform = [](const torch::Tensor&, const torch::Tensor&, const torch::Tensor& v,
                            const TokenGrid&) { return v.mean(2, true).expand_as(v); };
  const auto guided = apply_uniform_attention_guidance(base(), 3);
  EXPECT_LT(max_diff(denoise(guided, x()), expected(x(), uniform)), 1e-4);
}

// Wide and thin grids are where a kernel clamped by one side fails.
TEST_P(PerturbationOn, SegIsItsFormulaOnAnyGrid) {
  for (const auto& [height, width] : {std::pair{20, 29}, {8, 61}, {64, 8}, {7, 7}})
    for (const double sigma : {0.3, 1.0, 2.5, 1e9, kInfinity}) {
      const auto at = x(height, width);
      const auto by_seg =
          denoise(apply_smoothed_energy_guidance(base(), {.blur_sigma = sigma}), at);
      EXPECT_LT(max_diff(by_seg, expected(at, smooth(sigma))), 2e-4)
          << height << " x " << width << ", sigma " << sigma;
    }
  const auto apart = max_diff(expected(x(), smooth(1)), expected(x(), smooth(kInfinity)));
  EXPECT_GT(apart, 0.1);
}

// What the guidance adds, beside what CFG's own rounding does.
TEST_P(PerturbationOn, HalfPrecisionIsNear) {
  const ModelPatcher model(std::make_shared<test::ToyUNet>(device(), torch::kBFloat16),
                           ModelSampling::discrete());
  const auto plain = denoise(model, x()).to(torch::kCPU);
  const auto expect_near = [&](const ModelPatcher& guided, const Attend& attend) {
    const auto wanted = expected(x(), attend) - expected(x(), usual);
    EXPECT_LT(max_diff(denoise(guided, x()).to(torch::kCPU) - plain, wanted),
              0.2 * wanted.abs().max().item<double>());
  };
  expect_near(apply_perturbed_attention_guidance(model), identity);
  expect_near(apply_smoothed_energy_guidance(model), smooth(kInfinity));
}

TEST_P(PerturbationOn, DoubleNetworksStayDouble) {
  const ModelPatcher model(std::make_shared<test::ToyUNet>(device(), torch::kDouble),
                           ModelSampling::discrete());
  const auto at = x().to(torch::kDouble);
  EXPECT_LT(
      max_diff(denoise(apply_perturbed_attention_guidance(model), at), expected(at, identity)),
      1e-9);
  for (const double sigma : {1.0, kInfinity})
    EXPECT_LT(max_diff(denoise(apply_smoothed_energy_guidance(model, {.blur_sigma = sigma}), at),
                       expected(at, smooth(sigma))),
              1e-9);
}

// The hooks do not run when a graph is replayed; what they record is.
TEST(PerturbationCuda, IsTheSameInAGraph) {
  const torch::Device cuda(torch::kCUDA);
  SAG_SKIP_WITHOUT_CUDA(cuda);
  const auto eager = std::make_shared<test::ToyUNet>(cuda);
  const auto graphs = std::make_shared<CudaGraphUNet>(std::make_shared<test::ToyUNet>(cuda));
  const auto run = [&](const std::shared_ptr<const UNet>& unet, double s) {
    auto model = apply_perturbed_attention_guidance({unet, ModelSampling::discrete()});
    model = apply_smoothed_energy_guidance(model, {.blur_sigma = 1});
    CfgGuider guider(model, {toy_prompt(1, cuda)}, {toy_prompt(-1, cuda)}, {.cond_scale = 7});
    torch::Tensor out;
    for (int i = 0; i < 3; ++i)
      out = guider(test::fill({2, 4, 20, 29}, .262, s + i, 6).to(cuda), kSigma);
    for (const auto& evaluation : guider.report().evaluations)
      for (const auto& note : evaluation.guidances) EXPECT_TRUE(note.guided) << note.name;
    return out;
  };
  for (const double s : {0.3, 2.0}) EXPECT_LT(max_diff(run(eager, s), run(graphs, s)), 1e-4);
  EXPECT_GT(graphs->report().replays, 0);
  EXPECT_EQ(graphs->report().failure, "");
}

struct Run {
  torch::Tensor denoised;
  EvaluationReport report;
};

Run run_once(const ModelPatcher& model, const torch::Tensor& x, double cond_scale = 7,
             std::int64_t max_rows = 0) {
  CfgGuider guider(model, {toy_prompt(1)}, {toy_prompt(-1)},
                   {.cond_scale = cond_scale, .max_rows = max_rows});
  const auto denoised = guider(x, kSigma);
  return {denoised, guider.report().evaluations.front()};
}

class Perturbations : public testing::Test {
 protected:
  ModelPatcher base{std::make_shared<test::ToyUNet>(), ModelSampling::discrete()};
  torch::Tensor x = test::fill({2, 4, 16, 24}, .262, .3, 6);
};

TEST_F(Perturbations, CostOneRowAnImageInTheMainCall) {
  for (const auto& model :
       {apply_perturbed_attention_guidance(base), apply_smoothed_energy_guidance(base)}) {
    const auto with_cfg = run_once(model, x).report;
    EXPECT_EQ(with_cfg.unet_calls, 1);
    EXPECT_EQ(with_cfg.unet_rows, 6);
    // ComfyUI evaluates unconditional rows here, and uses none.
    EXPECT_EQ(run_once(model, x, 1).report.unet_rows, 4);
  }
  const auto both = apply_smoothed_energy_guidance(apply_perturbed_attention_guidance(base));
  EXPECT_EQ(run_once(both, x).report.unet_calls, 1);
  EXPECT_EQ(run_once(both, x).report.unet_rows, 8);
}

TEST_F(Perturbations, AreTheSameInBatchesOfAnySize) {
  const auto model =
      apply_smoothed_energy_guidance(apply_perturbed_attention_guidance(base), {.blur_sigma = 1});
  const auto whole = run_once(model, x).denoised;
  for (const std::int64_t rows : {1, 2, 3, 5})
    EXPECT_LT(max_diff(run_once(model, x, 7, rows).denoised, whole), 1e-4) << rows;
}

TEST_F(Perturbations, GuideUnconditionalPictures) {
  CfgGuider guider(apply_perturbed_attention_guidance(base, {.scale = 2}), {}, {toy_prompt(-1)});
  const auto uncond = predicted(x, -1, usual);
  EXPECT_LT(max_diff(guider(x, kSigma), uncond + 2 * (uncond - predicted(x, -1, identity))), 1e-4);
  EXPECT_EQ(guider.report().unet_rows(), 4);
}

TEST_F(Perturbations, DoNothingOutsideTheirWindowAndAtScale0) {
  const auto plain = run_once(base, x);
  const auto expect_idle = [&](const ModelPatcher& model, const char* why) {
    const auto idle = run_once(model, x);
    EXPECT_TRUE(torch::equal(idle.denoised, plain.denoised)) << why;
    EXPECT_EQ(idle.report.unet_rows, 4);
    EXPECT_EQ(idle.report.guidances.at(0).reason, why);
  };
  expect_idle(apply_perturbed_attention_guidance(base, {.scale = 0}), "scale is 0");
  expect_idle(apply_smoothed_energy_guidance(base, {.window = {.sigma_start = 3}}),
              "sigma is outside the window");
  expect_idle(apply_perturbed_attention_guidance(base, {.window = {.start_percent = 0.9}}),
              "sigma is outside the window");
}

TEST_F(Perturbations, OfAdaptiveScaleFadeTowardsTheEnd) {
  const auto delta = [&](double adaptive, double sigma) {
    const auto model =
        apply_perturbed_attention_guidance(base, {.scale = 3, .adaptive_scale = adaptive});
    const auto at = [&](const ModelPatcher& m) {
      return CfgGuider(m, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 7})(x, sigma);
    };
    return at(model) - at(base);
  };
  const auto sampling = ModelSampling::discrete();
  const double sigma = sampling.sigma(600);
  EXPECT_LT(max_diff(delta(0.005, sigma), delta(0, sigma) / 3 * (3 - 0.005 * 400)), 1e-4);
  EXPECT_EQ(delta(0.01, sigma).abs().max().item<double>(), 0) << "never below 0";
}

TEST_F(Perturbations, RefuseOptionsThatCannotBe) {
  const auto pag_error = [&](const PerturbedAttentionGuidanceOptions& options) {
    return test::error_of<c10::ValueError>(
        [&] { apply_perturbed_attention_guidance(base, options); });
  };
  EXPECT_THAT(pag_error({.scale = kInfinity}), HasSubstr("scale must be finite"));
  EXPECT_THAT(pag_error({.sites = {}}), HasSubstr("sites must name at least one"));
  EXPECT_THAT(pag_error({.sites = {"no.such"}}), HasSubstr("no.such"));
  EXPECT_THAT(pag_error({.adaptive_scale = -1}), HasSubstr("adaptive_scale must be"));
  EXPECT_THAT(pag_error({.window = {.sigma_start = 1, .sigma_end = 2}}),
              HasSubstr("sigma_end must be at most sigma_start"));
  EXPECT_THAT(pag_error({.window = {.start_percent = 1.5}}), HasSubstr("[0, 1]"));
  for (const double sigma : {0.0, -1.0, std::nan("")})
    EXPECT_THAT(test::error_of<c10::ValueError>(
                    [&] { apply_smoothed_energy_guidance(base, {.blur_sigma = sigma}); }),
                HasSubstr("blur_sigma must be > 0"));
  const ModelPatcher edm(std::make_shared<test::ToyUNet>(), ModelSampling::edm());
  EXPECT_THAT(test::error_of<c10::ValueError>(
                  [&] { apply_perturbed_attention_guidance(edm, {.adaptive_scale = 1}); }),
              HasSubstr("EDM"));
}

// PAG on a transformer with other tokens: those of the picture attend to themselves, and the
// others are left alone. In the toy transformer that is the picture itself.
TEST(PagOnTokens, PerturbsThePicturesAlone) {
  using test::TokenLayout;
  const auto x = test::fill({2, 4, 8, 12}, .262, .3, 1);
  for (const bool unfused : {false, true})
    for (const auto& [layout, tokens] :
         {std::pair{TokenLayout{}, PictureTokens{}},
          {TokenLayout{.before = 1}, PictureTokens{.before = 1}},
          {TokenLayout{.after = 3}, PictureTokens{.after = 3}},
          {TokenLayout{.before = 2, .picture_queries_only = true}, PictureTokens{.before = 2}}}) {
      auto made = layout;
      made.unfused = unfused;
      const ModelPatcher base(std::make_shared<test::TokenUNet>(made), ModelSampling::flow());
      const auto guided = [&](const ModelPatcher& model) {
        return CfgGuider(model, {toy_prompt(1)}, {})(x, 0.5);
      };
      const auto pag = apply_perturbed_attention_guidance(
          base, {.scale = 1, .sites = {"blocks.0"}, .tokens = tokens});
      const auto plain = guided(base);
      const auto pooled = torch::avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3);
      const auto perturbed = x - 0.5 * (0.5 * x + 0.3 * pooled);
      EXPECT_LT(max_diff(guided(pag), plain + (plain - perturbed)), 1e-5)
          << layout.before << " before, " << layout.after << " after, unfused " << unfused;
    }
}

// The class token keeps what it gets without PAG: seen by a hook outside of PAG's.
TEST(PagOnTokens, LeavesTheOthersAlone) {
  const auto x = test::fill({1, 4, 8, 12}, .262, .3, 1);
  ModelPatcher base(std::make_shared<test::TokenUNet>(test::TokenLayout{.before = 1}),
                    ModelSampling::flow());
  torch::Tensor plain, perturbed, v;
  base.set_attn1_replace(
      [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
        const auto out = next(call);
        for (const auto& rows : pass.groups)
          (rows.owner == Owner::main ? plain : perturbed) = pass.select(rows, out);
        v = pass.select(pass.groups.front(), call.v);
        return out;
      },
      "blocks.0");
  const auto pag =
      apply_perturbed_attention_guidance(base, {.sites = {"blocks.0"}, .tokens = {.before = 1}});
  CfgGuider guider(pag, {toy_prompt(1)}, {});
  guider(x, 0.5);
  EXPECT_LT(max_diff(perturbed.narrow(2, 0, 1), plain.narrow(2, 0, 1)), 1e-6);
  const auto picture = v.size(2) - 1;
  EXPECT_TRUE(torch::equal(perturbed.narrow(2, 1, picture), v.narrow(2, 1, picture)));
  EXPECT_FALSE(torch::equal(plain.narrow(2, 1, picture), v.narrow(2, 1, picture)));
}

// Half of what was asked for would be another guidance.
TEST(Perturbation, NeedsAllItsSitesToRun) {
  class OneOfTwo final : public UNet {
   public:
    torch::Tensor forward(const UNetInput& input) const override { return toy_.forward(input); }
    std::vector<AttentionSiteInfo> attention_sites() const override {
      return {{.name = "middle.0.0"}, {.name = "output.3.0"}};
    }
    torch::Device device() const override { return toy_.device(); }
    torch::ScalarType dtype() const override { return toy_.dtype(); }

   private:
    test::ToyUNet toy_;
  };
  const ModelPatcher base(std::make_shared<OneOfTwo>(), ModelSampling::discrete());
  const auto pag =
      apply_perturbed_attention_guidance(base, {.sites = {"middle.0.0", "output.3.0"}});
  const auto x = test::fill({2, 4, 16, 24}, .262, .3, 6);
  const auto once = run_once(pag, x);
  EXPECT_LT(max_diff(once.denoised, run_once(base, x).denoised), 1e-5);
  ASSERT_EQ(once.report.guidances.size(), 1u);
  EXPECT_THAT(once.report.guidances[0].reason, HasSubstr("did not run"));
}

TEST(Perturbation, SaysWhyItCannotGuide) {
  using test::TokenLayout;
  const auto x = test::fill({1, 4, 8, 12}, .262, .3, 1);
  const auto reason = [&](const TokenLayout& layout, const auto& apply) {
    const ModelPatcher base(std::make_shared<test::TokenUNet>(layout), ModelSampling::flow());
    CfgGuider guider(apply(base), {toy_prompt(1)}, {}), plain(base, {toy_prompt(1)}, {});
    EXPECT_TRUE(torch::allclose(guider(x, 0.5), plain(x, 0.5)));
    return guider.report().evaluations.front().guidances.at(0).reason;
  };
  const auto pag = [](const ModelPatcher& base) {
    return apply_perturbed_attention_guidance(base, {.sites = {"blocks.0"}});
  };
  const auto seg = [](const ModelPatcher& base) {
    return apply_smoothed_energy_guidance(base, {.sites = {"blocks.0"}});
  };
  EXPECT_THAT(reason({.before = 1, .picture_queries_only = true}, pag),
              HasSubstr("is not self-attention"));
  EXPECT_THAT(reason({.before = 1}, seg), HasSubstr("no grid of the 8 x 12 latent"));
  EXPECT_THAT(reason({.unfused = true}, seg), HasSubstr("shows no queries"));
  const auto elsewhere = [](const ModelPatcher& base) {
    return apply_perturbed_attention_guidance(base, {.sites = {"middle.0.0"}});
  };
  class NothingRuns final : public UNet {
   public:
    torch::Tensor forward(const UNetInput& input) const override { return 0.5 * input.x; }
    std::vector<AttentionSiteInfo> attention_sites() const override {
      return {{.name = "middle.0.0"}};
    }
    torch::Device device() const override { return torch::kCPU; }
    torch::ScalarType dtype() const override { return torch::kFloat; }
  };
  const ModelPatcher idle(std::make_shared<NothingRuns>(), ModelSampling::flow());
  CfgGuider guider(elsewhere(idle), {toy_prompt(1)}, {});
  guider(x, 0.5);
  EXPECT_THAT(guider.report().evaluations.front().guidances.at(0).reason, HasSubstr("did not run"));
}

}  // namespace
}  // namespace sag

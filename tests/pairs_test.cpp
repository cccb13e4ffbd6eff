// Every pair of guidances, in both orders: the second one does to the first one's result what it
// does to that result alone.

#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/adaptive_projected_guidance.h"
#include "sag/cfg_guider.h"
#include "sag/cfg_zero_star.h"
#include "sag/dynamic_thresholding.h"
#include "sag/momentum_guidance.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/rescale_cfg.h"
#include "sag/self_attention_guidance.h"
#include "sag/self_guidance.h"
#include "sag/skip_layer_guidance.h"
#include "sag/smoothed_energy_guidance.h"
#include "sag/token_perturbation_guidance.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;

struct Named {
  std::string name;
  std::function<ModelPatcher(const ModelPatcher&)> apply;
};

std::vector<Named> guidances() {
  return {
      {"SAG", [](const auto& model) { return apply_self_attention_guidance(model); }},
      {"one-pass SAG",
       [](const auto& model) {
         return apply_self_attention_guidance(model, {.scale = 0.75, .one_pass = true});
       }},
      {"PAG",
       [](const auto& model) {
         return apply_perturbed_attention_guidance(model, {.sites = {"middle.0.0", "output.3.0"}});
       }},
      {"SEG",
       [](const auto& model) {
         return apply_smoothed_energy_guidance(model, {.blur_sigma = 1, .sites = {"middle.0.0"}});
       }},
      {"PAG in a window",
       [](const auto& model) {
         return apply_perturbed_attention_guidance(
             model, {.sites = {"output.3.0"}, .window = {.sigma_start = 5}});
       }},
      {"TPG",
       [](const auto& model) {
         return apply_token_perturbation_guidance(model, {.blocks = {"middle.0.0", "middle.0.1"}});
       }},
      {"SLG",
       [](const auto& model) {
         return apply_skip_layer_guidance(model, {.blocks = {"output.3.0"}, .window = {}});
       }},
      {"APG", [](const auto& model) { return apply_adaptive_projected_guidance(model); }},
      {"CFG-Zero*", [](const auto& model) { return apply_cfg_zero_star(model); }},
      {"rescale", [](const auto& model) { return apply_rescale_cfg(model); }},
      {"dynamic thresholding",
       [](const auto& model) {
         return apply_dynamic_thresholding(model, {.mimic_scale = 3, .threshold_percentile = 0.9});
       }},
      {"momentum", [](const auto& model) { return apply_momentum_guidance(model); }},
      {"SG-prev", [](const auto& model) { return apply_self_guidance(model); }},
  };
}

// What a run is like beside its guidances.
struct Setting {
  std::string name;
  double cond_scale = 7;
  std::int64_t max_rows = 0;
  std::vector<Conditioning> positive = {toy_prompt(1)}, negative = {toy_prompt(-1)};
};

std::vector<Setting> settings() {
  auto corner = toy_prompt(2);
  corner.area = Area{8, 16, 0, 8};
  return {{.name = "usual"},
          {.name = "cfg 1", .cond_scale = 1},
          {.name = "3 rows a call", .max_rows = 3},
          {.name = "two negatives", .negative = {toy_prompt(-1), toy_prompt(.5)}},
          {.name = "an area", .positive = {toy_prompt(1), corner}},
          {.name = "unconditional", .positive = {}}};
}

using Results = std::vector<torch::Tensor>;

// Three steps, at noisy latents that do not depend on what is predicted.
Results run(const ModelPatcher& model, const Setting& setting) {
  CfgGuider guider(model, setting.positive, setting.negative,
                   {.cond_scale = setting.cond_scale, .max_rows = setting.max_rows});
  guider.begin_run({8, 4, 2, 0});
  Results results;
  for (const double sigma : {8.0, 4.0, 2.0})
    results.push_back(guider(test::fill({2, 4, 16, 24}, .262, sigma, 6), sigma));
  return results;
}

// The model whose CFG result and first guidance give these results.
ModelPatcher giving(const ModelPatcher& model, const Results& results) {
  auto patched = model.clone();
  patched.set_post_cfg_function([results](const PostCfgArgs& args) {
    return results.at(static_cast<std::size_t>(args.step.step_index()));
  });
  return patched;
}

double apart(const Results& a, const Results& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, max_diff(a[i], b[i]));
  return largest;
}

TEST(Pairs, EachWorksAsIfAlone) {
  const ModelPatcher base(std::make_shared<test::ManySitesUNet>(
                              std::vector<std::string>{"middle.0.0", "middle.0.1", "output.3.0"}),
                          ModelSampling::discrete());
  for (const auto& setting : settings()) {
    const auto plain = run(base, setting);
    for (const auto& first : guidances()) {
      const auto alone = run(first.apply(base), setting);
      for (const auto& second : guidances()) {
        const auto expected = run(second.apply(giving(base, alone)), setting);
        EXPECT_LT(apart(run(second.apply(first.apply(base)), setting), expected), 5e-4)
            << first.name << ", then " << second.name << "; " << setting.name;
      }
      // The toy's prompts only shift what it predicts: alone there is no spread to lower.
      if (first.name == "dynamic thresholding") continue;
      const bool needs_both = first.name == "APG" || first.name == "CFG-Zero*";
      const bool idle = (needs_both && (setting.cond_scale == 1 || setting.positive.empty())) ||
                        (first.name == "rescale" && setting.positive.empty());
      EXPECT_EQ(apart(alone, plain) < 1e-6,
                idle || (first.name == "rescale" && setting.cond_scale == 1))
          << first.name << "; " << setting.name;
    }
  }
}

}  // namespace
}  // namespace sag

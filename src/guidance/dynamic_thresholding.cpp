#include "sag/dynamic_thresholding.h"

#include <cmath>

#include <ATen/ATen.h>

#include "cfg_change.h"
#include "model/latent.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_dynamic_thresholding";

using Options = DynamicThresholdingOptions;

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.mimic_scale) && options.mimic_scale >= 0, "[", kCaller,
                    "] mimic_scale must be finite and at least 0, got ", options.mimic_scale, ".");
  TORCH_CHECK_VALUE(options.threshold_percentile >= 0 && options.threshold_percentile <= 1, "[",
                    kCaller, "] threshold_percentile must be between 0 and 1, got ",
                    options.threshold_percentile, ".");
}

// Of each channel, [images, channels, 1, 1].

torch::Tensor mean_of(const torch::Tensor& t) {
  return t.mean(at::IntArrayRef{2, 3}, /*keepdim=*/true);
}

torch::Tensor largest_of(const torch::Tensor& t) {
  return t.abs().amax({2, 3}, /*keepdim=*/true);
}

torch::Tensor quantile_of(const torch::Tensor& t, double p) {
  return at::quantile(t.abs().flatten(2), p, /*dim=*/2, /*keepdim=*/true).unsqueeze(3);
}

torch::Tensor bounded(const Options& options, const PostCfgArgs& args) {
  const auto d = at_least_fp32(args.denoised);
  const auto mimic =
      args.uncond_denoised + options.mimic_scale * (args.cond_denoised - args.uncond_denoised);
  const auto centred = d - mean_of(d);
  const auto aim = largest_of(mimic - mean_of(mimic));
  const auto limit = at::maximum(aim, quantile_of(centred, options.threshold_percentile));
  const auto shrink = at::where(limit > 0, aim / limit, 1.0);
  return mean_of(d) + centred.clamp(-limit, limit) * shrink;
}

torch::Tensor guide(const Owner& owner, const Options& options, const PostCfgArgs& args) {
  if (const auto* idle = cfg_idle_reason(options.window, args)) {
    args.step.skipped(owner, idle);
    return args.denoised;
  }
  args.step.guided(owner);
  return bounded(options, args).to(args.denoised.scalar_type());
}

}  // namespace

ModelPatcher apply_dynamic_thresholding(const ModelPatcher& model, const Options& given) {
  check_options(given);
  auto options = given;
  options.window = in_sigmas(given.window, model.model_sampling(), kCaller);
  auto patched = model.clone();
  patched.set_post_cfg_function(
      [owner = Owner("dynamic_thresholding"), options](const PostCfgArgs& args) {
        return guide(owner, options, args);
      });
  return patched;
}

}  // namespace sag

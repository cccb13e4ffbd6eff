#include "sag/adaptive_projected_guidance.h"

#include <cmath>

#include <ATen/ATen.h>

#include "cfg_change.h"
#include "kept_before.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_adaptive_projected_guidance";

using Options = AdaptiveProjectedGuidanceOptions;

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.eta), "[", kCaller, "] eta must be finite, got ",
                    options.eta, ".");
  TORCH_CHECK_VALUE(std::isfinite(options.norm_threshold) && options.norm_threshold >= 0, "[",
                    kCaller, "] norm_threshold must be finite and at least 0, got ",
                    options.norm_threshold, ".");
  TORCH_CHECK_VALUE(std::abs(options.momentum) < 1, "[", kCaller,
                    "] momentum must be between -1 and 1, got ", options.momentum, ".");
}

// The direction of CFG with that of the steps before.
torch::Tensor with_momentum(const Owner& owner, double momentum, const PostCfgArgs& args) {
  auto direction = args.cond_denoised - args.uncond_denoised;
  if (momentum == 0) return direction;
  const auto before = kept_before(owner, args);
  if (before.defined()) direction = direction + momentum * before;
  args.run.keep(owner, args.step.step_index(), direction);
  return direction;
}

torch::Tensor guided(const Owner& owner, const Options& options, const PostCfgArgs& args) {
  const auto& cond = args.cond_denoised;
  auto d = with_momentum(owner, options.momentum, args).to(torch::kDouble);
  if (options.norm_threshold > 0)
    d = d * (options.norm_threshold / image_dot(d, d).sqrt()).clamp_max(1);
  const auto length = image_dot(cond, cond);
  const auto along = cond * at::where(length > 0, image_dot(d, cond) / length, 0.0);
  const auto step = d - along + options.eta * along;
  return (cond + (args.cond_scale - 1) * step).to(cond.scalar_type());
}

}  // namespace

ModelPatcher apply_adaptive_projected_guidance(const ModelPatcher& model, const Options& options) {
  check_options(options);
  const Owner owner("adaptive_projected_guidance");
  return change_cfg(
      model,
      {.owner = owner,
       .cfg = [owner, options](const PostCfgArgs& args) { return guided(owner, options, args); },
       .window = in_sigmas(options.window, model.model_sampling(), kCaller),
       .needs_steps = options.momentum != 0});
}

}  // namespace sag

#include "sag/cfg_zero_star.h"

#include <ATen/ATen.h>

#include "cfg_change.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_cfg_zero_star";

torch::Tensor guided(const CfgZeroStarOptions& options, const PostCfgArgs& args) {
  const auto& sampling = args.model_sampling;
  const auto as_denoised = [&](const torch::Tensor& output) {
    return sampling.calculate_denoised(args.sigma, output, args.x).to(args.denoised.scalar_type());
  };
  if (args.step.step_index() < options.zero_init_steps)
    return as_denoised(at::zeros_like(args.denoised));
  const auto c = sampling.calculate_output(args.sigma, args.cond_denoised, args.x);
  const auto u = sampling.calculate_output(args.sigma, args.uncond_denoised, args.x);
  const auto length = image_dot(u, u);
  const auto alpha = at::where(length > 0, image_dot(c, u) / length, 1.0).to(u.scalar_type());
  return as_denoised(alpha * u + args.cond_scale * (c - alpha * u));
}

}  // namespace

ModelPatcher apply_cfg_zero_star(const ModelPatcher& model, const CfgZeroStarOptions& options) {
  TORCH_CHECK_VALUE(options.zero_init_steps >= 0, "[", kCaller,
                    "] zero_init_steps must be at least 0, got ", options.zero_init_steps, ".");
  return change_cfg(model,
                    {.owner = Owner("cfg_zero_star"),
                     .cfg = [options](const PostCfgArgs& args) { return guided(options, args); },
                     .window = in_sigmas(options.window, model.model_sampling(), kCaller),
                     .needs_steps = options.zero_init_steps > 0});
}

}  // namespace sag

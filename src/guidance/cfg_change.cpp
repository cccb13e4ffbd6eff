#include "cfg_change.h"

#include <utility>

#include <ATen/ATen.h>

#include "window.h"

namespace sag {
namespace {

torch::Tensor guide(const CfgChange& change, const PostCfgArgs& args) {
  if (const auto* reason = cfg_idle_reason(change.window, args)) {
    args.step.skipped(change.owner, reason);
    return args.denoised;
  }
  args.step.guided(change.owner);
  const auto& cond = args.cond_denoised;
  const auto& uncond = args.uncond_denoised;
  const auto plain = uncond + (cond - uncond) * args.cond_scale;
  return args.denoised + (change.cfg(args) - plain);
}

}  // namespace

const char* cfg_idle_reason(const GuidanceWindow& window, const PostCfgArgs& args) {
  if (!contains(window, args.sigma)) return kOutsideWindow;
  if (args.cond_scale == 1) return "cond_scale is 1";
  if (!args.uncond_denoised.defined()) return "there is no unconditional prediction at this sigma";
  if (!args.cond_denoised.defined()) return "there is no conditional prediction at this sigma";
  return nullptr;
}

ModelPatcher change_cfg(const ModelPatcher& model, const CfgChange& change) {
  auto patched = model.clone();
  patched.set_post_cfg_function([change](const PostCfgArgs& args) { return guide(change, args); },
                                {.needs_steps = change.needs_steps});
  return patched;
}

torch::Tensor image_dot(const torch::Tensor& a, const torch::Tensor& b) {
  return (a.to(torch::kDouble) * b).sum({1, 2, 3}, /*keepdim=*/true);
}

}  // namespace sag

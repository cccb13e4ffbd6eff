#include "sag/self_guidance.h"

#include <cmath>

#include <ATen/ATen.h>

#include "kept_before.h"
#include "model/latent.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_self_guidance";

using Options = SelfGuidanceOptions;

// Under which the outputs of a branch are kept: a prompt that begins or ends within a run must not
// be compared with its negative.
struct Owners {
  Owner cond{"self_guidance"}, uncond{"self_guidance"};
};

torch::Tensor guide(const Owners& owners, const Options& options, const PostCfgArgs& args) {
  const auto& owner = owners.cond;
  const bool prompted = args.cond_denoised.defined();
  const auto& kept_by = prompted ? owners.cond : owners.uncond;
  const auto& prediction = prompted ? args.cond_denoised : args.uncond_denoised;
  const auto& sampling = args.model_sampling;
  const auto x = at_least_fp32(args.x);

  const auto before = kept_before(kept_by, args);
  // A copy: an x0 model's output is the prediction, and the caller may write into what it gets.
  args.run.keep(kept_by, args.step.step_index(),
                sampling.calculate_output(args.sigma, prediction, x).clone());
  const auto* idle = !contains(options.window, args.sigma) ? kOutsideWindow
                     : options.scale == 0                  ? "scale is 0"
                     : !before.defined()                   ? kNoStepBefore
                                                           : nullptr;
  if (idle) {
    args.step.skipped(owner, idle);
    return args.denoised;
  }
  args.step.guided(owner);
  const auto denoised_before = sampling.calculate_denoised(args.sigma, before, x);
  const auto guided = args.denoised + options.scale * (prediction - denoised_before);
  return guided.to(args.denoised.scalar_type());
}

}  // namespace

ModelPatcher apply_self_guidance(const ModelPatcher& model, const Options& given) {
  TORCH_CHECK_VALUE(std::isfinite(given.scale), "[", kCaller, "] scale must be finite, got ",
                    given.scale, ".");
  auto options = given;
  options.window = in_sigmas(given.window, model.model_sampling(), kCaller);
  auto patched = model.clone();
  patched.set_post_cfg_function(
      [owners = Owners(), options](const PostCfgArgs& args) {
        return guide(owners, options, args);
      },
      {.needs_steps = options.scale != 0});
  return patched;
}

}  // namespace sag

#include "sag/momentum_guidance.h"

#include <cmath>

#include <ATen/ATen.h>

#include "kept_before.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_momentum_guidance";

using Options = MomentumGuidanceOptions;

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.momentum), "[", kCaller,
                    "] momentum must be finite, got ", options.momentum, ".");
  TORCH_CHECK_VALUE(options.ema >= 0 && options.ema <= 1, "[", kCaller,
                    "] ema must be between 0 and 1, got ", options.ema, ".");
}

torch::Tensor guide(const Owner& owner, const Options& options, const PostCfgArgs& args) {
  const auto& d = args.denoised;
  const auto average = kept_before(owner, args);
  // A copy of the first step: the caller may write into what it gets.
  args.run.keep(owner, args.step.step_index(),
                average.defined() ? options.ema * average + (1 - options.ema) * d : d.clone());
  const auto* idle = !contains(options.window, args.sigma) ? kOutsideWindow
                     : options.momentum == 0               ? "momentum is 0"
                     : !average.defined()                  ? kNoStepBefore
                                                           : nullptr;
  if (idle) {
    args.step.skipped(owner, idle);
    return d;
  }
  args.step.guided(owner);
  return d + options.momentum * (d - average);
}

}  // namespace

ModelPatcher apply_momentum_guidance(const ModelPatcher& model, const Options& given) {
  check_options(given);
  auto options = given;
  options.window = in_sigmas(given.window, model.model_sampling(), kCaller);
  auto patched = model.clone();
  patched.set_post_cfg_function(
      [owner = Owner("momentum_guidance"), options](const PostCfgArgs& args) {
        return guide(owner, options, args);
      },
      {.needs_steps = options.momentum != 0});
  return patched;
}

}  // namespace sag

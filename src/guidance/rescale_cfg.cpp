#include "sag/rescale_cfg.h"

#include <ATen/ATen.h>

#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_rescale_cfg";

// In which space spreads are compared.
ModelSampling v_space(const ModelSampling& sampling) {
  const auto prediction = sampling.prediction();
  if (prediction == Prediction::flow || prediction == Prediction::edm) return sampling;
  return ModelSampling::discrete(Prediction::v);
}

torch::Tensor spread(const torch::Tensor& v) {
  return v.std(at::IntArrayRef{1, 2, 3}, /*unbiased=*/true, /*keepdim=*/true);
}

torch::Tensor guide(const Owner& owner, const RescaleCfgOptions& options,
                    const ModelSampling& space, const PostCfgArgs& args) {
  const auto* idle = !contains(options.window, args.sigma) ? kOutsideWindow
                     : options.multiplier == 0             ? "multiplier is 0"
                     : !args.cond_denoised.defined()
                         ? "there is no conditional prediction at this sigma"
                         : nullptr;
  if (idle) {
    args.step.skipped(owner, idle);
    return args.denoised;
  }
  args.step.guided(owner);
  const auto v = space.calculate_output(args.sigma, args.denoised, args.x);
  const auto v_c = space.calculate_output(args.sigma, args.cond_denoised, args.x);
  const auto wide = spread(v);
  const auto factor = at::where(wide > 0, spread(v_c) / wide, 1.0);
  const auto rescaled = v * (options.multiplier * factor + (1 - options.multiplier));
  return space.calculate_denoised(args.sigma, rescaled, args.x).to(args.denoised.scalar_type());
}

}  // namespace

ModelPatcher apply_rescale_cfg(const ModelPatcher& model, const RescaleCfgOptions& given) {
  TORCH_CHECK_VALUE(given.multiplier >= 0 && given.multiplier <= 1, "[", kCaller,
                    "] multiplier must be between 0 and 1, got ", given.multiplier, ".");
  auto options = given;
  options.window = in_sigmas(given.window, model.model_sampling(), kCaller);
  auto patched = model.clone();
  patched.set_post_cfg_function([owner = Owner("rescale_cfg"), options,
                                 space = v_space(model.model_sampling())](const PostCfgArgs& args) {
    return guide(owner, options, space, args);
  });
  return patched;
}

}  // namespace sag

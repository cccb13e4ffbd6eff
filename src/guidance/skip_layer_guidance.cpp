#include "sag/skip_layer_guidance.h"

#include "perturbation.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_skip_layer_guidance";

// The rows get what the block was given.
torch::Tensor without_block(const PerturbedRows& at, const NextAttention& next) {
  auto out = next(at.call).clone();
  for (const auto& rows : at.rows) rows.of(out).copy_(rows.of(at.call.q));
  return out;
}

}  // namespace

ModelPatcher apply_skip_layer_guidance(const ModelPatcher& model,
                                       const SkipLayerGuidanceOptions& options) {
  check_perturbation(options.scale, options.blocks, kCaller);
  return guide_by_perturbation(
      model, {.owner = Owner("skip_layer_guidance"),
              .what = Perturbed::blocks,
              .sites = options.blocks,
              .perturb = without_block,
              .scale = [scale = options.scale](double) { return scale; },
              .window = in_sigmas(options.window, model.model_sampling(), kCaller)});
}

}  // namespace sag

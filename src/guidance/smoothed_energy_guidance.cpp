#include "sag/smoothed_energy_guidance.h"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

#include "perturbation.h"
#include "sag/blur.h"
#include "token_checks.h"
#include "watched_tokens.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_smoothed_energy_guidance";

// Along the last dimension, with the paper's taps: at most one more than there are tokens.
torch::Tensor smoothed_along(const torch::Tensor& t, double sigma) {
  const auto side = t.size(-1);
  const auto taps = std::min(std::ceil(6 * sigma), static_cast<double>(side));
  return gaussian_blur_2d(t.reshape({1, -1, 1, side}), static_cast<std::int64_t>(taps) | 1, sigma)
      .reshape(t.sizes());
}

// q: [rows, heads, tokens, head_dim], the tokens of a picture.
torch::Tensor smoothed(const torch::Tensor& q, const TokenGrid& grid, double sigma) {
  const auto wide = c10::promoteTypes(q.scalar_type(), torch::kFloat);
  if (std::isinf(sigma)) return q.mean(2, /*keepdim=*/true, wide).to(q.scalar_type());
  const auto picture = q.transpose(2, 3).unflatten(3, {grid.rows, grid.cols});
  const auto down = smoothed_along(picture.transpose(3, 4), sigma).transpose(3, 4);
  return smoothed_along(down, sigma).flatten(3).transpose(2, 3);
}

torch::Tensor with_smooth_queries(const Owner& owner, const SmoothedEnergyGuidanceOptions& options,
                                  const PerturbedRows& at, const NextAttention& next) {
  const auto& [call, pass, groups, site] = at;
  if (call.probabilities.defined()) {
    pass.step->skipped(owner, "the attention of the site shows no queries that could be blurred");
    return next(call);
  }
  auto changed = call;
  changed.q = call.q.clone();
  for (const auto& rows : groups) {
    const auto tokens = watched_tokens(call, pass, rows, options.tokens);
    if (!tokens.fault.empty()) {
      pass.step->skipped(owner, tokens.fault);
      return next(call);
    }
    const auto& [begin, count] = tokens.queries;
    const auto grid = token_grid(count, pass.height, pass.width, options.tokens.reduction);
    const auto q = pass.select(rows, changed.q).narrow(2, begin, count);
    q.copy_(smoothed(q, *grid, options.blur_sigma));
  }
  return next(changed);
}

}  // namespace

ModelPatcher apply_smoothed_energy_guidance(const ModelPatcher& model,
                                            const SmoothedEnergyGuidanceOptions& options) {
  check_perturbation(options.scale, options.sites, kCaller);
  check_picture_tokens(options.tokens, kCaller);
  TORCH_CHECK_VALUE(options.blur_sigma > 0, "[", kCaller, "] blur_sigma must be > 0, got ",
                    options.blur_sigma, ".");
  const Owner owner("smoothed_energy_guidance");
  return guide_by_perturbation(
      model, {.owner = owner,
              .sites = options.sites,
              .perturb =
                  [owner, options](const PerturbedRows& at, const NextAttention& next) {
                    return with_smooth_queries(owner, options, at, next);
                  },
              .scale = [scale = options.scale](double) { return scale; },
              .window = in_sigmas(options.window, model.model_sampling(), kCaller)});
}

}  // namespace sag

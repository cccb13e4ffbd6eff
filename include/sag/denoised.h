#pragma once

#include <functional>
#include <utility>

#include <torch/types.h>

namespace sag {

/// What a model predicts for a noisy latent. A tensor converts to it.
struct Denoised {
  /// Both predictions, or the guided one alone.
  Denoised(torch::Tensor denoised, torch::Tensor uncond_denoised = {})
      : denoised(std::move(denoised)), uncond_denoised(std::move(uncond_denoised)) {}

  /// The clean latent, guided.
  torch::Tensor denoised;
  /// The unconditional clean latent, before any guidance; undefined if it was not asked for. CFG++
  /// samplers need it.
  torch::Tensor uncond_denoised;
};

/// Predicts the clean latent: denoised = model(x, sigma). A `CfgGuider`, or any function that
/// returns a tensor; for CFG++ samplers, one that returns both predictions, as
/// `CfgGuider::predict_both` does.
using DenoiseFunction = std::function<Denoised(const torch::Tensor& x, double sigma)>;

}  // namespace sag

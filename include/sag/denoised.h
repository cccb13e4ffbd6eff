#pragma once

#include <utility>

#include <torch/types.h>

namespace sag {

/// What a model predicts for a noisy latent. A tensor converts to it.
struct Denoised {
  Denoised(torch::Tensor denoised, torch::Tensor uncond_denoised = {})
      : denoised(std::move(denoised)), uncond_denoised(std::move(uncond_denoised)) {}

  torch::Tensor denoised;  ///< the clean latent, guided
  /// The unconditional clean latent, before any guidance; undefined: not asked for. CFG++ samplers
  /// need it.
  torch::Tensor uncond_denoised;
};

}  // namespace sag

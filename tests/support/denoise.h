#pragma once

#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/samplers.h"

namespace sag::test {

/// Returns what the sampler asks of a guider: both predictions if it is a CFG++ sampler. The guider
/// must outlive it.
inline DenoiseFunction denoise_with(CfgGuider& guider, const SamplerInfo& sampler) {
  return [&guider, both = sampler.needs_uncond](const torch::Tensor& x, double sigma) {
    return both ? guider.predict_both(x, sigma) : Denoised(guider(x, sigma));
  };
}

}  // namespace sag::test

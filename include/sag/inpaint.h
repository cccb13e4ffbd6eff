#pragma once

#include <torch/types.h>

#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/samplers.h"

namespace sag {

/// Returns a model that repaints only where `mask` is 1: before each evaluation the rest of x is
/// replaced by `latent` noised to σ with `noise`, and after it the rest of the prediction by
/// `latent`; an unconditional prediction is passed on unchanged. latent, noise: [images, channels,
/// height, width]; mask: broadcastable to it, 0 … 1. Throws ValueError or TypeError on other shapes
/// and dtypes. ComfyUI: `KSamplerX0Inpaint`.
SAG_API DenoiseFunction inpaint_model(DenoiseFunction model, const ModelSampling& sampling,
                                      const torch::Tensor& latent, const torch::Tensor& noise,
                                      const torch::Tensor& mask);

}  // namespace sag

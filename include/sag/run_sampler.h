#pragma once

#include <span>

#include <torch/types.h>

#include "sag/denoised.h"
#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/samplers.h"

namespace sag {

/// What a run starts from, and the options of its sampler.
struct RunSamplerOptions {
  /// Clean start image, the shape of `noise`. Undefined: zeros.
  torch::Tensor latent = {};
  /// Where to repaint `latent`, [height, width] or [images or 1, 1, height, width], 1 = repaint, 0
  /// = keep.
  torch::Tensor denoise_mask = {};
  /// Noise of the kept part, the shape of `noise`. Undefined: `noise` itself.
  torch::Tensor inpaint_noise = {};
  /// How the sampler works.
  SamplerOptions sampler = {};
};

/// Samples with a model of your own: noises the start image to sigmas[0], runs the sampler, and
/// undoes the model's scaling at the end. With a `CfgGuider` call `sample`.
///
/// noise: unit Gaussian [images, channels, height, width] on the model's device. If the run starts
/// at the model's highest σ, within 1e-5 of it or above, the start has the full variance
/// (`noise_scaling` with max_denoise). `sampler.flow` and `sampler.flow_shift` come from
/// `sampling`.
///
/// Throws ValueError or TypeError on other arguments, and when a given tensor holds NaN or
/// infinity; Error when the final latent does. ComfyUI: `KSAMPLER.sample`.
SAG_API torch::Tensor run_sampler(Sampler sampler, const DenoiseFunction& model,
                                  const ModelSampling& sampling, const torch::Tensor& noise,
                                  std::span<const double> sigmas,
                                  const RunSamplerOptions& options = {});

}  // namespace sag

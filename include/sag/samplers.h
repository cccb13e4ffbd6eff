#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/noise.h"

namespace sag {

/// Predicts the clean latent: denoised = model(x, sigma). A `CfgGuider`, or anything else.
using DenoiseFunction = std::function<torch::Tensor(const torch::Tensor& x, double sigma)>;

/// Where a run stands, after the model was evaluated at sigmas[step] and before x moves on.
struct SamplerProgress {
  std::int64_t step = 0, steps = 0;
  double sigma = 0;
  const torch::Tensor& x;         ///< the noisy latent at sigma
  const torch::Tensor& denoised;  ///< the prediction
};

struct SamplerOptions {
  /// Called once a step. Returning false ends the run: the sampler returns `denoised` of that step.
  std::function<bool(const SamplerProgress&)> callback = {};
  /// Fresh noise for samplers that add some. Empty: the second and later draws of `SeededNoise`
  /// with seeds 0, 1, 2, …
  NoiseSampler noise_sampler = {};
  /// Share of fresh noise in ancestral samplers, 0 … 1.
  double eta = 1.0;
  /// Factor on fresh noise.
  double s_noise = 1.0;
  /// True for flow models (x = (1 − σ)·x0 + σ·n), whose ancestral steps re-noise differently.
  /// `sample` sets it from the model.
  bool flow = false;
};

/// A sampler: takes x, noisy at sigmas[0], to sigmas.back(). x: [images, channels, height, width].
/// The model is asked for predictions at the sigmas, which must fall strictly (the last may be 0).
/// Half precision x is promoted to fp32, which the model then gets and the sampler returns.
/// All throw ValueError or TypeError on other arguments; what the model throws passes through.
using Sampler = torch::Tensor (*)(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas, const SamplerOptions& options);

/// Euler's method on dx/dσ = (x − denoised) / σ. k-diffusion: `sample_euler`.
SAG_API torch::Tensor sample_euler(const DenoiseFunction& model, torch::Tensor x,
                                   std::span<const double> sigmas,
                                   const SamplerOptions& options = {});
/// Euler steps with fresh noise. k-diffusion: `sample_euler_ancestral`.
SAG_API torch::Tensor sample_euler_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                             std::span<const double> sigmas,
                                             const SamplerOptions& options = {});
/// Heun's method, two evaluations a step. Karras et al. 2022, algorithm 1; k-diffusion:
/// `sample_heun`.
SAG_API torch::Tensor sample_heun(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas,
                                  const SamplerOptions& options = {});
/// DPM-Solver++(2M), Lu et al. 2022. k-diffusion: `sample_dpmpp_2m`.
SAG_API torch::Tensor sample_dpmpp_2m(const DenoiseFunction& model, torch::Tensor x,
                                      std::span<const double> sigmas,
                                      const SamplerOptions& options = {});
/// DDIM with eta 0, which is Euler's method in these coordinates. ComfyUI: `ddim`.
SAG_API torch::Tensor sample_ddim(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas,
                                  const SamplerOptions& options = {});

/// Returns the names that `get_sampler` knows: "euler", "euler_ancestral", …
SAG_API std::span<const std::string_view> sampler_names();
/// Returns a sampler by name. Throws ValueError on unknown names, listing the known ones.
SAG_API Sampler get_sampler(std::string_view name);

/// Throws ValueError unless the sigmas are finite, fall strictly, are positive but for a last 0,
/// and are at least two.
SAG_API void check_sigmas(std::span<const double> sigmas, const char* caller);

struct SampleOptions {
  /// Clean start image, the shape of `noise`. Undefined: zeros.
  torch::Tensor latent = {};
  /// Where to repaint `latent`, [height, width] or [images or 1, 1, height, width], 1 = repaint, 0
  /// = keep.
  torch::Tensor denoise_mask = {};
  SamplerOptions sampler = {};
};

/// Runs a whole sampling: noises the start image to sigmas[0], samples, and undoes the model's
/// scaling at the end. noise: unit Gaussian [images, channels, height, width] on the model's
/// device. At the model's highest σ, within 1e-5 of it or above, the start has the whole variance
/// (`noise_scaling` with max_denoise). Throws ValueError or TypeError on other arguments, and when
/// a given tensor holds NaN or infinity. ComfyUI: `KSAMPLER.sample`.
SAG_API torch::Tensor sample(Sampler sampler, const DenoiseFunction& model,
                             const ModelSampling& sampling, const torch::Tensor& noise,
                             std::span<const double> sigmas, const SampleOptions& options = {});

}  // namespace sag

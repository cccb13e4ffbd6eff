#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/grad_mode.h>

#include "model/latent.h"
#include "sag/run_sampler.h"
#include "sag/samplers.h"

// What the samplers share.

namespace sag {

/// Returns the seeds, or 0, 1, 2, …, one for each image, if there are none.
std::vector<std::uint64_t> seeds_or_count(std::vector<std::uint64_t> seeds, std::int64_t images);

/// Throws ValueError, naming `caller`, unless the sigmas are finite, fall strictly, are positive
/// except for a last 0, and there are at least two.
void check_sigmas(std::span<const double> sigmas, const char* caller);

/// `run_sampler`, for functions with other names that do the same.
torch::Tensor run_sampler_as(const char* caller, Sampler sampler, const DenoiseFunction& model,
                             const ModelSampling& sampling, const torch::Tensor& noise,
                             std::span<const double> sigmas, const RunSamplerOptions& options);

/// One run of a sampler: checked arguments, checked predictions and noise, the report of each step.
/// Gradients are off while it exists.
class Run {
 public:
  Run(const char* caller, const DenoiseFunction& model, std::span<const double> sigmas,
      const SamplerOptions& options);

  torch::Tensor start(const torch::Tensor& x) const;
  std::size_t steps() const { return sigmas_.size() - 1; }

  /// Returns the model's prediction.
  torch::Tensor predict(const torch::Tensor& x, double sigma) const;
  /// Returns both predictions, which a CFG++ sampler needs.
  Denoised predict_both(const torch::Tensor& x, double sigma) const;

  /// Returns false if the callback ends the run.
  bool goes_on(std::size_t step, const torch::Tensor& x, const torch::Tensor& denoised) const;

  /// Sets where fresh noise comes from, unless the caller set it. Checks eta and s_noise.
  void use_fresh_noise(const torch::Tensor& x);
  /// The same, for noise from one Brownian path.
  void use_brownian_noise(const torch::Tensor& x);
  /// Returns x + scale·s_noise·noise; draws nothing if that equals x.
  torch::Tensor add_noise(const torch::Tensor& x, double scale, double sigma,
                          double sigma_next) const;
  /// Returns the noise alone, not scaled by s_noise.
  torch::Tensor noise(const torch::Tensor& x, double sigma, double sigma_next) const;

 private:
  torch::Tensor checked(const torch::Tensor& prediction, const torch::Tensor& x,
                        const char* what) const;
  void check_noise_options() const;

  const at::NoGradGuard no_grad_;
  const char* caller_;
  const DenoiseFunction& model_;
  std::span<const double> sigmas_;
  const SamplerOptions& options_;
  NoiseSampler noise_sampler_;
};

/// Where a run to σ = 0 really ends with a sampler that cannot reach it: `SamplerInfo::end_sigma`,
/// or half the last sigma before, if that is lower.
inline double end_above_zero(double end_sigma, std::span<const double> sigmas) {
  return std::min(end_sigma, sigmas[sigmas.size() - 2] / 2);
}

/// The derivative dx/dσ, which points from the prediction to x.
inline torch::Tensor to_d(const torch::Tensor& x, double sigma, const torch::Tensor& denoised) {
  return (x - denoised) / sigma;
}

/// A step down to sigma_down, after which x·x_scale plus noise of sigma_up is at sigma_next.
struct AncestralStep {
  double sigma_down, x_scale, sigma_up;
};
/// Splits the step from sigma, which may be infinite, to sigma_next: eta is the share of fresh
/// noise. In flow models (x = (1 − σ)·x0 + σ·n) adding noise is not enough: x is also scaled from
/// sigma_down's share of x0 to sigma_next's. k-diffusion: `get_ancestral_step`.
AncestralStep get_ancestral_step(double sigma, double sigma_next, double eta, bool flow = false);

/// Weights of the newest and the last prediction in an exponential two-step method with steps of
/// widths h and h_last in λ. ComfyUI: `res_multistep`.
struct ResWeights {
  double b_1, b_2;
};
ResWeights res_weights(double h, double h_last);

/// The place of σ in the logarithm of signal over noise, the time in which the DPM-Solvers step.
struct HalfLogSnr {
  bool flow = false;
  /// The share of x0 in x.
  double alpha(double sigma) const;
  /// ln(alpha / σ)
  double lambda(double sigma) const;
  /// The inverse of lambda.
  double sigma(double lambda) const;
};

}  // namespace sag

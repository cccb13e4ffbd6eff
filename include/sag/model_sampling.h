#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

/// What the UNet predicts, and with it how a noisy latent looks.
///
/// | | noisy latent | UNet input | denoised |
/// |---|---|---|---|
/// | eps | x0 + σ·n | x / √(σ² + 1) | x − σ·out |
/// | v | x0 + σ·n | x / √(σ² + 1) | x / (σ² + 1) − out·σ / √(σ² + 1) |
/// | x0 | x0 + σ·n | x / √(σ² + 1) | out |
/// | edm | x0 + σ·n | x / √(σ² + σd²) | x·σd² / (σ² + σd²) + out·σ·σd / √(σ² + σd²) |
/// | flow | (1 − σ)·x0 + σ·n | x | x − σ·out |
enum class Prediction { eps, v, x0, edm, flow };

/// Returns the names of all predictions: "eps", "v", "x0", "edm", "flow".
SAG_API std::span<const std::string_view> prediction_names();
/// Returns the prediction of that name. Throws ValueError on other names, listing the known ones.
SAG_API Prediction parse_prediction(std::string_view name);
/// Returns the prediction's name.
SAG_API std::string_view to_string(Prediction prediction);

/// How the betas of a discrete model rise: linearly in √beta, or linearly.
enum class BetaSchedule { scaled_linear, linear };

/// Returns the names of all beta schedules: "scaled_linear", "linear".
SAG_API std::span<const std::string_view> beta_schedule_names();
/// Returns the schedule of that name. Throws ValueError on other names, listing the known ones.
SAG_API BetaSchedule parse_beta_schedule(std::string_view name);
/// Returns the schedule's name.
SAG_API std::string_view to_string(BetaSchedule schedule);

/// The noise schedule of a discrete model, by default Stable Diffusion's.
struct DiscreteSamplingOptions {
  /// Variance of the noise that the first timestep adds.
  double beta_start = 0.00085;
  /// Variance of the noise that the last timestep adds.
  double beta_end = 0.012;
  /// Number of timesteps.
  std::int64_t timesteps = 1000;
  /// How the betas rise between them.
  BetaSchedule beta_schedule = BetaSchedule::scaled_linear;
  /// Rescales the table so that its last entry is almost pure noise (Lin et al. 2023, algorithm 1).
  /// ComfyUI: `rescale_zero_terminal_snr_sigmas`.
  bool zero_terminal_snr = false;
};

/// The constants of an EDM model (Karras et al. 2022).
struct EdmSamplingOptions {
  /// Standard deviation of clean latents.
  double sigma_data = 0.5;
  /// The lowest noise level.
  double sigma_min = 0.002;
  /// The highest noise level.
  double sigma_max = 80.0;
};

/// The constants of a rectified-flow model: σ = shift·u / (1 + (shift − 1)·u), timestep =
/// σ·multiplier.
struct FlowSamplingOptions {
  /// Shift of the noise levels; 1: none.
  double shift = 1.0;
  /// Timestep of σ = 1.
  double multiplier = 1000.0;
};

/// How the σ, timesteps, inputs and outputs of a model relate. ComfyUI: `ModelSampling` and its
/// prediction classes, formula for formula. σ is a number on the host. Tensors keep their dtype,
/// and the arithmetic is done in it (fp32 is intended).
class SAG_API ModelSampling {
 public:
  /// A model with a table of noise levels; `prediction` is eps, v or x0.
  static ModelSampling discrete(Prediction prediction = Prediction::eps,
                                const DiscreteSamplingOptions& options = {});
  /// A model with a given table: ᾱ of every timestep, falling, each in (0, 1).
  static ModelSampling from_alphas_cumprod(Prediction prediction,
                                           const std::vector<double>& alphas_cumprod);
  /// A model of Karras et al. 2022, with 1000 noise levels, evenly spaced in ln σ.
  static ModelSampling edm(const EdmSamplingOptions& options = {});
  /// A rectified-flow model, with 1000 noise levels.
  static ModelSampling flow(const FlowSamplingOptions& options = {});

  /// Returns what the UNet predicts.
  Prediction prediction() const { return prediction_; }
  /// The table of noise levels, rising: one per timestep (eps, v, x0), 1000 for the others.
  const std::vector<double>& sigmas() const { return sigmas_; }
  /// Returns the lowest noise level.
  double sigma_min() const { return sigmas_.front(); }
  /// Returns the highest noise level.
  double sigma_max() const { return sigmas_.back(); }

  /// Returns what the UNet takes as the timestep: the index of the nearest ln σ (eps, v, x0), ln σ
  /// / 4 (edm), σ·multiplier (flow). `sigma` must be > 0, for flow >= 0.
  double timestep(double sigma) const;
  /// Returns the σ of a timestep, the inverse of `timestep`, computed in fp32. Between entries of
  /// the table ln σ is interpolated.
  double sigma(double timestep) const;
  /// Returns the σ at which a share `percent` in [0, 1] of the model's timesteps has passed:
  /// infinity at 0 (flow: 1), 0 at 1. ComfyUI: `percent_to_sigma`.
  double percent_to_sigma(double percent) const;

  /// Returns the UNet's input for the noisy latent x.
  torch::Tensor calculate_input(double sigma, const torch::Tensor& x) const;
  /// Returns the clean latent that the UNet's output corresponds to.
  torch::Tensor calculate_denoised(double sigma, const torch::Tensor& output,
                                   const torch::Tensor& x) const;
  /// Returns the UNet's output that the clean latent corresponds to, the inverse of
  /// `calculate_denoised`: eps, v, x0, or a flow model's velocity. `sigma` must be > 0.
  torch::Tensor calculate_output(double sigma, const torch::Tensor& denoised,
                                 const torch::Tensor& x) const;
  /// Returns `latent` noised to σ. `max_denoise`: start from pure noise of the model's full
  /// variance, noise·√(1 + σ²) + latent for models with x = x0 + σ·n.
  torch::Tensor noise_scaling(double sigma, const torch::Tensor& noise, const torch::Tensor& latent,
                              bool max_denoise = false) const;
  /// Returns the latent at the end of a run that stopped at σ: flow divides by 1 − σ.
  torch::Tensor inverse_noise_scaling(double sigma, const torch::Tensor& latent) const;
  /// Returns a(σ) of x = a·x0 + σ·n: 1, or 1 − σ for flow. Re-noising a changed x0 adds a·change to
  /// x.
  double renoise_scale(double sigma) const;
  /// Returns the shift of a flow model; 1 for others.
  double flow_shift() const { return flow_.shift; }

 private:
  ModelSampling(Prediction prediction, std::vector<double> sigmas);

  Prediction prediction_;
  std::vector<double> sigmas_;
  // Computed from the sigmas before they were rounded to fp32.
  std::vector<float> log_sigmas_;
  double sigma_data_ = 1.0;
  FlowSamplingOptions flow_;
};

}  // namespace sag

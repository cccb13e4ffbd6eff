#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/cfg_guider.h"
#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/noise.h"
#include "sag/samplers.h"

namespace sag {

/// How a picture is sampled. ComfyUI: the inputs of `KSampler`.
struct SampleOptions {
  /// One of `sampler_names()`.
  std::string sampler = "euler";
  /// One of `schedule_names()`.
  std::string schedule = "normal";
  /// Number of steps.
  std::int64_t steps = 20;
  /// In (0, 1]: below 1 the run starts later, from `latent`, with the same number of steps.
  double denoise = 1.0;
  /// Noise levels, used as they are, instead of schedule, steps and denoise. They must fall
  /// strictly; the last one may be 0.
  std::vector<double> sigmas = {};

  /// Clean start image, the shape of the noise. Undefined: zeros.
  torch::Tensor latent = {};
  /// Where to repaint `latent`, [height, width] or [images or 1, 1, height, width], 1 = repaint, 0
  /// = keep.
  torch::Tensor denoise_mask = {};
  /// Noise of the kept part, the shape of the noise. Undefined: the start noise or, with "ddim",
  /// noise of the next seeds, as in ComfyUI.
  torch::Tensor inpaint_noise = {};

  /// One seed per image, for samplers that add fresh noise. Empty: 0, 1, 2, … LibTorch's own
  /// generators are not used.
  std::vector<std::uint64_t> seeds = {};
  /// Fresh noise of your own instead of the seeds (`SamplerOptions::noise_sampler`).
  NoiseSampler noise_sampler = {};
  /// Share of fresh noise in ancestral and SDE samplers, 0 … 1.
  double eta = 1.0;
  /// Factor on fresh noise.
  double s_noise = 1.0;

  /// Called once per step. Returning false ends the run, with that step's prediction.
  std::function<bool(const SamplerProgress&)> callback = {};
  /// Called after every evaluation of the guider; Heun and others have several per step. An
  /// exception ends the run and reaches the caller.
  std::function<void(const EvaluationReport&)> evaluated = {};
};

/// Returns the sigmas of a run: the given ones, or those of the schedule, without the second to
/// last for the samplers that ComfyUI runs this way (`SamplerInfo::discards_penultimate_sigma`).
/// Throws ValueError on unknown names and on sigmas that do not fall.
SAG_API std::vector<double> run_sigmas(const ModelSampling& sampling, const SampleOptions& options);

/// Samples a latent from noise, guided: the whole run, from the first sigma to the last.
///
///     sag::CfgGuider guider(model, {prompt}, {negative}, {.cond_scale = 7.0});
///     auto latent = sag::sample(guider, noise, {.sampler = "heun", .schedule = "karras"});
///
/// It gives the guider the run's sigmas (`CfgGuider::begin_run`), asks it for both predictions
/// where the sampler needs them, and takes the prediction type, flow and shift from the model.
/// `guider.report()` tells what was done.
///
/// noise: unit Gaussian [images, channels, height, width], for example `SeededNoise`. Tensors are
/// moved to the UNet's device. Returns the clean latent on that device, the shape of noise, in fp32
/// (fp64 for fp64 noise). Throws ValueError or TypeError on other arguments, and when a given
/// tensor holds NaN or infinity; Error when the final latent does. Exceptions of hooks and
/// callbacks pass through. ComfyUI: `KSampler`.
SAG_API torch::Tensor sample(CfgGuider& guider, const torch::Tensor& noise,
                             const SampleOptions& options = {});

}  // namespace sag

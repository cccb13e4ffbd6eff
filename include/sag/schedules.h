#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sag/export.h"
#include "sag/model_sampling.h"

namespace sag {

// Noise levels of a run, falling, the last one 0: n steps have n + 1 sigmas (beta: at most).
// Computed in fp32, as the reference does. All throw ValueError unless n >= 1 and the sigmas'
// bounds make sense.

/// Karras et al. 2022, equation 5. k-diffusion: `get_sigmas_karras`.
SAG_API std::vector<double> get_sigmas_karras(std::int64_t n, double sigma_min, double sigma_max,
                                              double rho = 7.0);
/// Evenly spaced in ln σ. k-diffusion: `get_sigmas_exponential`.
SAG_API std::vector<double> get_sigmas_exponential(std::int64_t n, double sigma_min,
                                                   double sigma_max);
/// Evenly spaced in timesteps. ComfyUI: `normal_scheduler`.
SAG_API std::vector<double> get_sigmas_normal(const ModelSampling& sampling, std::int64_t n);
/// Entries of the model's table, evenly spaced. ComfyUI: `simple_scheduler`.
SAG_API std::vector<double> get_sigmas_simple(const ModelSampling& sampling, std::int64_t n);

/// Evenly spaced in timesteps, the last of n + 1 left out. ComfyUI: `sgm_uniform`.
SAG_API std::vector<double> get_sigmas_sgm_uniform(const ModelSampling& sampling, std::int64_t n);
/// Entries 1 + ⌊k·entries/n⌋ of the model's table: DDIM's schedule, which starts below the model's
/// highest σ. Where n does not divide the table well, ComfyUI's `ddim_scheduler` gives up to four
/// steps more than asked for; otherwise this is the same.
SAG_API std::vector<double> get_sigmas_ddim_uniform(const ModelSampling& sampling, std::int64_t n);
/// Entries of the model's table at the quantiles of a beta distribution. Equal neighbours are
/// dropped, so a run of many steps can have fewer than n. Lee et al. 2024; ComfyUI:
/// `beta_scheduler`.
SAG_API std::vector<double> get_sigmas_beta(const ModelSampling& sampling, std::int64_t n,
                                            double alpha = 0.6, double beta = 0.6);
/// Falls linearly by a share `threshold_noise` of σ_max in the first half of the steps, then
/// quadratically. ComfyUI: `linear_quadratic_schedule`.
SAG_API std::vector<double> get_sigmas_linear_quadratic(std::int64_t n, double sigma_max,
                                                        double threshold_noise = 0.025);
/// Evenly spaced in atan σ. Sabour et al. 2024, equation 7; ComfyUI: `kl_optimal_scheduler`, which
/// gives NaN for one step where this gives sigma_max.
SAG_API std::vector<double> get_sigmas_kl_optimal(std::int64_t n, double sigma_min,
                                                  double sigma_max);

/// Returns the names that `get_sigmas` knows: "normal", "karras", …
SAG_API std::span<const std::string_view> schedule_names();

/// Which part of a schedule a run takes.
struct ScheduleOptions {
  /// In (0, 1]: starts later, with the last n + 1 sigmas of a schedule of ⌊n / denoise⌋ steps.
  double denoise = 1.0;
  /// Computes one step more and leaves out the second-to-last sigma, so that a sampler that is poor
  /// at the smallest sigma skips it. ComfyUI does this for `dpm_2`, `dpm_2_ancestral`, `uni_pc` and
  /// `uni_pc_bh2` (`SamplerInfo::discards_penultimate_sigma`).
  bool discard_penultimate_sigma = false;
};

/// Returns a schedule by name, over the model's range of noise levels.
/// Throws ValueError on unknown names, listing the known ones. ComfyUI: `calculate_sigmas`,
/// `KSampler`.
SAG_API std::vector<double> get_sigmas(std::string_view name, const ModelSampling& sampling,
                                       std::int64_t n, const ScheduleOptions& options = {});

}  // namespace sag

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sag/export.h"
#include "sag/model_sampling.h"

namespace sag {

/// Noise levels of a run, falling, the last one 0: n steps have n + 1 sigmas. Computed in fp32, as
/// the reference does. All throw ValueError unless n >= 1 and the sigmas' bounds make sense.

/// Karras et al. 2022, equation 5. k-diffusion: `get_sigmas_karras`.
SAG_API std::vector<double> get_sigmas_karras(std::int64_t n, double sigma_min, double sigma_max,
                                              double rho = 7.0);
/// Even in ln σ. k-diffusion: `get_sigmas_exponential`.
SAG_API std::vector<double> get_sigmas_exponential(std::int64_t n, double sigma_min,
                                                   double sigma_max);
/// Even in timesteps. ComfyUI: `normal_scheduler`.
SAG_API std::vector<double> get_sigmas_normal(const ModelSampling& sampling, std::int64_t n);
/// Every so-manyth entry of the model's table. ComfyUI: `simple_scheduler`.
SAG_API std::vector<double> get_sigmas_simple(const ModelSampling& sampling, std::int64_t n);

/// Returns the names that `get_sigmas` knows.
SAG_API std::span<const std::string_view> schedule_names();

/// Returns a schedule by name, over the model's range of noise levels.
/// denoise in (0, 1] starts later: the last n + 1 sigmas of a schedule of ⌊n / denoise⌋ steps.
/// Throws ValueError on unknown names, listing the known ones. ComfyUI: `calculate_sigmas`,
/// `KSampler`.
SAG_API std::vector<double> get_sigmas(std::string_view name, const ModelSampling& sampling,
                                       std::int64_t n, double denoise = 1.0);

}  // namespace sag

#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "sag/denoised.h"
#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/noise.h"

namespace sag {

/// The state of a run, after the model was evaluated at sigmas[step] and before x moves on.
struct SamplerProgress {
  /// The step, from 0.
  std::int64_t step = 0;
  /// Number of steps.
  std::int64_t steps = 0;
  /// sigmas[step].
  double sigma = 0;
  /// The noisy latent at sigma.
  const torch::Tensor& x;
  /// The prediction.
  const torch::Tensor& denoised;
};

/// What samplers have in common.
struct SamplerOptions {
  /// Called once per step. Returning false ends the run, and the sampler returns `denoised` of that
  /// step.
  std::function<bool(const SamplerProgress&)> callback = {};
  /// Fresh noise for samplers that add some. Empty: drawn from `seeds`, as one Brownian path in
  /// `dpmpp_sde`, `dpmpp_2m_sde`, `dpmpp_2m_sde_heun` and `dpmpp_3m_sde`
  /// (`brownian_noise_sampler`), independently in each step in the others (`SeededNoise` without
  /// its first draw, which x may have been started from).
  NoiseSampler noise_sampler = {};
  /// One seed per image. Empty: 0, 1, 2, …
  std::vector<std::uint64_t> seeds = {};
  /// Share of fresh noise in ancestral and SDE samplers, 0 … 1.
  double eta = 1.0;
  /// Factor on fresh noise.
  double s_noise = 1.0;
  /// True for flow models (x = (1 − σ)·x0 + σ·n), which some samplers step through differently.
  /// `sample` and `run_sampler` set it, and the shift, from the model.
  bool flow = false;
  /// Shift of a flow model. Samplers that cannot start at σ = 1 start just below, by the shift.
  double flow_shift = 1.0;
};

/// A sampler: takes x, noisy at sigmas[0], to sigmas.back(). x: [images, channels, height, width].
/// The model is asked for predictions at the sigmas, which must fall strictly (the last may be 0).
/// Half-precision x is promoted to fp32, which the model then gets and the sampler returns.
/// All throw ValueError or TypeError on other arguments; exceptions of the model pass through.
using Sampler = torch::Tensor (*)(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas, const SamplerOptions& options);

// Each is k-diffusion's function of the same name unless noted otherwise. One evaluation per step
// unless noted otherwise; two- and three-evaluation samplers save some at the end of a run.

/// Euler's method on dx/dσ = (x − denoised) / σ.
SAG_API torch::Tensor sample_euler(const DenoiseFunction& model, torch::Tensor x,
                                   std::span<const double> sigmas,
                                   const SamplerOptions& options = {});
/// Euler steps with fresh noise.
SAG_API torch::Tensor sample_euler_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                             std::span<const double> sigmas,
                                             const SamplerOptions& options = {});
/// Heun's method, two evaluations per step. Karras et al. 2022, algorithm 1.
SAG_API torch::Tensor sample_heun(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas,
                                  const SamplerOptions& options = {});
/// Heun's method with a third evaluation, the later slopes weighted by their share of the first
/// sigma. Three evaluations per step. ComfyUI: `sample_heunpp2`.
SAG_API torch::Tensor sample_heunpp2(const DenoiseFunction& model, torch::Tensor x,
                                     std::span<const double> sigmas,
                                     const SamplerOptions& options = {});
/// DPM-Solver-2: the slope halfway in ln σ, two evaluations per step. Karras et al. 2022, algorithm
/// 2 without its noise.
SAG_API torch::Tensor sample_dpm_2(const DenoiseFunction& model, torch::Tensor x,
                                   std::span<const double> sigmas,
                                   const SamplerOptions& options = {});
/// DPM-Solver-2 steps with fresh noise, two evaluations per step.
SAG_API torch::Tensor sample_dpm_2_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                             std::span<const double> sigmas,
                                             const SamplerOptions& options = {});
/// Linear multistep of the fourth order, with the exact integrals of the interpolation.
SAG_API torch::Tensor sample_lms(const DenoiseFunction& model, torch::Tensor x,
                                 std::span<const double> sigmas,
                                 const SamplerOptions& options = {});
/// DPM-Solver++(2S) steps with fresh noise, two evaluations per step. Lu et al. 2022.
SAG_API torch::Tensor sample_dpmpp_2s_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                                std::span<const double> sigmas,
                                                const SamplerOptions& options = {});
/// DPM-Solver++ for the SDE, single-step, two evaluations per step, Brownian noise.
SAG_API torch::Tensor sample_dpmpp_sde(const DenoiseFunction& model, torch::Tensor x,
                                       std::span<const double> sigmas,
                                       const SamplerOptions& options = {});
/// DPM-Solver++(2M), Lu et al. 2022.
SAG_API torch::Tensor sample_dpmpp_2m(const DenoiseFunction& model, torch::Tensor x,
                                      std::span<const double> sigmas,
                                      const SamplerOptions& options = {});
/// DPM-Solver++(2M) for the SDE, midpoint form, Brownian noise.
SAG_API torch::Tensor sample_dpmpp_2m_sde(const DenoiseFunction& model, torch::Tensor x,
                                          std::span<const double> sigmas,
                                          const SamplerOptions& options = {});
/// DPM-Solver++(2M) for the SDE, Heun form, Brownian noise. ComfyUI: `sample_dpmpp_2m_sde_heun`.
SAG_API torch::Tensor sample_dpmpp_2m_sde_heun(const DenoiseFunction& model, torch::Tensor x,
                                               std::span<const double> sigmas,
                                               const SamplerOptions& options = {});
/// DPM-Solver++(3M) for the SDE, Brownian noise.
SAG_API torch::Tensor sample_dpmpp_3m_sde(const DenoiseFunction& model, torch::Tensor x,
                                          std::span<const double> sigmas,
                                          const SamplerOptions& options = {});
/// Ancestral sampling of Ho et al. 2020. For a flow model it keeps too much, as the reference does;
/// use `sample_euler_ancestral` there. ComfyUI: `sample_ddpm`.
SAG_API torch::Tensor sample_ddpm(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas,
                                  const SamplerOptions& options = {});
/// For latent consistency models: each prediction gets new noise. ComfyUI: `sample_lcm`.
SAG_API torch::Tensor sample_lcm(const DenoiseFunction& model, torch::Tensor x,
                                 std::span<const double> sigmas,
                                 const SamplerOptions& options = {});
/// Improved PNDM, fourth order: Adams-Bashforth for even steps. ComfyUI: `sample_ipndm`.
SAG_API torch::Tensor sample_ipndm(const DenoiseFunction& model, torch::Tensor x,
                                   std::span<const double> sigmas,
                                   const SamplerOptions& options = {});
/// Improved PNDM for uneven steps. ComfyUI: `sample_ipndm_v`.
SAG_API torch::Tensor sample_ipndm_v(const DenoiseFunction& model, torch::Tensor x,
                                     std::span<const double> sigmas,
                                     const SamplerOptions& options = {});
/// DEIS, third order in the time of a variance-preserving process. Zhang & Chen 2022; ComfyUI:
/// `sample_deis`.
SAG_API torch::Tensor sample_deis(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas,
                                  const SamplerOptions& options = {});
/// Two-step exponential integrator in ln σ. Zhang et al. 2023; ComfyUI: `sample_res_multistep`.
SAG_API torch::Tensor sample_res_multistep(const DenoiseFunction& model, torch::Tensor x,
                                           std::span<const double> sigmas,
                                           const SamplerOptions& options = {});
/// Euler steps along the extrapolated derivative. Permenter & Yuan 2023; ComfyUI:
/// `sample_gradient_estimation`.
SAG_API torch::Tensor sample_gradient_estimation(const DenoiseFunction& model, torch::Tensor x,
                                                 std::span<const double> sigmas,
                                                 const SamplerOptions& options = {});
/// Extended reverse-time SDE solver of the third order. Cui et al. 2023; ComfyUI: `sample_er_sde`.
SAG_API torch::Tensor sample_er_sde(const DenoiseFunction& model, torch::Tensor x,
                                    std::span<const double> sigmas,
                                    const SamplerOptions& options = {});
/// UniPC, third order, B1(h): each evaluation also corrects the step before. With a last sigma of 0
/// the run ends at 0.001 instead. Zhao et al. 2023; ComfyUI: `sample_unipc`.
SAG_API torch::Tensor sample_uni_pc(const DenoiseFunction& model, torch::Tensor x,
                                    std::span<const double> sigmas,
                                    const SamplerOptions& options = {});
/// UniPC with B2(h).
SAG_API torch::Tensor sample_uni_pc_bh2(const DenoiseFunction& model, torch::Tensor x,
                                        std::span<const double> sigmas,
                                        const SamplerOptions& options = {});
/// DDIM with eta 0, which is Euler's method in these coordinates. ComfyUI: `ddim`.
SAG_API torch::Tensor sample_ddim(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas,
                                  const SamplerOptions& options = {});
/// CFG++ samplers go from the guided prediction along the unconditional noise, and ask the model
/// for both predictions. Chung et al. 2024; ComfyUI's functions of the same names.
SAG_API torch::Tensor sample_euler_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                          std::span<const double> sigmas,
                                          const SamplerOptions& options = {});
/// Euler steps with fresh noise, CFG++.
SAG_API torch::Tensor sample_euler_ancestral_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                                    std::span<const double> sigmas,
                                                    const SamplerOptions& options = {});
/// DPM-Solver++(2S) steps with fresh noise, CFG++, two evaluations per step. The noise is that of x
/// = x0 + σ·n even in flow models, as in the reference; use `sample_euler_ancestral_cfg_pp` there.
SAG_API torch::Tensor sample_dpmpp_2s_ancestral_cfg_pp(const DenoiseFunction& model,
                                                       torch::Tensor x,
                                                       std::span<const double> sigmas,
                                                       const SamplerOptions& options = {});
/// DPM-Solver++(2M), CFG++.
SAG_API torch::Tensor sample_dpmpp_2m_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                             std::span<const double> sigmas,
                                             const SamplerOptions& options = {});
/// Two-step exponential integrator, CFG++.
SAG_API torch::Tensor sample_res_multistep_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                                  std::span<const double> sigmas,
                                                  const SamplerOptions& options = {});
/// Euler steps along the extrapolated unconditional derivative, CFG++.
SAG_API torch::Tensor sample_gradient_estimation_cfg_pp(const DenoiseFunction& model,
                                                        torch::Tensor x,
                                                        std::span<const double> sigmas,
                                                        const SamplerOptions& options = {});

/// A sampler, and what a run with it needs. `sample` takes care of all of it.
struct SamplerInfo {
  /// The name, as ComfyUI has it.
  std::string_view name;
  /// The function.
  Sampler sample;
  /// A CFG++ sampler: the model must return both predictions.
  bool needs_uncond = false;
  /// ComfyUI and others run it without the second-to-last sigma: `ScheduleOptions`.
  bool discards_penultimate_sigma = false;
  /// Where a run to σ = 0 really ends: UniPC at 0.001, as in the reference.
  double end_sigma = 0.0;
  /// Inpainting adds noise of its own to the kept part, from the next seeds, as ComfyUI does.
  bool keeps_with_noise_of_its_own = false;
};

/// Returns the names of all samplers: "euler", "euler_cfg_pp", …
SAG_API std::span<const std::string_view> sampler_names();
/// Returns what is known about a sampler. Throws ValueError on unknown names, listing the known
/// ones.
SAG_API const SamplerInfo& sampler_info(std::string_view name);
/// Returns a sampler by name, as `sampler_info` does.
SAG_API Sampler get_sampler(std::string_view name);

}  // namespace sag

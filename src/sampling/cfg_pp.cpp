// CFG++ (Chung et al. 2024): the guided prediction says where to go, the unconditional one says
// what the noise is.

#include <cmath>
#include <utility>

#include "run.h"

namespace sag {
namespace {

torch::Tensor euler_cfg_pp(const char* caller, bool ancestral, const DenoiseFunction& model,
                           torch::Tensor x, std::span<const double> sigmas,
                           const SamplerOptions& options) {
  Run run(caller, model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  const HalfLogSnr snr{options.flow};
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto [denoised, uncond_denoised] = run.predict_both(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double alpha = snr.alpha(sigma_next);
    const auto noise = to_d(x, sigma, uncond_denoised * snr.alpha(sigma));
    const auto [down, unused, up] = get_ancestral_step(sigma / snr.alpha(sigma), sigma_next / alpha,
                                                       ancestral ? options.eta : 0.0);
    x = denoised * alpha + noise * (alpha * down);
    x = run.add_noise(x, alpha * up, sigma, sigma_next);
  }
  return x;
}

}  // namespace

torch::Tensor sample_euler_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas, const SamplerOptions& options) {
  return euler_cfg_pp("sample_euler_cfg_pp", false, model, std::move(x), sigmas, options);
}

torch::Tensor sample_euler_ancestral_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                            std::span<const double> sigmas,
                                            const SamplerOptions& options) {
  return euler_cfg_pp("sample_euler_ancestral_cfg_pp", true, model, std::move(x), sigmas, options);
}

torch::Tensor sample_dpmpp_2s_ancestral_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                               std::span<const double> sigmas,
                                               const SamplerOptions& options) {
  Run run("sample_dpmpp_2s_ancestral_cfg_pp", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto [denoised, uncond_denoised] = run.predict_both(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto [sigma_down, unused, sigma_up] = get_ancestral_step(sigma, sigma_next, options.eta);
    if (sigma_down == 0) {
      x = denoised;
    } else {
      const double sigma_mid = std::sqrt(sigma * sigma_down), kept_mid = sigma_mid / sigma;
      const double kept = sigma_down / sigma;
      const auto x_2 = (x + denoised - uncond_denoised) * kept_mid + denoised * (1 - kept_mid);
      // The second call's unconditional prediction, as in the reference.
      const auto [denoised_2, uncond_denoised_2] = run.predict_both(x_2, sigma_mid);
      x = (x + denoised - uncond_denoised_2) * kept + denoised_2 * (1 - kept);
    }
    x = run.add_noise(x, sigma_up, sigma, sigma_next);
  }
  return x;
}

torch::Tensor sample_dpmpp_2m_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                     std::span<const double> sigmas,
                                     const SamplerOptions& options) {
  const Run run("sample_dpmpp_2m_cfg_pp", model, sigmas, options);
  x = run.start(x);
  torch::Tensor old_uncond_denoised;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto [denoised, uncond_denoised] = run.predict_both(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double h = std::log(sigma / sigma_next);
    auto next = denoised + (x - uncond_denoised) * std::exp(-h);
    if (i > 0) {
      const double r = std::log(sigmas[i - 1] / sigma) / h;
      next = next - (denoised - old_uncond_denoised) * (std::expm1(-h) / (2 * r));
    }
    x = next;
    old_uncond_denoised = uncond_denoised;
  }
  return x;
}

torch::Tensor sample_res_multistep_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                          std::span<const double> sigmas,
                                          const SamplerOptions& options) {
  const Run run("sample_res_multistep_cfg_pp", model, sigmas, options);
  x = run.start(x);
  torch::Tensor old_uncond_denoised;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto [denoised, uncond_denoised] = run.predict_both(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (i == 0 || sigma_next == 0) {
      x = denoised + to_d(x, sigma, uncond_denoised) * sigma_next;
    } else {
      const double h = std::log(sigma / sigma_next), h_last = std::log(sigmas[i - 1] / sigma);
      const auto [b_1, b_2] = res_weights(h, h_last);
      x = (x + denoised - uncond_denoised) * std::exp(-h) +
          (uncond_denoised * b_1 + old_uncond_denoised * b_2) * h;
    }
    old_uncond_denoised = uncond_denoised;
  }
  return x;
}

torch::Tensor sample_gradient_estimation_cfg_pp(const DenoiseFunction& model, torch::Tensor x,
                                                std::span<const double> sigmas,
                                                const SamplerOptions& options) {
  const Run run("sample_gradient_estimation_cfg_pp", model, sigmas, options);
  x = run.start(x);
  torch::Tensor old_d;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto [denoised, uncond_denoised] = run.predict_both(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const auto d = to_d(x, sigma, uncond_denoised);
    x = denoised + d * sigma_next;
    if (old_d.defined()) x = x + (d - old_d) * (sigma_next - sigma);
    old_d = d;
  }
  return x;
}

}  // namespace sag

// Samplers that add fresh noise at every step.

#include <cmath>
#include <utility>

#include "run.h"

namespace sag {

torch::Tensor sample_euler_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                     std::span<const double> sigmas,
                                     const SamplerOptions& options) {
  Run run("sample_euler_ancestral", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const auto [sigma_down, x_scale, sigma_up] =
        get_ancestral_step(sigma, sigma_next, options.eta, options.flow);
    x = x + to_d(x, sigma, denoised) * (sigma_down - sigma);
    x = run.add_noise(x * x_scale, sigma_up, sigma, sigma_next);
  }
  return x;
}

torch::Tensor sample_dpm_2_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                     std::span<const double> sigmas,
                                     const SamplerOptions& options) {
  Run run("sample_dpm_2_ancestral", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto [sigma_down, x_scale, sigma_up] =
        get_ancestral_step(sigma, sigma_next, options.eta, options.flow);
    if (sigma_down == 0) {
      x = denoised;
    } else {
      const double sigma_mid = std::sqrt(sigma * sigma_down);
      const auto x_2 = x + to_d(x, sigma, denoised) * (sigma_mid - sigma);
      const auto d_2 = to_d(x_2, sigma_mid, run.predict(x_2, sigma_mid));
      x = x + d_2 * (sigma_down - sigma);
    }
    x = run.add_noise(x * x_scale, sigma_up, sigma, sigma_next);
  }
  return x;
}

torch::Tensor sample_dpmpp_2s_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                        std::span<const double> sigmas,
                                        const SamplerOptions& options) {
  Run run("sample_dpmpp_2s_ancestral", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  const HalfLogSnr snr{options.flow};
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto [sigma_down, x_scale, sigma_up] =
        get_ancestral_step(sigma, sigma_next, options.eta, options.flow);
    if (sigma_down == 0) {
      x = denoised;
    } else {
      // Halfway in λ, which is −∞ at a flow model's σ = 1.
      const bool from_pure_noise = options.flow && sigma == 1;
      const double s =
          from_pure_noise ? 0.9999 : snr.sigma((snr.lambda(sigma) + snr.lambda(sigma_down)) / 2);
      const auto x_2 = x * (s / sigma) + denoised * (1 - s / sigma);
      const auto denoised_2 = run.predict(x_2, s);
      x = x * (sigma_down / sigma) + denoised_2 * (1 - sigma_down / sigma);
    }
    x = run.add_noise(x * x_scale, sigma_up, sigma, sigma_next);
  }
  return x;
}

// In the variance-preserving latent y = x / √(1 + σ²), as the paper writes it.
torch::Tensor sample_ddpm(const DenoiseFunction& model, torch::Tensor x,
                          std::span<const double> sigmas, const SamplerOptions& options) {
  Run run("sample_ddpm", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double alpha_cumprod = 1 / (1 + sigma * sigma);
    const double alpha_cumprod_next = 1 / (1 + sigma_next * sigma_next);
    const double alpha = alpha_cumprod / alpha_cumprod_next;
    const auto epsilon = to_d(x, sigma, denoised);
    const auto mean =
        (x * std::sqrt(alpha_cumprod) - epsilon * ((1 - alpha) / std::sqrt(1 - alpha_cumprod))) /
        std::sqrt(alpha);
    const double spread = std::sqrt((1 - alpha) * (1 - alpha_cumprod_next) / (1 - alpha_cumprod));
    x = run.add_noise(mean, spread, sigma, sigma_next) / std::sqrt(alpha_cumprod_next);
  }
  return x;
}

torch::Tensor sample_lcm(const DenoiseFunction& model, torch::Tensor x,
                         std::span<const double> sigmas, const SamplerOptions& options) {
  Run run("sample_lcm", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  const HalfLogSnr snr{options.flow};
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    x = run.add_noise(denoised * snr.alpha(sigma_next), sigma_next, sigma, sigma_next);
  }
  return x;
}

}  // namespace sag

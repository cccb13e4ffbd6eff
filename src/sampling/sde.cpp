// Solvers of the stochastic differential equation, in λ = ln(alpha / σ).

#include <cmath>
#include <utility>
#include <vector>

#include "run.h"

namespace sag {
namespace {

// At σ = 1 of a flow model nothing of the image is left and λ is −∞, so the run starts just below.
// ComfyUI: `offset_first_sigma_for_snr`.
std::vector<double> with_finite_snr(std::span<const double> sigmas, const SamplerOptions& options,
                                    const char* caller) {
  check_sigmas(sigmas, caller);
  std::vector<double> result(sigmas.begin(), sigmas.end());
  if (!options.flow || result.front() != 1) return result;
  result.front() = ModelSampling::flow({.shift = options.flow_shift}).percent_to_sigma(1e-4);
  TORCH_CHECK_VALUE(result[1] < result[0], "[", caller, "] the second sigma must be below ",
                    result[0], ", where a flow model's run starts instead of at 1, got ", result[1],
                    ".");
  return result;
}

// What is left of unit noise after λ has grown by h and a share eta of the noise was replaced.
double fresh_share(double h, double eta) {
  return std::sqrt(-std::expm1(-2 * h * eta));
}

}  // namespace

torch::Tensor sample_dpmpp_sde(const DenoiseFunction& model, torch::Tensor x,
                               std::span<const double> given_sigmas,
                               const SamplerOptions& options) {
  const auto sigmas = with_finite_snr(given_sigmas, options, "sample_dpmpp_sde");
  Run run("sample_dpmpp_sde", model, sigmas, options);
  x = run.start(x);
  run.use_brownian_noise(x);
  const HalfLogSnr snr{options.flow};
  // One ancestral step from sigma to sigma_next with a prediction from in between.
  const auto step = [&](const torch::Tensor& denoised, double sigma, double sigma_next) {
    const double noise_level = sigma / snr.alpha(sigma);
    const double alpha = snr.alpha(sigma_next);
    const auto [down, unused, up] =
        get_ancestral_step(noise_level, sigma_next / alpha, options.eta);
    const double kept = down / noise_level;
    const auto next = x * (alpha / snr.alpha(sigma) * kept) + denoised * (alpha * (1 - kept));
    return run.add_noise(next, alpha * up, sigma, sigma_next);
  };
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double sigma_mid = snr.sigma((snr.lambda(sigma) + snr.lambda(sigma_next)) / 2);
    const auto x_2 = step(denoised, sigma, sigma_mid);
    x = step(run.predict(x_2, sigma_mid), sigma, sigma_next);
  }
  return x;
}

namespace {

enum class Correction { midpoint, heun };

torch::Tensor dpmpp_2m_sde(const char* caller, Correction correction, const DenoiseFunction& model,
                           torch::Tensor x, std::span<const double> given_sigmas,
                           const SamplerOptions& options) {
  const auto sigmas = with_finite_snr(given_sigmas, options, caller);
  Run run(caller, model, sigmas, options);
  x = run.start(x);
  run.use_brownian_noise(x);
  const HalfLogSnr snr{options.flow};
  torch::Tensor old_denoised;
  double h_last = 0;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double h = snr.lambda(sigma_next) - snr.lambda(sigma), h_eta = h * (1 + options.eta);
    const double alpha = snr.alpha(sigma_next), phi_1 = std::expm1(-h_eta);
    x = x * (sigma_next / sigma * std::exp(-h * options.eta)) - denoised * (alpha * phi_1);
    if (old_denoised.defined()) {
      const double weight = correction == Correction::midpoint ? -phi_1 / 2 : phi_1 / h_eta + 1;
      x = x + (denoised - old_denoised) * (alpha * weight * h / h_last);
    }
    x = run.add_noise(x, sigma_next * fresh_share(h, options.eta), sigma, sigma_next);
    old_denoised = denoised;
    h_last = h;
  }
  return x;
}

}  // namespace

torch::Tensor sample_dpmpp_2m_sde(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> sigmas, const SamplerOptions& options) {
  return dpmpp_2m_sde("sample_dpmpp_2m_sde", Correction::midpoint, model, std::move(x), sigmas,
                      options);
}

torch::Tensor sample_dpmpp_2m_sde_heun(const DenoiseFunction& model, torch::Tensor x,
                                       std::span<const double> sigmas,
                                       const SamplerOptions& options) {
  return dpmpp_2m_sde("sample_dpmpp_2m_sde_heun", Correction::heun, model, std::move(x), sigmas,
                      options);
}

torch::Tensor sample_dpmpp_3m_sde(const DenoiseFunction& model, torch::Tensor x,
                                  std::span<const double> given_sigmas,
                                  const SamplerOptions& options) {
  const auto sigmas = with_finite_snr(given_sigmas, options, "sample_dpmpp_3m_sde");
  Run run("sample_dpmpp_3m_sde", model, sigmas, options);
  x = run.start(x);
  run.use_brownian_noise(x);
  const HalfLogSnr snr{options.flow};
  // Of the last step and the one before.
  torch::Tensor denoised_1, denoised_2;
  double h_1 = 0, h_2 = 0;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double h = snr.lambda(sigma_next) - snr.lambda(sigma), h_eta = h * (1 + options.eta);
    const double alpha = snr.alpha(sigma_next), phi_1 = std::expm1(-h_eta);
    const double phi_2 = phi_1 / h_eta + 1, phi_3 = phi_2 / h_eta - 0.5;
    x = x * (sigma_next / sigma * std::exp(-h * options.eta)) - denoised * (alpha * phi_1);
    if (denoised_2.defined()) {
      const double r_0 = h_1 / h, r_1 = h_2 / h;
      const auto slope_0 = (denoised - denoised_1) / r_0, slope_1 = (denoised_1 - denoised_2) / r_1;
      const auto curve = (slope_0 - slope_1) / (r_0 + r_1);
      x = x + (slope_0 + curve * r_0) * (alpha * phi_2) - curve * (alpha * phi_3);
    } else if (denoised_1.defined()) {
      x = x + (denoised - denoised_1) * (alpha * phi_2 * h / h_1);
    }
    x = run.add_noise(x, sigma_next * fresh_share(h, options.eta), sigma, sigma_next);
    denoised_2 = std::exchange(denoised_1, denoised);
    h_2 = std::exchange(h_1, h);
  }
  return x;
}

namespace {

// How much noise the extended reverse-time SDE keeps at a noise level.
double noise_scaler(double level) {
  return level * (std::exp(std::pow(level, 0.3)) + 10);
}

// ∫ weight(u) / noise_scaler(u) du from level_next to level, as the reference's sum of 200
// rectangles.
template <typename Weight>
double integral_over_scaler(double level, double level_next, const Weight& weight) {
  constexpr int kPoints = 200;
  const double width = (level - level_next) / kPoints;
  double sum = 0;
  for (int k = 0; k < kPoints; ++k) {
    const double u = level_next + k * width;
    sum += weight(u) / noise_scaler(u);
  }
  return sum * width;
}

}  // namespace

torch::Tensor sample_er_sde(const DenoiseFunction& model, torch::Tensor x,
                            std::span<const double> given_sigmas, const SamplerOptions& options) {
  const auto sigmas = with_finite_snr(given_sigmas, options, "sample_er_sde");
  Run run("sample_er_sde", model, sigmas, options);
  x = run.start(x);
  run.use_fresh_noise(x);
  const HalfLogSnr snr{options.flow};
  const auto level_at = [&](std::size_t i) { return sigmas[i] / snr.alpha(sigmas[i]); };
  torch::Tensor old_denoised, old_slope;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double alpha = snr.alpha(sigma_next);
    const double level = level_at(i), next = level_at(i + 1), step = next - level;
    const double kept = noise_scaler(next) / noise_scaler(level);
    x = x * (alpha / snr.alpha(sigma) * kept) + denoised * (alpha * (1 - kept));
    if (i >= 1) {
      const double weight =
          step + noise_scaler(next) * integral_over_scaler(level, next, [](double) { return 1.0; });
      const auto slope = (denoised - old_denoised) / (level - level_at(i - 1));
      x = x + slope * (alpha * weight);
      if (i >= 2) {
        const double weight_2 =
            step * step / 2 + noise_scaler(next) * integral_over_scaler(level, next, [&](double u) {
                                return u - level;
                              });
        const auto curve = (slope - old_slope) / ((level - level_at(i - 2)) / 2);
        x = x + curve * (alpha * weight_2);
      }
      old_slope = slope;
    }
    const double variance = next * next - level * level * kept * kept;
    x = run.add_noise(x, alpha * std::sqrt(std::max(0.0, variance)), sigma, sigma_next);
    old_denoised = denoised;
  }
  return x;
}

}  // namespace sag

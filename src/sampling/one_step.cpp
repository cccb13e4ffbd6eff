// Samplers of the deterministic ODE that use one step at a time.

#include <cmath>
#include <utility>

#include "run.h"

namespace sag {
namespace {

torch::Tensor euler(const char* caller, const DenoiseFunction& model, torch::Tensor x,
                    std::span<const double> sigmas, const SamplerOptions& options) {
  const Run run(caller, model, sigmas, options);
  x = run.start(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const auto denoised = run.predict(x, sigmas[i]);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto d = to_d(x, sigmas[i], denoised);
    x = x + d * (sigmas[i + 1] - sigmas[i]);
  }
  return x;
}

}  // namespace

torch::Tensor sample_euler(const DenoiseFunction& model, torch::Tensor x,
                           std::span<const double> sigmas, const SamplerOptions& options) {
  return euler("sample_euler", model, std::move(x), sigmas, options);
}

torch::Tensor sample_ddim(const DenoiseFunction& model, torch::Tensor x,
                          std::span<const double> sigmas, const SamplerOptions& options) {
  return euler("sample_ddim", model, std::move(x), sigmas, options);
}

torch::Tensor sample_heun(const DenoiseFunction& model, torch::Tensor x,
                          std::span<const double> sigmas, const SamplerOptions& options) {
  const Run run("sample_heun", model, sigmas, options);
  x = run.start(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto d = to_d(x, sigma, denoised);
    const auto x_2 = x + d * (sigma_next - sigma);
    if (sigma_next == 0) return x_2;
    const auto d_2 = to_d(x_2, sigma_next, run.predict(x_2, sigma_next));
    x = x + (d + d_2) / 2 * (sigma_next - sigma);
  }
  return x;
}

// The weights of the later slopes are shares of the run's range, so they shrink towards its end.
torch::Tensor sample_heunpp2(const DenoiseFunction& model, torch::Tensor x,
                             std::span<const double> sigmas, const SamplerOptions& options) {
  const Run run("sample_heunpp2", model, sigmas, options);
  x = run.start(x);
  const double sigma_start = sigmas.front(), sigma_end = sigmas.back();
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_2 = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto d = to_d(x, sigma, denoised);
    const auto x_2 = x + d * (sigma_2 - sigma);
    if (sigma_2 == sigma_end) return x_2;

    const double sigma_3 = sigmas[i + 2];
    const auto d_2 = to_d(x_2, sigma_2, run.predict(x_2, sigma_2));
    if (sigma_3 == sigma_end) {
      const double w_2 = sigma_2 / (2 * sigma_start);
      x = x + (d * (1 - w_2) + d_2 * w_2) * (sigma_2 - sigma);
    } else {
      const auto x_3 = x_2 + d_2 * (sigma_3 - sigma_2);
      const auto d_3 = to_d(x_3, sigma_3, run.predict(x_3, sigma_3));
      const double w_2 = sigma_2 / (3 * sigma_start), w_3 = sigma_3 / (3 * sigma_start);
      x = x + (d * (1 - w_2 - w_3) + d_2 * w_2 + d_3 * w_3) * (sigma_2 - sigma);
    }
  }
  return x;
}

torch::Tensor sample_dpm_2(const DenoiseFunction& model, torch::Tensor x,
                           std::span<const double> sigmas, const SamplerOptions& options) {
  const Run run("sample_dpm_2", model, sigmas, options);
  x = run.start(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    const auto d = to_d(x, sigma, denoised);
    if (sigma_next == 0) return x + d * (sigma_next - sigma);
    const double sigma_mid = std::sqrt(sigma * sigma_next);
    const auto x_2 = x + d * (sigma_mid - sigma);
    const auto d_2 = to_d(x_2, sigma_mid, run.predict(x_2, sigma_mid));
    x = x + d_2 * (sigma_next - sigma);
  }
  return x;
}

}  // namespace sag

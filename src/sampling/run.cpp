#include "run.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace sag {

std::vector<std::uint64_t> seeds_or_count(std::vector<std::uint64_t> seeds, std::int64_t images) {
  if (!seeds.empty()) return seeds;
  seeds.resize(static_cast<std::size_t>(images));
  std::iota(seeds.begin(), seeds.end(), 0);
  return seeds;
}

void check_sigmas(std::span<const double> sigmas, const char* caller) {
  TORCH_CHECK_VALUE(sigmas.size() >= 2, "[", caller, "] there must be at least two sigmas, got ",
                    sigmas.size(), ".");
  for (std::size_t i = 0; i < sigmas.size(); ++i) {
    const bool last = i + 1 == sigmas.size();
    TORCH_CHECK_VALUE(std::isfinite(sigmas[i]) && (sigmas[i] > 0 || (last && sigmas[i] == 0)), "[",
                      caller, "] sigmas must be finite and positive, the last one may be 0, got ",
                      sigmas[i], " at ", i, ".");
    TORCH_CHECK_VALUE(i == 0 || sigmas[i] < sigmas[i - 1], "[", caller,
                      "] sigmas must fall strictly, got ", sigmas[i], " at ", i, " after ",
                      sigmas[i - 1], ".");
  }
}

Run::Run(const char* caller, const DenoiseFunction& model, std::span<const double> sigmas,
         const SamplerOptions& options)
    : caller_(caller), model_(model), sigmas_(sigmas), options_(options) {
  TORCH_CHECK_VALUE(model, "[", caller, "] model must not be empty.");
  check_sigmas(sigmas, caller);
  TORCH_CHECK_VALUE(!options.flow || sigmas.front() <= 1, "[", caller,
                    "] sigmas of a flow model must be <= 1, got ", sigmas.front(), ".");
}

torch::Tensor Run::start(const torch::Tensor& x) const {
  check_latent(x, "x", caller_);
  return at_least_fp32(x);
}

torch::Tensor Run::checked(const torch::Tensor& prediction, const torch::Tensor& x,
                           const char* what) const {
  check_returns_shape(prediction, x, what, caller_);
  return prediction.to(x.scalar_type());
}

torch::Tensor Run::predict(const torch::Tensor& x, double sigma) const {
  return checked(model_(x, sigma).denoised, x, "model");
}

Denoised Run::predict_both(const torch::Tensor& x, double sigma) const {
  const auto both = model_(x, sigma);
  TORCH_CHECK_VALUE(both.uncond_denoised.defined(), "[", caller_,
                    "] model must return uncond_denoised too (CfgGuider::predict_both does, if the "
                    "guider has a negative), got denoised alone.");
  return {checked(both.denoised, x, "model"), checked(both.uncond_denoised, x, "model")};
}

bool Run::goes_on(std::size_t step, const torch::Tensor& x, const torch::Tensor& denoised) const {
  if (!options_.callback) return true;
  return options_.callback({static_cast<std::int64_t>(step), static_cast<std::int64_t>(steps()),
                            sigmas_[step], x, denoised});
}

void Run::check_noise_options() const {
  TORCH_CHECK_VALUE(0 <= options_.eta && options_.eta <= 1, "[", caller_,
                    "] eta must be in [0, 1], got ", options_.eta, ".");
  TORCH_CHECK_VALUE(std::isfinite(options_.s_noise) && options_.s_noise >= 0, "[", caller_,
                    "] s_noise must be finite and >= 0, got ", options_.s_noise, ".");
}

void Run::use_fresh_noise(const torch::Tensor& x) {
  check_noise_options();
  noise_sampler_ = options_.noise_sampler;
  if (noise_sampler_) return;
  const auto noise = std::make_shared<SeededNoise>(seeds_or_count(options_.seeds, x.size(0)));
  // Skip the first draw, which x may have been started from.
  noise->draw(x.sizes().slice(1), torch::kCPU);
  noise_sampler_ = seeded_noise_sampler(noise, x);
}

void Run::use_brownian_noise(const torch::Tensor& x) {
  check_noise_options();
  noise_sampler_ = options_.noise_sampler;
  if (!noise_sampler_)
    noise_sampler_ =
        brownian_noise_sampler(seeds_or_count(options_.seeds, x.size(0)), x, sigmas_.front());
}

torch::Tensor Run::noise(const torch::Tensor& x, double sigma, double sigma_next) const {
  return checked(noise_sampler_(sigma, sigma_next), x, "noise_sampler");
}

torch::Tensor Run::add_noise(const torch::Tensor& x, double scale, double sigma,
                             double sigma_next) const {
  scale *= options_.s_noise;
  return scale == 0 ? x : x + noise(x, sigma, sigma_next) * scale;
}

AncestralStep get_ancestral_step(double sigma, double sigma_next, double eta, bool flow) {
  if (flow) {
    const double sigma_down = sigma_next * (1 + (sigma_next / sigma - 1) * eta);
    const double x_scale = (1 - sigma_next) / (1 - sigma_down);
    const double kept = sigma_down * x_scale;
    return {sigma_down, x_scale, std::sqrt(std::max(0.0, sigma_next * sigma_next - kept * kept))};
  }
  const double falls = 1 - std::pow(sigma_next / sigma, 2);
  const double sigma_up = std::min(sigma_next, eta * sigma_next * std::sqrt(falls));
  return {std::sqrt(sigma_next * sigma_next - sigma_up * sigma_up), 1.0, sigma_up};
}

ResWeights res_weights(double h, double h_last) {
  const double c_2 = -h_last / h;
  const double phi_1 = std::expm1(-h) / -h, phi_2 = (phi_1 - 1) / -h;
  return {phi_1 - phi_2 / c_2, phi_2 / c_2};
}

double HalfLogSnr::alpha(double sigma) const {
  return flow ? 1 - sigma : 1.0;
}

double HalfLogSnr::lambda(double sigma) const {
  return std::log(alpha(sigma) / sigma);
}

double HalfLogSnr::sigma(double lambda) const {
  return flow ? 1 / (1 + std::exp(lambda)) : std::exp(-lambda);
}

}  // namespace sag

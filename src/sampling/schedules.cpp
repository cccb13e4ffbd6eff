#include "sag/schedules.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <c10/util/StringUtil.h>
#include <torch/types.h>

namespace sag {
namespace {

// Returns the values of an fp32 tensor, with a 0 at the end.
std::vector<double> append_zero(const torch::Tensor& sigmas) {
  const auto values = sigmas.to(torch::kFloat64).contiguous();
  const auto* data = values.const_data_ptr<double>();
  std::vector<double> result(data, data + values.numel());
  result.push_back(0.0);
  return result;
}

void check_steps(std::int64_t n, const char* caller) {
  TORCH_CHECK_VALUE(n >= 1, "[", caller, "] the number of steps must be >= 1, got ", n, ".");
}

void check_range(double sigma_min, double sigma_max, const char* caller) {
  TORCH_CHECK_VALUE(0 < sigma_min && sigma_min < sigma_max && std::isfinite(sigma_max), "[", caller,
                    "] sigmas must be 0 < sigma_min < sigma_max < infinity, got ", sigma_min,
                    " and ", sigma_max, ".");
}

using Schedule = std::vector<double> (*)(const ModelSampling& sampling, std::int64_t n);

std::vector<double> karras(const ModelSampling& sampling, std::int64_t n) {
  return get_sigmas_karras(n, sampling.sigma_min(), sampling.sigma_max());
}

std::vector<double> exponential(const ModelSampling& sampling, std::int64_t n) {
  return get_sigmas_exponential(n, sampling.sigma_min(), sampling.sigma_max());
}

std::vector<double> beta(const ModelSampling& sampling, std::int64_t n) {
  return get_sigmas_beta(sampling, n);
}

std::vector<double> linear_quadratic(const ModelSampling& sampling, std::int64_t n) {
  return get_sigmas_linear_quadratic(n, sampling.sigma_max());
}

std::vector<double> kl_optimal(const ModelSampling& sampling, std::int64_t n) {
  return get_sigmas_kl_optimal(n, sampling.sigma_min(), sampling.sigma_max());
}

constexpr std::array<std::string_view, 9> kNames = {"normal", "karras",           "exponential",
                                                    "simple", "sgm_uniform",      "ddim_uniform",
                                                    "beta",   "linear_quadratic", "kl_optimal"};
constexpr std::array<Schedule, 9> kSchedules = {
    get_sigmas_normal,       karras, exponential,      get_sigmas_simple, get_sigmas_sgm_uniform,
    get_sigmas_ddim_uniform, beta,   linear_quadratic, kl_optimal};

}  // namespace

std::vector<double> get_sigmas_karras(std::int64_t n, double sigma_min, double sigma_max,
                                      double rho) {
  check_steps(n, "get_sigmas_karras");
  check_range(sigma_min, sigma_max, "get_sigmas_karras");
  TORCH_CHECK_VALUE(std::isfinite(rho) && rho > 0,
                    "[get_sigmas_karras] rho must be finite and > 0, got ", rho, ".");
  const auto ramp = torch::linspace(0, 1, n, torch::kFloat32);
  const double min_inv_rho = std::pow(sigma_min, 1 / rho);
  const double max_inv_rho = std::pow(sigma_max, 1 / rho);
  return append_zero((max_inv_rho + ramp * (min_inv_rho - max_inv_rho)).pow(rho));
}

std::vector<double> get_sigmas_exponential(std::int64_t n, double sigma_min, double sigma_max) {
  check_steps(n, "get_sigmas_exponential");
  check_range(sigma_min, sigma_max, "get_sigmas_exponential");
  return append_zero(
      torch::linspace(std::log(sigma_max), std::log(sigma_min), n, torch::kFloat32).exp());
}

std::vector<double> get_sigmas_normal(const ModelSampling& sampling, std::int64_t n) {
  check_steps(n, "get_sigmas_normal");
  const double start = sampling.timestep(sampling.sigma_max());
  const double end = sampling.timestep(sampling.sigma_min());
  // A range that ends at 0 already contains the last sigma.
  const bool reaches_zero = sampling.sigma(end) <= 1e-5;
  auto sigmas = append_zero(torch::linspace(start, end, reaches_zero ? n + 1 : n, torch::kFloat32));
  if (reaches_zero) sigmas.pop_back();
  for (std::int64_t i = 0; i < n; ++i) {
    sigmas[i] = sampling.sigma(sigmas[i]);
  }
  sigmas.back() = 0.0;
  return sigmas;
}

std::vector<double> get_sigmas_simple(const ModelSampling& sampling, std::int64_t n) {
  check_steps(n, "get_sigmas_simple");
  const auto& table = sampling.sigmas();
  const auto entries = static_cast<std::int64_t>(table.size());
  TORCH_CHECK_VALUE(n <= entries, "[get_sigmas_simple] the number of steps must be at most the ",
                    entries, " entries of the model's table, got ", n,
                    " (steps / denoise): take fewer steps, a larger denoise or another schedule.");
  const double stride = static_cast<double>(entries) / static_cast<double>(n);
  std::vector<double> sigmas;
  for (std::int64_t k = 0; k < n; ++k) {
    sigmas.push_back(table[entries - 1 - static_cast<std::int64_t>(k * stride)]);
  }
  sigmas.push_back(0.0);
  return sigmas;
}

std::vector<double> get_sigmas_sgm_uniform(const ModelSampling& sampling, std::int64_t n) {
  check_steps(n, "get_sigmas_sgm_uniform");
  const double start = sampling.timestep(sampling.sigma_max());
  const double end = sampling.timestep(sampling.sigma_min());
  auto sigmas = append_zero(torch::linspace(start, end, n + 1, torch::kFloat32).narrow(0, 0, n));
  for (std::int64_t i = 0; i < n; ++i) {
    sigmas[i] = sampling.sigma(sigmas[i]);
  }
  return sigmas;
}

std::vector<double> get_sigmas_ddim_uniform(const ModelSampling& sampling, std::int64_t n) {
  check_steps(n, "get_sigmas_ddim_uniform");
  const auto& table = sampling.sigmas();
  const auto entries = static_cast<std::int64_t>(table.size());
  TORCH_CHECK_VALUE(n < entries, "[get_sigmas_ddim_uniform] the number of steps must be below the ",
                    entries, " entries of the model's table, got ", n,
                    " (steps / denoise): take fewer steps, a larger denoise or another schedule.");
  std::vector<double> sigmas = {0.0};
  for (std::int64_t k = 0; k < n; ++k) {
    sigmas.push_back(table[1 + k * entries / n]);
  }
  return {sigmas.rbegin(), sigmas.rend()};
}

namespace {

// The continued fraction of the incomplete beta function, by Lentz's method (DLMF 8.17.22).
double beta_continued_fraction(double a, double b, double x) {
  constexpr double kTiny = 1e-300;
  double c = 1, d = 1 / (1 - (a + b) * x / (a + 1)), fraction = d;
  for (int m = 1; m < 500; ++m) {
    const double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    const double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    double change = 1;
    for (const double term : {even, odd}) {
      d = 1 / (std::abs(1 + term * d) < kTiny ? kTiny : 1 + term * d);
      c = 1 + term / c;
      change = c * d;
      fraction *= change;
    }
    if (std::abs(change - 1) < 1e-15) break;
  }
  return fraction;
}

// I_x(a, b), the distribution function of a beta distribution.
double regularized_incomplete_beta(double a, double b, double x) {
  if (x <= 0 || x >= 1) return x <= 0 ? 0.0 : 1.0;
  const double front = std::exp(std::lgamma(a + b) - std::lgamma(a) - std::lgamma(b) +
                                a * std::log(x) + b * std::log1p(-x));
  if (x < (a + 1) / (a + b + 2)) return front * beta_continued_fraction(a, b, x) / a;
  return 1 - front * beta_continued_fraction(b, a, 1 - x) / b;
}

// Where the distribution function reaches `share`.
double beta_quantile(double a, double b, double share) {
  double low = 0, high = 1;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (regularized_incomplete_beta(a, b, middle) < share ? low : high) = middle;
  }
  return (low + high) / 2;
}

}  // namespace

std::vector<double> get_sigmas_beta(const ModelSampling& sampling, std::int64_t n, double alpha,
                                    double beta) {
  check_steps(n, "get_sigmas_beta");
  for (const double shape : {alpha, beta}) {
    TORCH_CHECK_VALUE(std::isfinite(shape) && shape > 0,
                      "[get_sigmas_beta] alpha and beta must be finite and > 0, got ", alpha,
                      " and ", beta, ".");
  }
  const auto& table = sampling.sigmas();
  const auto top = static_cast<double>(table.size() - 1);
  std::vector<double> sigmas;
  for (std::int64_t k = 0; k < n; ++k) {
    const double share = 1 - static_cast<double>(k) / static_cast<double>(n);
    const double sigma =
        table[static_cast<std::size_t>(std::rint(beta_quantile(alpha, beta, share) * top))];
    if (sigmas.empty() || sigma < sigmas.back()) sigmas.push_back(sigma);
  }
  sigmas.push_back(0.0);
  return sigmas;
}

std::vector<double> get_sigmas_linear_quadratic(std::int64_t n, double sigma_max,
                                                double threshold_noise) {
  check_steps(n, "get_sigmas_linear_quadratic");
  TORCH_CHECK_VALUE(std::isfinite(sigma_max) && sigma_max > 0,
                    "[get_sigmas_linear_quadratic] sigma_max must be finite and > 0, got ",
                    sigma_max, ".");
  TORCH_CHECK_VALUE(0 < threshold_noise && threshold_noise < 0.5,
                    "[get_sigmas_linear_quadratic] threshold_noise must be in (0, 0.5), got ",
                    threshold_noise, ".");
  if (n == 1) return {sigma_max, 0.0};
  const auto linear_steps = n / 2;
  const auto linear = static_cast<double>(linear_steps);
  const auto quadratic = static_cast<double>(n - linear_steps);
  const double excess = linear - threshold_noise * static_cast<double>(n);
  const double a = excess / (linear * quadratic * quadratic);
  const double b = threshold_noise / linear - 2 * excess / (quadratic * quadratic);
  const double c = a * linear * linear;
  std::vector<double> sigmas;
  for (std::int64_t k = 0; k < n; ++k) {
    const auto i = static_cast<double>(k);
    const double done = k < linear_steps ? i * threshold_noise / linear : a * i * i + b * i + c;
    sigmas.push_back(
        static_cast<float>(static_cast<float>(1 - done) * static_cast<float>(sigma_max)));
  }
  sigmas.push_back(0.0);
  return sigmas;
}

std::vector<double> get_sigmas_kl_optimal(std::int64_t n, double sigma_min, double sigma_max) {
  check_steps(n, "get_sigmas_kl_optimal");
  check_range(sigma_min, sigma_max, "get_sigmas_kl_optimal");
  if (n == 1) return {sigma_max, 0.0};
  const auto share =
      torch::arange(n, torch::kFloat32) / static_cast<double>(std::max<std::int64_t>(n - 1, 1));
  return append_zero((share * std::atan(sigma_min) + (1 - share) * std::atan(sigma_max)).tan());
}

std::span<const std::string_view> schedule_names() {
  return kNames;
}

std::vector<double> get_sigmas(std::string_view name, const ModelSampling& sampling, std::int64_t n,
                               const ScheduleOptions& options) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "[get_sigmas] name must be one of ",
                    c10::Join(", ", kNames), ", got \"", name, "\".");
  check_steps(n, "get_sigmas");
  const double denoise = options.denoise;
  TORCH_CHECK_VALUE(0 < denoise && denoise <= 1, "[get_sigmas] denoise must be in (0, 1], got ",
                    denoise, ".");
  const auto whole = static_cast<double>(n) / denoise;
  TORCH_CHECK_VALUE(whole < 1e6, "[get_sigmas] n / denoise must be below a million, got ", n, " / ",
                    denoise, ".");
  const auto schedule = kSchedules[static_cast<std::size_t>(found - kNames.begin())];
  auto sigmas = schedule(
      sampling, static_cast<std::int64_t>(whole) + (options.discard_penultimate_sigma ? 1 : 0));
  if (options.discard_penultimate_sigma) sigmas.erase(sigmas.end() - 2);
  const auto kept = std::min(sigmas.size(), static_cast<std::size_t>(n + 1));
  return {sigmas.end() - static_cast<std::ptrdiff_t>(kept), sigmas.end()};
}

}  // namespace sag

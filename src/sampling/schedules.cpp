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

constexpr std::array<std::string_view, 4> kNames = {"normal", "karras", "exponential", "simple"};
constexpr std::array<Schedule, 4> kSchedules = {get_sigmas_normal, karras, exponential,
                                                get_sigmas_simple};

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
  // A range that ends at 0 already brings the last sigma along.
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
                    entries, " entries of the model's table, got ", n, ".");
  const double stride = static_cast<double>(entries) / static_cast<double>(n);
  std::vector<double> sigmas;
  for (std::int64_t k = 0; k < n; ++k) {
    sigmas.push_back(table[entries - 1 - static_cast<std::int64_t>(k * stride)]);
  }
  sigmas.push_back(0.0);
  return sigmas;
}

std::span<const std::string_view> schedule_names() {
  return kNames;
}

std::vector<double> get_sigmas(std::string_view name, const ModelSampling& sampling, std::int64_t n,
                               double denoise) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "[get_sigmas] name must be one of ",
                    c10::Join(", ", kNames), ", got \"", name, "\".");
  check_steps(n, "get_sigmas");
  TORCH_CHECK_VALUE(0 < denoise && denoise <= 1, "[get_sigmas] denoise must be in (0, 1], got ",
                    denoise, ".");
  TORCH_CHECK_VALUE(n / denoise < 1e6, "[get_sigmas] n / denoise must be below a million, got ", n,
                    " / ", denoise, ".");
  const auto schedule = kSchedules[found - kNames.begin()];
  const auto sigmas = schedule(sampling, static_cast<std::int64_t>(n / denoise));
  return {sigmas.end() - (n + 1), sigmas.end()};
}

}  // namespace sag

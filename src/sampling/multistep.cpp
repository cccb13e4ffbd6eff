// Samplers of the deterministic ODE that remember earlier steps.

#include <cmath>
#include <utility>
#include <vector>

#include "run.h"

namespace sag {
namespace {

// The last few derivatives, the newest first.
class History {
 public:
  explicit History(std::size_t length) : length_(length) {}
  void push(torch::Tensor d) {
    if (ds_.size() == length_) ds_.pop_back();
    ds_.insert(ds_.begin(), std::move(d));
  }
  std::size_t size() const { return ds_.size(); }
  // Σ c_j·d_j
  torch::Tensor combine(std::span<const double> coefficients) const {
    auto sum = ds_[0] * coefficients[0];
    for (std::size_t j = 1; j < coefficients.size(); ++j) sum = sum + ds_[j] * coefficients[j];
    return sum;
  }

 private:
  std::size_t length_;
  std::vector<torch::Tensor> ds_;
};

// The j-th Lagrange polynomial over the nodes, at `at`.
double lagrange(std::span<const double> nodes, std::size_t j, double at) {
  double product = 1;
  for (std::size_t k = 0; k < nodes.size(); ++k)
    if (k != j) product *= (at - nodes[k]) / (nodes[j] - nodes[k]);
  return product;
}

// The sigmas of the latest `order` steps, the newest first.
std::vector<double> latest(std::span<const double> sigmas, std::size_t step, std::size_t order) {
  std::vector<double> nodes;
  for (std::size_t j = 0; j < order; ++j) nodes.push_back(sigmas[step - j]);
  return nodes;
}

// A multistep method on dx/dσ: x moves by the history, weighted by `coefficients(step, order)`.
template <typename Coefficients>
torch::Tensor adams(const char* caller, std::size_t max_order, const DenoiseFunction& model,
                    torch::Tensor x, std::span<const double> sigmas, const SamplerOptions& options,
                    const Coefficients& coefficients) {
  const Run run(caller, model, sigmas, options);
  x = run.start(x);
  History ds(max_order);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const auto denoised = run.predict(x, sigmas[i]);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigmas[i + 1] == 0) return denoised;
    ds.push(to_d(x, sigmas[i], denoised));
    x = x + ds.combine(coefficients(i, ds.size()));
  }
  return x;
}

// ∫ of each Lagrange polynomial from sigmas[step] to sigmas[step + 1]; two Gauss points are exact
// up to the third degree.
std::vector<double> lms_coefficients(std::span<const double> sigmas, std::size_t step,
                                     std::size_t order) {
  const auto nodes = latest(sigmas, step, order);
  const double middle = (sigmas[step] + sigmas[step + 1]) / 2;
  const double half = (sigmas[step + 1] - sigmas[step]) / 2;
  const double gauss = half / std::sqrt(3.0);
  std::vector<double> coefficients;
  for (std::size_t j = 0; j < order; ++j)
    coefficients.push_back(
        half * (lagrange(nodes, j, middle - gauss) + lagrange(nodes, j, middle + gauss)));
  return coefficients;
}

// Coefficients of a step of width 1, for one of the given width.
std::vector<double> scaled(std::vector<double> coefficients, double width) {
  for (double& c : coefficients) c *= width;
  return coefficients;
}

// Adams-Bashforth for even steps.
std::vector<double> ipndm_coefficients(std::size_t order) {
  switch (order) {
    case 1:
      return {1};
    case 2:
      return {3. / 2, -1. / 2};
    case 3:
      return {23. / 12, -16. / 12, 5. / 12};
    default:
      return {55. / 24, -59. / 24, 37. / 24, -9. / 24};
  }
}

// The same for uneven steps, as in the reference: h, h_1, … are the widths of this step and those
// before it.
std::vector<double> ipndm_v_coefficients(std::span<const double> sigmas, std::size_t step,
                                         std::size_t order) {
  const auto width = [&](std::size_t back) {
    return sigmas[step + 1 - back] - sigmas[step - back];
  };
  const double h = width(0);
  if (order == 1) return {1};
  const double h_1 = width(1);
  std::vector<double> c = {(2 + h / h_1) / 2, -h / h_1 / 2};
  if (order == 2) return c;

  const double h_2 = width(2);
  const double third = (1 - h / (3 * (h + h_1)) * (h * (h + h_1)) / (h_1 * (h_1 + h_2))) / 2;
  c[0] += third;
  c[1] -= (1 + h_1 / h_2) * third;
  c.push_back(third * h_1 / h_2);
  if (order == 3) return c;

  const double h_3 = width(3);
  const double fourth =
      ((1 - h / (3 * (h + h_1))) / 2 + (1 - h / (2 * (h + h_1))) * h / (6 * (h + h_1 + h_2))) *
      (h * (h + h_1) * (h + h_1 + h_2)) / (h_1 * (h_1 + h_2) * (h_1 + h_2 + h_3));
  const double g = h_1 * (h_1 + h_2) / (h_2 * (h_2 + h_3));
  c[0] += fourth;
  c[1] -= (1 + h_1 / h_2 + g) * fourth;
  c[2] += (h_1 / h_2 + g * (1 + h_2 / h_3)) * fourth;
  c.push_back(-fourth * g * h_1 / h_2);
  return c;
}

// DEIS steps in the time t of a variance-preserving process whose β is linear in t.
struct DeisTime {
  // σ = 0.002 at t = 0.001 and σ = 80 at t = 1.
  double log_0 = std::log(1 + 0.002 * 0.002), log_1 = std::log(1 + 80.0 * 80.0);
  double beta_d = 2 * (log_0 / 1e-3 - log_1) / (1e-3 - 1), beta_min = log_1 - beta_d / 2;

  double of(double sigma) const {
    return (std::sqrt(beta_min * beta_min + 2 * beta_d * std::log(1 + sigma * sigma)) - beta_min) /
           beta_d;
  }
  double dsigma_dt(double t) const {
    const double alpha_cumprod = std::exp(-t * t * beta_d / 2 - t * beta_min);
    return (t * beta_d + beta_min) / 2 / std::sqrt(alpha_cumprod * (1 - alpha_cumprod));
  }
};

std::vector<double> deis_coefficients(std::span<const double> sigmas, std::size_t step,
                                      std::size_t order) {
  if (order == 1) return {sigmas[step + 1] - sigmas[step]};
  const DeisTime time;
  auto nodes = latest(sigmas, step, order);
  for (double& node : nodes) node = time.of(node);
  const double from = nodes[0], to = time.of(sigmas[step + 1]);
  // The reference's sum, with as many points, both ends included; a closer sum would give another
  // result.
  constexpr int kPoints = 10000;
  std::vector<double> coefficients(order, 0.0);
  for (int k = 0; k < kPoints; ++k) {
    const double t = from + (to - from) * k / (kPoints - 1);
    const double dsigma = time.dsigma_dt(t) * (to - from) / kPoints;
    for (std::size_t j = 0; j < order; ++j) coefficients[j] += dsigma * lagrange(nodes, j, t);
  }
  return coefficients;
}

}  // namespace

torch::Tensor sample_lms(const DenoiseFunction& model, torch::Tensor x,
                         std::span<const double> sigmas, const SamplerOptions& options) {
  return adams(
      "sample_lms", 4, model, std::move(x), sigmas, options,
      [&](std::size_t step, std::size_t order) { return lms_coefficients(sigmas, step, order); });
}

torch::Tensor sample_ipndm(const DenoiseFunction& model, torch::Tensor x,
                           std::span<const double> sigmas, const SamplerOptions& options) {
  return adams("sample_ipndm", 4, model, std::move(x), sigmas, options,
               [&](std::size_t step, std::size_t order) {
                 return scaled(ipndm_coefficients(order), sigmas[step + 1] - sigmas[step]);
               });
}

torch::Tensor sample_ipndm_v(const DenoiseFunction& model, torch::Tensor x,
                             std::span<const double> sigmas, const SamplerOptions& options) {
  return adams("sample_ipndm_v", 4, model, std::move(x), sigmas, options,
               [&](std::size_t step, std::size_t order) {
                 return scaled(ipndm_v_coefficients(sigmas, step, order),
                               sigmas[step + 1] - sigmas[step]);
               });
}

torch::Tensor sample_deis(const DenoiseFunction& model, torch::Tensor x,
                          std::span<const double> sigmas, const SamplerOptions& options) {
  return adams(
      "sample_deis", 3, model, std::move(x), sigmas, options,
      [&](std::size_t step, std::size_t order) { return deis_coefficients(sigmas, step, order); });
}

torch::Tensor sample_dpmpp_2m(const DenoiseFunction& model, torch::Tensor x,
                              std::span<const double> sigmas, const SamplerOptions& options) {
  const Run run("sample_dpmpp_2m", model, sigmas, options);
  x = run.start(x);
  torch::Tensor old_denoised;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const double h = std::log(sigma / sigma_next);
    auto denoised_d = denoised;
    if (i > 0) {
      const double r = std::log(sigmas[i - 1] / sigma) / h;
      denoised_d = denoised * (1 + 1 / (2 * r)) - old_denoised * (1 / (2 * r));
    }
    x = x * (sigma_next / sigma) - denoised_d * std::expm1(-h);
    old_denoised = denoised;
  }
  return x;
}

torch::Tensor sample_res_multistep(const DenoiseFunction& model, torch::Tensor x,
                                   std::span<const double> sigmas, const SamplerOptions& options) {
  const Run run("sample_res_multistep", model, sigmas, options);
  x = run.start(x);
  torch::Tensor old_denoised;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (i == 0 || sigma_next == 0) {
      x = x + to_d(x, sigma, denoised) * (sigma_next - sigma);
    } else {
      const double h = std::log(sigma / sigma_next), h_last = std::log(sigmas[i - 1] / sigma);
      const auto [b_1, b_2] = res_weights(h, h_last);
      x = x * std::exp(-h) + (denoised * b_1 + old_denoised * b_2) * h;
    }
    old_denoised = denoised;
  }
  return x;
}

torch::Tensor sample_gradient_estimation(const DenoiseFunction& model, torch::Tensor x,
                                         std::span<const double> sigmas,
                                         const SamplerOptions& options) {
  const Run run("sample_gradient_estimation", model, sigmas, options);
  x = run.start(x);
  torch::Tensor old_d;
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) return denoised;
    const auto d = to_d(x, sigma, denoised);
    // γ = 2: twice the newest derivative minus the one before.
    const auto d_bar = old_d.defined() ? 2 * d - old_d : d;
    x = x + d_bar * (sigma_next - sigma);
    old_d = d;
  }
  return x;
}

}  // namespace sag

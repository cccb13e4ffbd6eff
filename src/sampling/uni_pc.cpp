// UniPC (Zhao et al. 2023), the multistep data-prediction form. ComfyUI:
// `extra_samplers/uni_pc.py`, here with x = x0 + σ·n, so that the factors alpha of the paper's
// latent disappear.

#include <algorithm>
#include <cmath>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "run.h"

namespace sag {
namespace {

enum class Variant { bh1, bh2 };

// A noise level.
struct Level {
  // ratio: σ again, rounded like λ.
  double sigma, ratio, lambda;

  explicit Level(double sigma) : sigma(sigma), ratio(sigma), lambda(-std::log(sigma)) {}

  // As the reference computes it, in fp32 and through alpha. Near σ = 0 this rounds λ in the third
  // digit, and the picture in the fifth.
  static Level rounded(double sigma) {
    Level level(sigma);
    // There fp32 would lose all digits.
    if (sigma < 1e-3) return level;
    const auto variance = static_cast<float>(sigma) * static_cast<float>(sigma);
    const float log_alpha = 0.5f * std::log(1.0f / (variance + 1.0f));
    const float noise_variance = 1.0f - std::exp(2.0f * log_alpha);
    level.ratio = std::sqrt(noise_variance) / std::exp(log_alpha);
    level.lambda = log_alpha - 0.5f * std::log(noise_variance);
    return level;
  }
};

// Rounded, unless some are so close that rounding makes them equal.
std::vector<Level> levels_of(std::span<const double> sigmas) {
  std::vector<Level> levels;
  for (const double sigma : sigmas) levels.push_back(Level::rounded(sigma));
  const auto rises = [](const Level& a, const Level& b) { return a.lambda < b.lambda; };
  if (std::adjacent_find(levels.begin(), levels.end(), std::not_fn(rises)) == levels.end())
    return levels;
  return std::vector<Level>(sigmas.begin(), sigmas.end());
}

// The predictions so far, the newest last.
struct History {
  std::vector<Level> levels;
  std::vector<torch::Tensor> denoised;
};

// A step to `to` of the given order: x there, before and after the new prediction is known. The
// difference of predictions that lie too close together is only amplified noise: of those only the
// newest is used, and the order is lower.
class Step {
 public:
  Step(Variant variant, const History& history, const Level& to, std::size_t most,
       const torch::Tensor& x)
      : newest_(history.denoised.back()) {
    const auto& from = history.levels.back();
    const double h = to.lambda - from.lambda;
    const double e_1 = std::expm1(-h);
    scale_ = variant == Variant::bh1 ? -h : e_1;
    base_ = x * (to.ratio / from.ratio) - newest_ * e_1;
    for (std::size_t k = 1; k < most; ++k) {
      const auto past = history.levels.size() - 1 - k;
      const double r = (history.levels[past].lambda - from.lambda) / h;
      if ((places_.empty() ? 0 : places_.back()) - r < kClosest) continue;
      places_.push_back(r);
      differences_.push_back((history.denoised[past] - newest_) / r);
    }
    places_.push_back(1.0);
    order_ = places_.size();
    double h_phi = e_1 / -h - 1, factorial = 1;
    for (std::size_t i = 1; i <= order_; ++i) {
      targets_.push_back(h_phi * factorial / scale_);
      factorial *= static_cast<double>(i + 1);
      h_phi = h_phi / -h - 1 / factorial;
    }
  }

  torch::Tensor predictor() const {
    if (order_ == 1) return base_;
    return moved(order_ == 2 ? std::vector<double>{0.5} : weights(order_ - 1), {});
  }
  torch::Tensor corrector(const torch::Tensor& denoised) const {
    return moved(order_ == 1 ? std::vector<double>{0.5} : weights(order_), denoised - newest_);
  }

 private:
  // In steps.
  static constexpr double kClosest = 1e-2;

  // Solves Σ_j places[j]^i·weights[j] = targets[i] for the first n of them.
  std::vector<double> weights(std::size_t n) const {
    const auto size = static_cast<std::int64_t>(n);
    auto powers = torch::empty({size, size}, torch::kFloat64);
    for (std::int64_t i = 0; i < size; ++i)
      for (std::int64_t j = 0; j < size; ++j)
        powers[i][j] = std::pow(places_[static_cast<std::size_t>(j)], i);
    const auto targets = torch::tensor(
        std::vector<double>(targets_.begin(), targets_.begin() + size), torch::kFloat64);
    const auto solved = at::linalg_solve(powers, targets).contiguous();
    return {solved.data_ptr<double>(), solved.data_ptr<double>() + size};
  }

  // `newest`: the difference that the last weight belongs to; undefined in the predictor.
  torch::Tensor moved(const std::vector<double>& weights, const torch::Tensor& newest) const {
    auto x = base_;
    for (std::size_t k = 0; k < differences_.size(); ++k)
      x = x - differences_[k] * (scale_ * weights[k]);
    return newest.defined() ? x - newest * (scale_ * weights.back()) : x;
  }

  std::size_t order_ = 1;
  torch::Tensor newest_, base_;
  // B(h)
  double scale_ = 0;
  std::vector<double> places_, targets_;
  std::vector<torch::Tensor> differences_;
};

torch::Tensor uni_pc(const char* caller, Variant variant, const DenoiseFunction& model,
                     torch::Tensor x, std::span<const double> sigmas,
                     const SamplerOptions& options) {
  const Run run(caller, model, sigmas, options);
  x = run.start(x);
  const auto steps = run.steps();
  const auto max_order = std::clamp<std::size_t>(steps - 1, 1, 3);
  History history;
  const auto remember = [&](const torch::Tensor& denoised, const Level& level) {
    if (history.levels.size() == max_order) {
      history.levels.erase(history.levels.begin());
      history.denoised.erase(history.denoised.begin());
    }
    history.levels.push_back(level);
    history.denoised.push_back(denoised);
  };

  std::vector<double> ends(sigmas.begin(), sigmas.end());
  // λ is infinite at 0, where the reference goes to 0.001 instead.
  if (ends.back() == 0) ends.back() = end_above_zero(0.001, sigmas);
  const auto levels = levels_of(ends);

  const auto first = run.predict(x, sigmas[0]);
  if (!run.goes_on(0, x, first)) return first;
  remember(first, levels[0]);
  for (std::size_t i = 1; i <= steps; ++i) {
    const bool last = i == steps;
    const auto order = i < max_order ? i : std::min(max_order, steps + 1 - i);
    const Step step(variant, history, levels[i], order, x);
    x = step.predictor();
    if (last) break;
    const auto denoised = run.predict(x, sigmas[i]);
    if (!run.goes_on(i, x, denoised)) return denoised;
    x = step.corrector(denoised);
    remember(denoised, levels[i]);
  }
  return x;
}

}  // namespace

torch::Tensor sample_uni_pc(const DenoiseFunction& model, torch::Tensor x,
                            std::span<const double> sigmas, const SamplerOptions& options) {
  return uni_pc("sample_uni_pc", Variant::bh1, model, std::move(x), sigmas, options);
}

torch::Tensor sample_uni_pc_bh2(const DenoiseFunction& model, torch::Tensor x,
                                std::span<const double> sigmas, const SamplerOptions& options) {
  return uni_pc("sample_uni_pc_bh2", Variant::bh2, model, std::move(x), sigmas, options);
}

}  // namespace sag

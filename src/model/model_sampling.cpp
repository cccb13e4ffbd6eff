#include "sag/model_sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

#include <c10/util/StringUtil.h>

namespace sag {
namespace {

constexpr std::array<std::string_view, 5> kPredictionNames = {"eps", "v", "x0", "edm", "flow"};
constexpr std::array<std::string_view, 2> kBetaScheduleNames = {"scaled_linear", "linear"};

constexpr std::int64_t kContinuousTableSize = 1000;

// Halfway between two entries of the table, the last bit decides which one is nearest. These are
// torch's fp32 functions, as in the reference: the C library's functions pick the other entry in 25
// of SD's 999 cases.
float log_fp32(double value) {
  return torch::scalar_tensor(value, torch::kFloat32).log().item<float>();
}

float exp_fp32(float value) {
  return torch::scalar_tensor(value, torch::kFloat32).exp().item<float>();
}

std::vector<double> to_vector(const torch::Tensor& tensor) {
  const auto values = tensor.to(torch::kFloat64).contiguous();
  const auto* data = values.const_data_ptr<double>();
  return {data, data + values.numel()};
}

// The last entry stays a little above 0, as in the reference: σ is finite there.
torch::Tensor rescale_to_zero_terminal_snr(const torch::Tensor& alphas_cumprod) {
  const auto sqrt_alphas = alphas_cumprod.sqrt();
  const auto first = sqrt_alphas[0], last = sqrt_alphas[-1];
  auto rescaled = ((sqrt_alphas - last) * (first / (first - last))).square();
  // Long tables come closer to 0 than this before their end.
  rescaled[-1] = std::min(4.8973451890853435e-08, rescaled[-2].item<double>() / 2);
  return rescaled;
}

// ComfyUI: `time_snr_shift`.
template <typename Real>
Real time_snr_shift(Real shift, Real t) {
  // The formula may miss 1 by rounding.
  if (t == 1) return 1;
  return std::min<Real>(shift * t / (1 + (shift - 1) * t), 1);
}

void check_sigma(double sigma, Prediction prediction, const char* caller) {
  TORCH_CHECK_VALUE(std::isfinite(sigma) && sigma >= 0, "[", caller,
                    "] sigma must be finite and >= 0, got ", sigma, ".");
  TORCH_CHECK_VALUE(prediction != Prediction::flow || sigma <= 1, "[", caller,
                    "] sigma of a flow model must be <= 1, got ", sigma, ".");
}

}  // namespace

namespace {

// Returns the index of a name, which is the value of its enumerator.
std::size_t index_of(std::string_view name, std::span<const std::string_view> names,
                     const char* caller) {
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), "[", caller, "] name must be one of ",
                    c10::Join(", ", names), ", got \"", name, "\".");
  return static_cast<std::size_t>(found - names.begin());
}

}  // namespace

std::span<const std::string_view> prediction_names() {
  return kPredictionNames;
}

Prediction parse_prediction(std::string_view name) {
  return static_cast<Prediction>(index_of(name, kPredictionNames, "parse_prediction"));
}

std::string_view to_string(Prediction prediction) {
  return kPredictionNames.at(static_cast<std::size_t>(prediction));
}

std::span<const std::string_view> beta_schedule_names() {
  return kBetaScheduleNames;
}

BetaSchedule parse_beta_schedule(std::string_view name) {
  return static_cast<BetaSchedule>(index_of(name, kBetaScheduleNames, "parse_beta_schedule"));
}

std::string_view to_string(BetaSchedule schedule) {
  return kBetaScheduleNames.at(static_cast<std::size_t>(schedule));
}

ModelSampling::ModelSampling(Prediction prediction, std::vector<double> sigmas)
    : prediction_(prediction), sigmas_(std::move(sigmas)) {
  log_sigmas_.reserve(sigmas_.size());
  for (double& sigma : sigmas_) {
    log_sigmas_.push_back(static_cast<float>(std::log(sigma)));
    sigma = static_cast<float>(sigma);
  }
}

ModelSampling ModelSampling::discrete(Prediction prediction,
                                      const DiscreteSamplingOptions& options) {
  const auto& [beta_start, beta_end, timesteps, beta_schedule, zero_terminal_snr] = options;
  TORCH_CHECK_VALUE(0 < beta_start && beta_start <= beta_end && beta_end < 1,
                    "[ModelSampling::discrete] betas must be 0 < beta_start <= beta_end < 1, got ",
                    beta_start, " and ", beta_end, ".");
  TORCH_CHECK_VALUE(timesteps >= 1, "[ModelSampling::discrete] timesteps must be >= 1, got ",
                    timesteps, ".");
  const bool scaled = beta_schedule == BetaSchedule::scaled_linear;
  const auto betas = scaled ? torch::linspace(std::sqrt(beta_start), std::sqrt(beta_end), timesteps,
                                              torch::kFloat64)
                                  .square()
                            : torch::linspace(beta_start, beta_end, timesteps, torch::kFloat64);
  auto alphas_cumprod = (1 - betas).cumprod(0);
  TORCH_CHECK_VALUE(!zero_terminal_snr || timesteps >= 2,
                    "[ModelSampling::discrete] zero_terminal_snr needs at least 2 timesteps, got ",
                    timesteps, ".");
  if (zero_terminal_snr) alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod);
  return from_alphas_cumprod(prediction, to_vector(alphas_cumprod));
}

ModelSampling ModelSampling::from_alphas_cumprod(Prediction prediction,
                                                 const std::vector<double>& alphas_cumprod) {
  constexpr const char* caller = "[ModelSampling::from_alphas_cumprod]";
  TORCH_CHECK_VALUE(
      prediction == Prediction::eps || prediction == Prediction::v || prediction == Prediction::x0,
      caller, " prediction must be eps, v or x0, got ", to_string(prediction), ".");
  TORCH_CHECK_VALUE(!alphas_cumprod.empty(), caller, " alphas_cumprod must not be empty.");
  std::vector<double> sigmas;
  sigmas.reserve(alphas_cumprod.size());
  double previous = 1.0;
  for (const double alpha_cumprod : alphas_cumprod) {
    TORCH_CHECK_VALUE(0 < alpha_cumprod && alpha_cumprod < previous, caller,
                      " alphas_cumprod must fall strictly and lie in (0, 1), got ", alpha_cumprod,
                      " at timestep ", sigmas.size(), " after ", previous, ".");
    sigmas.push_back(std::sqrt((1 - alpha_cumprod) / alpha_cumprod));
    previous = alpha_cumprod;
  }
  return {prediction, std::move(sigmas)};
}

ModelSampling ModelSampling::edm(const EdmSamplingOptions& options) {
  const auto& [sigma_data, sigma_min, sigma_max] = options;
  TORCH_CHECK_VALUE(std::isfinite(sigma_data) && sigma_data > 0,
                    "[ModelSampling::edm] sigma_data must be finite and > 0, got ", sigma_data,
                    ".");
  TORCH_CHECK_VALUE(
      0 < sigma_min && sigma_min < sigma_max && std::isfinite(sigma_max),
      "[ModelSampling::edm] sigmas must be 0 < sigma_min < sigma_max < infinity, got ", sigma_min,
      " and ", sigma_max, ".");
  const auto log_sigmas = torch::linspace(std::log(sigma_min), std::log(sigma_max),
                                          kContinuousTableSize, torch::kFloat32);
  ModelSampling sampling(Prediction::edm, to_vector(log_sigmas.exp()));
  sampling.sigma_data_ = sigma_data;
  return sampling;
}

ModelSampling ModelSampling::flow(const FlowSamplingOptions& options) {
  const auto& [shift, multiplier] = options;
  TORCH_CHECK_VALUE(std::isfinite(shift) && shift > 0,
                    "[ModelSampling::flow] shift must be finite and > 0, got ", shift, ".");
  TORCH_CHECK_VALUE(std::isfinite(multiplier) && multiplier > 0,
                    "[ModelSampling::flow] multiplier must be finite and > 0, got ", multiplier,
                    ".");
  std::vector<double> sigmas;
  for (std::int64_t k = 1; k <= kContinuousTableSize; ++k) {
    const float u = static_cast<float>(k) / kContinuousTableSize;
    sigmas.push_back(time_snr_shift(static_cast<float>(shift), u));
  }
  ModelSampling sampling(Prediction::flow, std::move(sigmas));
  sampling.flow_ = options;
  return sampling;
}

double ModelSampling::timestep(double sigma) const {
  const bool flow = prediction_ == Prediction::flow;
  TORCH_CHECK_VALUE(std::isfinite(sigma) && (flow ? sigma >= 0 : sigma > 0),
                    "[ModelSampling::timestep] sigma must be finite and ", flow ? ">= 0" : "> 0",
                    ", got ", sigma, ".");
  if (flow) return sigma * flow_.multiplier;
  if (prediction_ == Prediction::edm) return 0.25 * std::log(sigma);

  const float log_sigma = log_fp32(sigma);
  std::size_t nearest = 0;
  for (std::size_t i = 1; i < log_sigmas_.size(); ++i) {
    if (std::abs(log_sigma - log_sigmas_[i]) < std::abs(log_sigma - log_sigmas_[nearest])) {
      nearest = i;
    }
  }
  return static_cast<double>(nearest);
}

double ModelSampling::sigma(double timestep) const {
  TORCH_CHECK_VALUE(std::isfinite(timestep), "[ModelSampling::sigma] timestep must be finite, got ",
                    timestep, ".");
  auto t = static_cast<float>(timestep);
  if (prediction_ == Prediction::flow) {
    return time_snr_shift(static_cast<float>(flow_.shift),
                          t / static_cast<float>(flow_.multiplier));
  }
  if (prediction_ == Prediction::edm) return exp_fp32(4 * t);

  t = std::clamp(t, 0.0f, static_cast<float>(log_sigmas_.size() - 1));
  const float below = std::floor(t), w = t - below;
  const float log_below = log_sigmas_[static_cast<std::size_t>(below)];
  const float log_above = log_sigmas_[static_cast<std::size_t>(std::ceil(t))];
  return exp_fp32((1 - w) * log_below + w * log_above);
}

double ModelSampling::percent_to_sigma(double percent) const {
  TORCH_CHECK_VALUE(0 <= percent && percent <= 1,
                    "[ModelSampling::percent_to_sigma] percent must be in [0, 1], got ", percent,
                    ".");
  const bool flow = prediction_ == Prediction::flow;
  if (percent == 0) return flow ? 1.0 : std::numeric_limits<double>::infinity();
  if (percent == 1) return 0.0;

  const double left = 1 - percent;
  if (flow) return time_snr_shift(flow_.shift, left);
  if (prediction_ == Prediction::edm) {
    return std::exp(std::lerp(std::log(sigma_min()), std::log(sigma_max()), left));
  }
  return sigma(left * static_cast<double>(sigmas_.size() - 1));
}

torch::Tensor ModelSampling::calculate_input(double sigma, const torch::Tensor& x) const {
  check_sigma(sigma, prediction_, "ModelSampling::calculate_input");
  if (prediction_ == Prediction::flow) return x;
  return x / std::sqrt(sigma * sigma + sigma_data_ * sigma_data_);
}

torch::Tensor ModelSampling::calculate_denoised(double sigma, const torch::Tensor& output,
                                                const torch::Tensor& x) const {
  check_sigma(sigma, prediction_, "ModelSampling::calculate_denoised");
  const double data_variance = sigma_data_ * sigma_data_;
  const double variance = sigma * sigma + data_variance;
  switch (prediction_) {
    case Prediction::eps:
    case Prediction::flow:
      return x - sigma * output;
    case Prediction::x0:
      return output;
    case Prediction::v:
      return x / variance - output * (sigma / std::sqrt(variance));
    case Prediction::edm:
      return x * (data_variance / variance) + output * (sigma * sigma_data_ / std::sqrt(variance));
  }
  TORCH_INTERNAL_ASSERT(false, "prediction ", static_cast<int>(prediction_));
}

torch::Tensor ModelSampling::calculate_output(double sigma, const torch::Tensor& denoised,
                                              const torch::Tensor& x) const {
  check_sigma(sigma, prediction_, "ModelSampling::calculate_output");
  TORCH_CHECK_VALUE(sigma > 0, "[ModelSampling::calculate_output] sigma must be > 0, got ", sigma,
                    ".");
  const double data_variance = sigma_data_ * sigma_data_;
  const double variance = sigma * sigma + data_variance;
  switch (prediction_) {
    case Prediction::eps:
    case Prediction::flow:
      return (x - denoised) / sigma;
    case Prediction::x0:
      return denoised;
    case Prediction::v:
      return (x / variance - denoised) * (std::sqrt(variance) / sigma);
    case Prediction::edm:
      return (denoised - x * (data_variance / variance)) *
             (std::sqrt(variance) / (sigma * sigma_data_));
  }
  TORCH_INTERNAL_ASSERT(false, "prediction ", static_cast<int>(prediction_));
}

torch::Tensor ModelSampling::noise_scaling(double sigma, const torch::Tensor& noise,
                                           const torch::Tensor& latent, bool max_denoise) const {
  check_sigma(sigma, prediction_, "ModelSampling::noise_scaling");
  if (prediction_ == Prediction::flow) return sigma * noise + (1 - sigma) * latent;
  return noise * (max_denoise ? std::sqrt(1 + sigma * sigma) : sigma) + latent;
}

torch::Tensor ModelSampling::inverse_noise_scaling(double sigma,
                                                   const torch::Tensor& latent) const {
  check_sigma(sigma, prediction_, "ModelSampling::inverse_noise_scaling");
  if (prediction_ != Prediction::flow) return latent;
  TORCH_CHECK_VALUE(
      sigma < 1, "[ModelSampling::inverse_noise_scaling] sigma of a flow model must be < 1, got ",
      sigma, ".");
  return latent / (1 - sigma);
}

double ModelSampling::renoise_scale(double sigma) const {
  check_sigma(sigma, prediction_, "ModelSampling::renoise_scale");
  return prediction_ == Prediction::flow ? 1 - sigma : 1.0;
}

}  // namespace sag

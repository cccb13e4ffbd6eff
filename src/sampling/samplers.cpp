#include "sag/samplers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include <c10/util/StringUtil.h>

#include "sag/inpaint.h"

namespace sag {
namespace {

// Half precision is for the network; the samplers' sums of large and small numbers want fp32.
torch::Tensor at_least_fp32(const torch::Tensor& tensor) {
  return tensor.to(at::promote_types(tensor.scalar_type(), torch::kFloat32));
}

void check_latent(const torch::Tensor& x, const char* name, const char* caller) {
  TORCH_CHECK_VALUE(x.defined() && x.dim() == 4, "[", caller, "] ", name,
                    " must be [images, channels, height, width], got ",
                    x.defined() ? c10::str(x.sizes()) : "an undefined tensor", ".");
  TORCH_CHECK_TYPE(x.is_floating_point(), "[", caller, "] ", name, " must be floating point, got ",
                   x.dtype(), ".");
}

// Reads from the device, so it is for the time before the first step.
void check_finite(const torch::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.isfinite().all().item<bool>(), "[sample] ", name,
                    " must be finite, got NaN or infinity in it.");
}

// What the samplers share: checked arguments, a checked prediction and the report of each step.
class Run {
 public:
  Run(const char* caller, const DenoiseFunction& model, std::span<const double> sigmas,
      const SamplerOptions& options)
      : caller_(caller), model_(model), sigmas_(sigmas), options_(options) {
    TORCH_CHECK_VALUE(model, "[", caller, "] model must not be empty.");
    check_sigmas(sigmas, caller);
  }

  torch::Tensor start(const torch::Tensor& x) const {
    check_latent(x, "x", caller_);
    return at_least_fp32(x);
  }

  std::size_t steps() const { return sigmas_.size() - 1; }

  torch::Tensor predict(const torch::Tensor& x, double sigma) const {
    const auto denoised = model_(x, sigma);
    TORCH_CHECK_VALUE(denoised.defined() && denoised.sizes() == x.sizes(), "[", caller_,
                      "] model must return the shape of x, ", x.sizes(), ", got ",
                      denoised.defined() ? c10::str(denoised.sizes()) : "an undefined tensor", ".");
    return denoised.to(x.scalar_type());
  }

  // False: the callback ends the run.
  bool goes_on(std::size_t step, const torch::Tensor& x, const torch::Tensor& denoised) const {
    if (!options_.callback) return true;
    return options_.callback({static_cast<std::int64_t>(step), static_cast<std::int64_t>(steps()),
                              sigmas_[step], x, denoised});
  }

 private:
  const char* caller_;
  const DenoiseFunction& model_;
  std::span<const double> sigmas_;
  const SamplerOptions& options_;
};

// The derivative dx/dσ that points from the prediction to x.
torch::Tensor to_d(const torch::Tensor& x, double sigma, const torch::Tensor& denoised) {
  return (x - denoised) / sigma;
}

torch::Tensor euler(const char* caller, const DenoiseFunction& model, torch::Tensor x,
                    std::span<const double> sigmas, const SamplerOptions& options) {
  const at::NoGradGuard no_grad;
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

NoiseSampler default_noise_sampler(const torch::Tensor& x) {
  std::vector<std::uint64_t> seeds(static_cast<std::size_t>(x.size(0)));
  std::iota(seeds.begin(), seeds.end(), 0);
  const auto noise = std::make_shared<SeededNoise>(seeds);
  // The first draw may be what x was started from.
  noise->draw(x.sizes().slice(1), torch::kCPU);
  return seeded_noise_sampler(noise, x);
}

torch::Tensor add_noise(const torch::Tensor& x, double scale, const NoiseSampler& noise_sampler,
                        double sigma, double sigma_next) {
  if (scale == 0) return x;
  const auto noise = noise_sampler(sigma, sigma_next);
  TORCH_CHECK_VALUE(noise.defined() && noise.sizes() == x.sizes(),
                    "[sample_euler_ancestral] noise_sampler must return the shape of x, ",
                    x.sizes(), ", got ",
                    noise.defined() ? c10::str(noise.sizes()) : "an undefined tensor", ".");
  return x + noise.to(x.scalar_type()) * scale;
}

struct AncestralStep {
  double sigma_down, sigma_up;
};

// Splits a step into one down to sigma_down and fresh noise that leads back up to sigma_next.
AncestralStep get_ancestral_step(double sigma, double sigma_next, double eta) {
  const double falls = 1 - std::pow(sigma_next / sigma, 2);
  const double sigma_up = std::min(sigma_next, eta * sigma_next * std::sqrt(falls));
  return {std::sqrt(sigma_next * sigma_next - sigma_up * sigma_up), sigma_up};
}

// The same for x = (1 − σ)·x0 + σ·n: x is scaled down from sigma_down's share of x0 to
// sigma_next's.
struct FlowAncestralStep {
  double sigma_down, x_scale, noise_scale;
};

FlowAncestralStep get_flow_ancestral_step(double sigma, double sigma_next, double eta) {
  const double sigma_down = sigma_next * (1 + (sigma_next / sigma - 1) * eta);
  const double x_scale = (1 - sigma_next) / (1 - sigma_down);
  const double kept = sigma_down * x_scale;
  return {sigma_down, x_scale, std::sqrt(std::max(0.0, sigma_next * sigma_next - kept * kept))};
}

void check_ancestral_options(std::span<const double> sigmas, const SamplerOptions& options) {
  TORCH_CHECK_VALUE(0 <= options.eta && options.eta <= 1,
                    "[sample_euler_ancestral] eta must be in [0, 1], got ", options.eta, ".");
  TORCH_CHECK_VALUE(std::isfinite(options.s_noise) && options.s_noise >= 0,
                    "[sample_euler_ancestral] s_noise must be finite and >= 0, got ",
                    options.s_noise, ".");
  TORCH_CHECK_VALUE(!options.flow || sigmas.front() <= 1,
                    "[sample_euler_ancestral] sigmas of a flow model must be <= 1, got ",
                    sigmas.front(), ".");
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

torch::Tensor sample_euler_ancestral(const DenoiseFunction& model, torch::Tensor x,
                                     std::span<const double> sigmas,
                                     const SamplerOptions& options) {
  const at::NoGradGuard no_grad;
  const Run run("sample_euler_ancestral", model, sigmas, options);
  x = run.start(x);
  check_ancestral_options(sigmas, options);
  const auto noise_sampler =
      options.noise_sampler ? options.noise_sampler : default_noise_sampler(x);
  for (std::size_t i = 0; i < run.steps(); ++i) {
    const double sigma = sigmas[i], sigma_next = sigmas[i + 1];
    const auto denoised = run.predict(x, sigma);
    if (!run.goes_on(i, x, denoised)) return denoised;
    if (sigma_next == 0) {
      x = denoised;
    } else if (options.flow) {
      const auto [sigma_down, x_scale, noise_scale] =
          get_flow_ancestral_step(sigma, sigma_next, options.eta);
      x = x * (sigma_down / sigma) + denoised * (1 - sigma_down / sigma);
      x = add_noise(x * x_scale, options.s_noise * noise_scale, noise_sampler, sigma, sigma_next);
    } else {
      const auto [sigma_down, sigma_up] = get_ancestral_step(sigma, sigma_next, options.eta);
      x = x + to_d(x, sigma, denoised) * (sigma_down - sigma);
      x = add_noise(x, options.s_noise * sigma_up, noise_sampler, sigma, sigma_next);
    }
  }
  return x;
}

torch::Tensor sample_heun(const DenoiseFunction& model, torch::Tensor x,
                          std::span<const double> sigmas, const SamplerOptions& options) {
  const at::NoGradGuard no_grad;
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

torch::Tensor sample_dpmpp_2m(const DenoiseFunction& model, torch::Tensor x,
                              std::span<const double> sigmas, const SamplerOptions& options) {
  const at::NoGradGuard no_grad;
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

namespace {

constexpr std::array<std::string_view, 5> kNames = {"euler", "euler_ancestral", "heun", "dpmpp_2m",
                                                    "ddim"};
constexpr std::array<Sampler, 5> kSamplers = {sample_euler, sample_euler_ancestral, sample_heun,
                                              sample_dpmpp_2m, sample_ddim};

}  // namespace

std::span<const std::string_view> sampler_names() {
  return kNames;
}

Sampler get_sampler(std::string_view name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "[get_sampler] name must be one of ",
                    c10::Join(", ", kNames), ", got \"", name, "\".");
  return kSamplers[found - kNames.begin()];
}

void check_sigmas(std::span<const double> sigmas, const char* caller) {
  TORCH_CHECK_VALUE(sigmas.size() >= 2, "[", caller, "] sigmas must be at least two, got ",
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

namespace {

torch::Tensor checked_latent(const torch::Tensor& latent, const torch::Tensor& noise) {
  if (!latent.defined()) return torch::zeros_like(noise);
  check_latent(latent, "latent", "sample");
  TORCH_CHECK_VALUE(latent.sizes() == noise.sizes(), "[sample] latent must be ", noise.sizes(),
                    " as noise is, got ", latent.sizes(), ".");
  TORCH_CHECK_VALUE(latent.device() == noise.device(), "[sample] latent must be on ",
                    noise.device(), " as noise is, got ", latent.device(), ".");
  check_finite(latent, "latent");
  return at_least_fp32(latent);
}

// Returns the mask as [images or 1, 1, height, width].
torch::Tensor checked_mask(torch::Tensor mask, const torch::Tensor& noise) {
  TORCH_CHECK_TYPE(mask.is_floating_point() || mask.scalar_type() == torch::kBool,
                   "[sample] denoise_mask must be floating point or bool, got ", mask.dtype(), ".");
  TORCH_CHECK_VALUE(mask.device() == noise.device(), "[sample] denoise_mask must be on ",
                    noise.device(), " as noise is, got ", mask.device(), ".");
  const auto images = noise.size(0), height = noise.size(2), width = noise.size(3);
  const auto given = mask.sizes().vec();
  if (mask.dim() == 2) mask = mask.unsqueeze(0).unsqueeze(0);
  TORCH_CHECK_VALUE(mask.dim() == 4 && (mask.size(0) == images || mask.size(0) == 1) &&
                        mask.size(1) == 1 && mask.size(2) == height && mask.size(3) == width,
                    "[sample] denoise_mask must be [", height, ", ", width, "] or [", images,
                    " or 1, 1, ", height, ", ", width, "], got ", given, ".");
  mask = mask.to(noise.scalar_type());
  check_finite(mask, "denoise_mask");
  TORCH_CHECK_VALUE(((mask >= 0) & (mask <= 1)).all().item<bool>(),
                    "[sample] denoise_mask must be within 0 and 1, got ", mask.min().item<double>(),
                    " to ", mask.max().item<double>(), ".");
  return mask;
}

// Relative, as in the reference. ComfyUI: `Sampler.max_denoise`.
bool starts_at_max(double sigma, double sigma_max) {
  return sigma > sigma_max || sigma_max - sigma <= 1e-5 * sigma_max;
}

}  // namespace

torch::Tensor sample(Sampler sampler, const DenoiseFunction& model, const ModelSampling& sampling,
                     const torch::Tensor& noise, std::span<const double> sigmas,
                     const SampleOptions& options) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(sampler != nullptr, "[sample] sampler must not be null.");
  check_sigmas(sigmas, "sample");
  check_latent(noise, "noise", "sample");
  check_finite(noise, "noise");
  const auto unit_noise = at_least_fp32(noise);
  const auto latent = checked_latent(options.latent, unit_noise);
  auto sampled_model = model;
  if (options.denoise_mask.defined()) {
    const auto mask = checked_mask(options.denoise_mask, unit_noise);
    sampled_model = inpaint_model(model, sampling, latent, unit_noise, mask);
  }

  auto sampler_options = options.sampler;
  sampler_options.flow = sampling.prediction() == Prediction::flow;
  // A run that is ended early returns a clean prediction, which is not to be scaled.
  double sigma_end = sigmas.back();
  if (options.sampler.callback) {
    sampler_options.callback = [&](const SamplerProgress& progress) {
      const bool goes_on = options.sampler.callback(progress);
      if (!goes_on) sigma_end = 0.0;
      return goes_on;
    };
  }
  const bool max_denoise = starts_at_max(sigmas.front(), sampling.sigma_max());
  const auto x = sampling.noise_scaling(sigmas.front(), unit_noise, latent, max_denoise);
  const auto samples = sampler(sampled_model, x, sigmas, sampler_options);
  return sampling.inverse_noise_scaling(sigma_end, samples);
}

}  // namespace sag

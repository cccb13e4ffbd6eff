#include "sag/run_sampler.h"

#include <string_view>

#include <ATen/ATen.h>

#include "run.h"
#include "sag/inpaint.h"

namespace sag {
namespace {

// Reads from the device, so call it only before the first step and after the last.
bool is_finite(const torch::Tensor& tensor) {
  return tensor.isfinite().all().item<bool>();
}

void check_finite(const torch::Tensor& tensor, const char* name, const char* caller) {
  TORCH_CHECK_VALUE(is_finite(tensor), "[", caller, "] ", name,
                    " must be finite, got NaN or infinity.");
}

// Returns a start image, or noise for one, as the run computes with it.
torch::Tensor checked_latent(const torch::Tensor& latent, const char* name,
                             const torch::Tensor& noise, const char* caller) {
  check_latent(latent, name, caller);
  TORCH_CHECK_VALUE(latent.sizes() == noise.sizes(), "[", caller, "] ", name,
                    " must have the shape of noise, ", noise.sizes(), ", got ", latent.sizes(),
                    ".");
  TORCH_CHECK_VALUE(latent.device() == noise.device(), "[", caller, "] ", name,
                    " must be on the device of noise, ", noise.device(), ", got ", latent.device(),
                    ".");
  check_finite(latent, name, caller);
  return latent.to(noise.scalar_type());
}

// Returns the mask as [images or 1, 1, height, width].
torch::Tensor checked_mask(torch::Tensor mask, const torch::Tensor& noise, const char* caller) {
  TORCH_CHECK_TYPE(mask.is_floating_point() || mask.scalar_type() == torch::kBool, "[", caller,
                   "] denoise_mask must be floating or bool, got ", mask.scalar_type(), ".");
  TORCH_CHECK_VALUE(mask.device() == noise.device(), "[", caller,
                    "] denoise_mask must be on the device of noise, ", noise.device(), ", got ",
                    mask.device(), ".");
  const auto images = noise.size(0), height = noise.size(2), width = noise.size(3);
  const auto given = mask;
  if (mask.dim() == 2) mask = mask.unsqueeze(0).unsqueeze(0);
  TORCH_CHECK_VALUE(mask.dim() == 4 && (mask.size(0) == images || mask.size(0) == 1) &&
                        mask.size(1) == 1 && mask.size(2) == height && mask.size(3) == width,
                    "[", caller, "] denoise_mask must be [", height, ", ", width, "] or [", images,
                    " or 1, 1, ", height, ", ", width, "], got ", given.sizes(), ".");
  mask = mask.to(noise.scalar_type());
  check_finite(mask, "denoise_mask", caller);
  TORCH_CHECK_VALUE(((mask >= 0) & (mask <= 1)).all().item<bool>(), "[", caller,
                    "] denoise_mask must be between 0 and 1, got ", mask.min().item<double>(),
                    " to ", mask.max().item<double>(), ".");
  return mask;
}

// The sigma at which the sampler ends a run.
double end_of(Sampler sampler, std::span<const double> sigmas) {
  if (sigmas.back() != 0) return sigmas.back();
  for (const auto name : sampler_names())
    if (const auto& info = sampler_info(name); info.sample == sampler)
      return end_above_zero(info.end_sigma, sigmas);
  return 0.0;
}

// Relative, as in the reference. ComfyUI: `Sampler.max_denoise`.
bool starts_at_max(double sigma, double sigma_max) {
  return sigma > sigma_max || sigma_max - sigma <= 1e-5 * sigma_max;
}

}  // namespace

torch::Tensor run_sampler_as(const char* caller, Sampler sampler, const DenoiseFunction& model,
                             const ModelSampling& sampling, const torch::Tensor& noise,
                             std::span<const double> sigmas, const RunSamplerOptions& options) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(sampler != nullptr, "[", caller, "] sampler must not be null.");
  check_sigmas(sigmas, caller);
  check_latent(noise, "noise", caller);
  check_finite(noise, "noise", caller);
  const auto unit_noise = at_least_fp32(noise);
  const auto latent = options.latent.defined()
                          ? checked_latent(options.latent, "latent", unit_noise, caller)
                          : torch::zeros_like(unit_noise);
  auto sampled_model = model;
  if (options.denoise_mask.defined()) {
    const auto mask = checked_mask(options.denoise_mask, unit_noise, caller);
    const auto kept_noise =
        options.inpaint_noise.defined()
            ? checked_latent(options.inpaint_noise, "inpaint_noise", unit_noise, caller)
            : unit_noise;
    sampled_model = inpaint_model(model, sampling, latent, kept_noise, mask);
  }

  auto sampler_options = options.sampler;
  sampler_options.flow = sampling.prediction() == Prediction::flow;
  sampler_options.flow_shift = sampling.flow_shift();
  // A run that is ended early returns a clean prediction, which must not be scaled.
  double sigma_end = end_of(sampler, sigmas);
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
  TORCH_CHECK(is_finite(samples), "[", caller,
              "] the final latent must be finite, got NaN or infinity: the model may have "
              "overflowed (try fp32 or bf16), or the guidance may be too strong.");
  return sampling.inverse_noise_scaling(sigma_end, samples);
}

torch::Tensor run_sampler(Sampler sampler, const DenoiseFunction& model,
                          const ModelSampling& sampling, const torch::Tensor& noise,
                          std::span<const double> sigmas, const RunSamplerOptions& options) {
  return run_sampler_as("run_sampler", sampler, model, sampling, noise, sigmas, options);
}

}  // namespace sag

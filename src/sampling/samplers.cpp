#include "sag/samplers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include <c10/util/StringUtil.h>

#include "run.h"
#include "sag/inpaint.h"

namespace sag {
namespace {

constexpr std::array kSamplers = {
    SamplerInfo{.name = "euler", .sample = sample_euler},
    SamplerInfo{.name = "euler_cfg_pp", .sample = sample_euler_cfg_pp, .needs_uncond = true},
    SamplerInfo{.name = "euler_ancestral", .sample = sample_euler_ancestral},
    SamplerInfo{.name = "euler_ancestral_cfg_pp",
                .sample = sample_euler_ancestral_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "heun", .sample = sample_heun},
    SamplerInfo{.name = "heunpp2", .sample = sample_heunpp2},
    SamplerInfo{.name = "dpm_2", .sample = sample_dpm_2, .discards_penultimate_sigma = true},
    SamplerInfo{.name = "dpm_2_ancestral",
                .sample = sample_dpm_2_ancestral,
                .discards_penultimate_sigma = true},
    SamplerInfo{.name = "lms", .sample = sample_lms},
    SamplerInfo{.name = "dpmpp_2s_ancestral", .sample = sample_dpmpp_2s_ancestral},
    SamplerInfo{.name = "dpmpp_2s_ancestral_cfg_pp",
                .sample = sample_dpmpp_2s_ancestral_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "dpmpp_sde", .sample = sample_dpmpp_sde},
    SamplerInfo{.name = "dpmpp_2m", .sample = sample_dpmpp_2m},
    SamplerInfo{.name = "dpmpp_2m_cfg_pp", .sample = sample_dpmpp_2m_cfg_pp, .needs_uncond = true},
    SamplerInfo{.name = "dpmpp_2m_sde", .sample = sample_dpmpp_2m_sde},
    SamplerInfo{.name = "dpmpp_2m_sde_heun", .sample = sample_dpmpp_2m_sde_heun},
    SamplerInfo{.name = "dpmpp_3m_sde", .sample = sample_dpmpp_3m_sde},
    SamplerInfo{.name = "ddpm", .sample = sample_ddpm},
    SamplerInfo{.name = "lcm", .sample = sample_lcm},
    SamplerInfo{.name = "ipndm", .sample = sample_ipndm},
    SamplerInfo{.name = "ipndm_v", .sample = sample_ipndm_v},
    SamplerInfo{.name = "deis", .sample = sample_deis},
    SamplerInfo{.name = "res_multistep", .sample = sample_res_multistep},
    SamplerInfo{.name = "res_multistep_cfg_pp",
                .sample = sample_res_multistep_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "gradient_estimation", .sample = sample_gradient_estimation},
    SamplerInfo{.name = "gradient_estimation_cfg_pp",
                .sample = sample_gradient_estimation_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "er_sde", .sample = sample_er_sde},
    SamplerInfo{.name = "ddim", .sample = sample_ddim},
    SamplerInfo{.name = "uni_pc",
                .sample = sample_uni_pc,
                .discards_penultimate_sigma = true,
                .end_sigma = 0.001},
    SamplerInfo{.name = "uni_pc_bh2",
                .sample = sample_uni_pc_bh2,
                .discards_penultimate_sigma = true,
                .end_sigma = 0.001},
};

constexpr auto kNames = [] {
  std::array<std::string_view, kSamplers.size()> names;
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = kSamplers[i].name;
  return names;
}();

}  // namespace

std::span<const std::string_view> sampler_names() {
  return kNames;
}

const SamplerInfo& sampler_info(std::string_view name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "[sampler_info] name must be one of ",
                    c10::Join(", ", kNames), ", got \"", name, "\".");
  return kSamplers[static_cast<std::size_t>(found - kNames.begin())];
}

Sampler get_sampler(std::string_view name) {
  return sampler_info(name).sample;
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

// Reads from the device, so it is for the time before the first step and after the last.
bool is_finite(const torch::Tensor& tensor) {
  return tensor.isfinite().all().item<bool>();
}

void check_finite(const torch::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(is_finite(tensor), "[sample] ", name,
                    " must be finite, got NaN or infinity in it.");
}

// Returns a start image, or noise for one, as the run computes with it.
torch::Tensor checked_latent(const torch::Tensor& latent, const char* name,
                             const torch::Tensor& noise) {
  check_latent(latent, name, "sample");
  TORCH_CHECK_VALUE(latent.sizes() == noise.sizes(), "[sample] ", name, " must be ", noise.sizes(),
                    " as noise is, got ", latent.sizes(), ".");
  TORCH_CHECK_VALUE(latent.device() == noise.device(), "[sample] ", name, " must be on ",
                    noise.device(), " as noise is, got ", latent.device(), ".");
  check_finite(latent, name);
  return at_least_fp32(latent);
}

// Returns the mask as [images or 1, 1, height, width].
torch::Tensor checked_mask(torch::Tensor mask, const torch::Tensor& noise) {
  TORCH_CHECK_TYPE(mask.is_floating_point() || mask.scalar_type() == torch::kBool,
                   "[sample] denoise_mask must be floating point or bool, got ", mask.dtype(), ".");
  TORCH_CHECK_VALUE(mask.device() == noise.device(), "[sample] denoise_mask must be on ",
                    noise.device(), " as noise is, got ", mask.device(), ".");
  const auto images = noise.size(0), height = noise.size(2), width = noise.size(3);
  const auto given = mask;
  if (mask.dim() == 2) mask = mask.unsqueeze(0).unsqueeze(0);
  TORCH_CHECK_VALUE(mask.dim() == 4 && (mask.size(0) == images || mask.size(0) == 1) &&
                        mask.size(1) == 1 && mask.size(2) == height && mask.size(3) == width,
                    "[sample] denoise_mask must be [", height, ", ", width, "] or [", images,
                    " or 1, 1, ", height, ", ", width, "], got ", given.sizes(), ".");
  mask = mask.to(noise.scalar_type());
  check_finite(mask, "denoise_mask");
  TORCH_CHECK_VALUE(((mask >= 0) & (mask <= 1)).all().item<bool>(),
                    "[sample] denoise_mask must be within 0 and 1, got ", mask.min().item<double>(),
                    " to ", mask.max().item<double>(), ".");
  return mask;
}

// Where the sampler leaves a run.
double end_of(Sampler sampler, std::span<const double> sigmas) {
  const auto* known = std::find_if(kSamplers.begin(), kSamplers.end(),
                                   [sampler](const auto& info) { return info.sample == sampler; });
  if (sigmas.back() != 0 || known == kSamplers.end()) return sigmas.back();
  return end_above_zero(known->end_sigma, sigmas);
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
  const auto latent = options.latent.defined()
                          ? checked_latent(options.latent, "latent", unit_noise)
                          : torch::zeros_like(unit_noise);
  auto sampled_model = model;
  if (options.denoise_mask.defined()) {
    const auto mask = checked_mask(options.denoise_mask, unit_noise);
    const auto kept_noise = options.inpaint_noise.defined()
                                ? checked_latent(options.inpaint_noise, "inpaint_noise", unit_noise)
                                : unit_noise;
    sampled_model = inpaint_model(model, sampling, latent, kept_noise, mask);
  }

  auto sampler_options = options.sampler;
  sampler_options.flow = sampling.prediction() == Prediction::flow;
  sampler_options.flow_shift = sampling.flow_shift();
  // A run that is ended early returns a clean prediction, which is not to be scaled.
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
  TORCH_CHECK(is_finite(samples),
              "[sample] the final latent must be finite, got NaN or infinity in it: the model may "
              "have overflowed (try fp32 or bf16) or the guidance be too strong.");
  return sampling.inverse_noise_scaling(sigma_end, samples);
}

}  // namespace sag

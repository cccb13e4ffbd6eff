#include "sag/sample.h"

#include "sag/run_sampler.h"
#include "sag/schedules.h"
#include "sampling/run.h"

namespace sag {
namespace {

// The function that the sampler calls, made from the guider.
DenoiseFunction denoise_with(CfgGuider& guider, const SamplerInfo& sampler,
                             const SampleOptions& options) {
  return [&](const torch::Tensor& x, double sigma) {
    auto denoised =
        sampler.needs_uncond ? guider.predict_both(x, sigma) : Denoised(guider(x, sigma));
    // A copy: what is called may ask the guider, whose report then moves.
    if (options.evaluated) options.evaluated(EvaluationReport(guider.report().evaluations.back()));
    return denoised;
  };
}

// Noise of the part that inpainting keeps; undefined: the start noise.
torch::Tensor kept_noise(const SamplerInfo& sampler, const torch::Tensor& noise,
                         const SampleOptions& options) {
  if (options.inpaint_noise.defined() || !options.denoise_mask.defined() ||
      !sampler.keeps_with_noise_of_its_own)
    return options.inpaint_noise;
  auto seeds = seeds_or_count(options.seeds, noise.size(0));
  for (auto& seed : seeds) ++seed;
  return SeededNoise(seeds).draw(noise.sizes().slice(1), noise.device());
}

}  // namespace

std::vector<double> run_sigmas(const ModelSampling& sampling, const SampleOptions& options) {
  const auto& sampler = sampler_info(options.sampler);
  if (!options.sigmas.empty()) {
    check_sigmas(options.sigmas, "run_sigmas");
    return options.sigmas;
  }
  return get_sigmas(options.schedule, sampling, options.steps,
                    {.denoise = options.denoise,
                     .discard_penultimate_sigma = sampler.discards_penultimate_sigma});
}

torch::Tensor sample(CfgGuider& guider, const torch::Tensor& noise, const SampleOptions& options) {
  const auto& sampler = sampler_info(options.sampler);
  const auto& model = guider.model();
  const auto sigmas = run_sigmas(model.model_sampling(), options);
  check_latent(noise, "noise", "sample");
  TORCH_CHECK_VALUE(
      options.seeds.empty() || static_cast<std::int64_t>(options.seeds.size()) == noise.size(0),
      "[sample] seeds must be one per image, ", noise.size(0), ", got ", options.seeds.size(), ".");
  const auto here = [&](const torch::Tensor& t) {
    return t.defined() ? t.to(model.unet().device()) : t;
  };
  const auto start = here(noise);
  guider.begin_run(sigmas);
  return run_sampler_as("sample", sampler.sample, denoise_with(guider, sampler, options),
                        model.model_sampling(), start, sigmas,
                        {.latent = here(options.latent),
                         .denoise_mask = here(options.denoise_mask),
                         .inpaint_noise = here(kept_noise(sampler, start, options)),
                         .sampler = {.callback = options.callback,
                                     .noise_sampler = options.noise_sampler,
                                     .seeds = options.seeds,
                                     .eta = options.eta,
                                     .s_noise = options.s_noise}});
}

}  // namespace sag

#include "sampling.h"

#include <chrono>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/torch.h>

#include "errors.h"
#include "interrupt.h"
#include "sag/cfg_guider.h"
#include "sag/noise.h"
#include "sag/run_sampler.h"
#include "sag/samplers.h"

namespace sag_sample {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The guider, with a look at the clock and at the user after every evaluation.
class TimedModel {
 public:
  TimedModel(sag::CfgGuider& guider, bool both, torch::Device device)
      : guider_(guider), both_(both), device_(device) {}

  sag::Denoised operator()(const torch::Tensor& x, double sigma) {
    if (interrupted()) throw RunError("Interrupted; nothing was written.");
    const auto start = Clock::now();
    auto denoised = evaluate(x, sigma);
    // CUDA works in the background: without waiting, neither bar nor times nor Ctrl-C would mean
    // anything.
    if (device_.is_cuda()) torch::cuda::synchronize(device_.index());
    seconds_.push_back(seconds_since(start));
    return denoised;
  }

  const std::vector<double>& seconds() const { return seconds_; }

 private:
  sag::Denoised evaluate(const torch::Tensor& x, double sigma) {
    return both_ ? guider_.predict_both(x, sigma) : sag::Denoised(guider_(x, sigma));
  }

  sag::CfgGuider& guider_;
  bool both_;
  torch::Device device_;
  std::vector<double> seconds_;
};

torch::Tensor start_noise(std::vector<std::uint64_t> seeds, const Inputs& inputs,
                          torch::Device device) {
  return sag::SeededNoise(seeds).draw(inputs.shape, device);
}

// What is kept is noised with the start noise, in ddim with noise of its own, as in ComfyUI.
torch::Tensor inpaint_noise(const Batch& batch, const Inputs& inputs, const Settings& settings) {
  if (batch.inpaint_noise.defined() || !batch.mask.defined() || settings.sampler != "ddim")
    return batch.inpaint_noise;
  auto seeds = batch.seeds;
  for (auto& seed : seeds) ++seed;
  return start_noise(std::move(seeds), inputs, settings.device);
}

const sag::GuidanceNote* note_of(const sag::EvaluationReport& evaluation) {
  return evaluation.guidances.empty() ? nullptr : &evaluation.guidances.front();
}

std::vector<StepReport> step_reports(const sag::GuiderReport& report,
                                     const std::vector<double>& seconds) {
  std::vector<StepReport> steps;
  for (std::size_t i = 0; i < report.evaluations.size(); ++i) {
    const auto& evaluation = report.evaluations[i];
    StepReport step = {.step = evaluation.step_index,
                       .sigma = evaluation.sigma,
                       .evaluations = evaluation.unet_calls,
                       .rows = evaluation.unet_rows,
                       .seconds = seconds[i]};
    if (const auto* note = note_of(evaluation)) {
      step.guided = note->guided;
      step.reason = note->reason;
      if (note->mask.defined()) step.masked = note->mask.to(torch::kFloat).mean().item<double>();
    }
    steps.push_back(std::move(step));
  }
  return steps;
}

torch::Tensor mean_mask(const sag::GuiderReport& report) {
  torch::Tensor sum;
  std::int64_t count = 0;
  for (const auto& evaluation : report.evaluations) {
    const auto* note = note_of(evaluation);
    if (!note || !note->guided || !note->mask.defined()) continue;
    const auto mask = note->mask.to(torch::kFloat);
    sum = sum.defined() ? sum + mask : mask;
    ++count;
  }
  return sum.defined() ? (sum / count).cpu() : sum;
}

}  // namespace

double work(const Inputs& inputs, const Batch& batch, bool guided) {
  const auto rows = batch.positive.size() + batch.negative.size() + (guided ? 1 : 0);
  return static_cast<double>(inputs.sigmas.size() - 1) *
         static_cast<double>(batch.pictures.size() * rows);
}

Sampled sample_batch(const sag::ModelPatcher& model, bool guided, const Settings& settings,
                     const Options& options, const Inputs& inputs, const Batch& batch,
                     Progress& progress) {
  const auto start = Clock::now();
  sag::CfgGuider guider(model, batch.positive, batch.negative,
                        {.cond_scale = batch.cfg, .max_rows = options.max_rows});
  guider.begin_run(inputs.sigmas);
  const auto& sampler = sag::sampler_info(settings.sampler);
  TimedModel timed(guider, sampler.needs_uncond, settings.device);
  sag::RunSamplerOptions sample_options = {.denoise_mask = batch.mask,
                                           .inpaint_noise = inpaint_noise(batch, inputs, settings),
                                           .sampler = {.seeds = batch.seeds,
                                                       .eta = options.eta.value_or(1.0),
                                                       .s_noise = options.s_noise.value_or(1.0)}};
  if (batch.latent.defined()) sample_options.latent = batch.latent * options.latent_scale;
  std::int64_t calls = 0;
  const auto steps = static_cast<double>(inputs.sigmas.size() - 1);
  sample_options.sampler.callback = [&](const sag::SamplerProgress& at) {
    const auto now = guider.report().unet_calls();
    progress.advance(work(inputs, batch, guided) / steps, now - std::exchange(calls, now),
                     fmt::format("{}, step {} of {}, sigma {:.3f}", guided ? "guided" : "unguided",
                                 at.step + 1, at.steps, at.sigma));
    return true;
  };
  const auto noise =
      batch.noise.defined() ? batch.noise : start_noise(batch.seeds, inputs, settings.device);
  const auto latents = sag::run_sampler(sampler.sample, std::ref(timed), settings.sampling, noise,
                                        inputs.sigmas, sample_options);
  Sampled sampled = {.latents = (latents / options.latent_scale).to(torch::kCPU, torch::kFloat),
                     .heat = mean_mask(guider.report())};
  sampled.report = {.guided = guided,
                    .pictures = batch.pictures,
                    .cfg = batch.cfg,
                    .steps = step_reports(guider.report(), timed.seconds()),
                    .seconds = seconds_since(start)};
  return sampled;
}

}  // namespace sag_sample

#include "sampling.h"

#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>

#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/torch.h>

#include "errors.h"
#include "interrupt.h"
#include "sag/cfg_guider.h"
#include "sag/inpaint.h"
#include "sag/noise.h"
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
  TimedModel(sag::CfgGuider& guider, torch::Device device) : guider_(guider), device_(device) {}

  torch::Tensor operator()(const torch::Tensor& x, double sigma) {
    if (interrupted()) throw RunError("Interrupted; nothing was written.");
    const auto start = Clock::now();
    auto denoised = guider_(x, sigma);
    // CUDA works in the background: without waiting, neither bar nor times nor Ctrl-C would mean
    // anything.
    if (device_.is_cuda()) torch::cuda::synchronize(device_.index());
    seconds_.push_back(seconds_since(start));
    return denoised;
  }

  const std::vector<double>& seconds() const { return seconds_; }

 private:
  sag::CfgGuider& guider_;
  torch::Device device_;
  std::vector<double> seconds_;
};

// The start noise, and after it, from the same seeds, what samplers add.
struct Noise {
  torch::Tensor start;
  sag::NoiseSampler later;
};

Noise make_noise(const Batch& batch, const Inputs& inputs, torch::Device device) {
  const auto seeded = std::make_shared<sag::SeededNoise>(batch.seeds);
  const auto drawn = seeded->draw(inputs.shape, device);
  return {batch.noise.defined() ? batch.noise : drawn, sag::seeded_noise_sampler(seeded, drawn)};
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
  sag::CfgGuider guider(
      model, batch.positive, batch.negative,
      {.cond_scale = batch.cfg, .sigmas = inputs.sigmas, .max_rows = options.max_rows});
  TimedModel timed(guider, settings.device);
  const auto noise = make_noise(batch, inputs, settings.device);
  sag::DenoiseFunction denoise = std::ref(timed);
  sag::SampleOptions sample_options;
  if (batch.latent.defined()) sample_options.latent = batch.latent * options.latent_scale;
  if (batch.inpaint_noise.defined()) {
    denoise = sag::inpaint_model(denoise, settings.sampling, sample_options.latent,
                                 batch.inpaint_noise, batch.mask);
  } else {
    sample_options.denoise_mask = batch.mask;
  }
  std::int64_t calls = 0;
  const auto steps = static_cast<double>(inputs.sigmas.size() - 1);
  sample_options.sampler.noise_sampler = noise.later;
  sample_options.sampler.callback = [&](const sag::SamplerProgress& at) {
    const auto now = guider.report().unet_calls();
    progress.advance(work(inputs, batch, guided) / steps, now - std::exchange(calls, now),
                     fmt::format("{}, step {} of {}, sigma {:.3f}", guided ? "guided" : "unguided",
                                 at.step + 1, at.steps, at.sigma));
    return true;
  };
  const auto latents = sag::sample(sag::get_sampler(settings.sampler), denoise, settings.sampling,
                                   noise.start, inputs.sigmas, sample_options);
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

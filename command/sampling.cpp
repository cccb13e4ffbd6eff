#include "sampling.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/torch.h>

#include "errors.h"
#include "interrupt.h"
#include "sag/cfg_guider.h"

namespace sag_sample {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

// Looks at the clock and at the user after every evaluation.
class Watch {
 public:
  explicit Watch(torch::Device device) : device_(device) {}

  void look() {
    // CUDA works in the background: without waiting, neither times nor Ctrl-C would mean anything.
    if (device_.is_cuda()) torch::cuda::synchronize(device_.index());
    const auto now = Clock::now();
    seconds_.push_back(seconds_between(std::exchange(last_, now), now));
    if (interrupted()) throw RunError("Interrupted; nothing was written.");
  }

  /// From one evaluation's end to the next one's.
  const std::vector<double>& seconds() const { return seconds_; }
  double total() const { return seconds_between(start_, Clock::now()); }

 private:
  torch::Device device_;
  Clock::time_point start_ = Clock::now(), last_ = start_;
  std::vector<double> seconds_;
};

double work(const GuidedModel& model, const Batch& batch) {
  const auto rows = batch.positive.size() + batch.negative.size() + model.guidances.size();
  return static_cast<double>(batch.pictures.size() * rows);
}

NoteReport note_report(const sag::GuidanceNote& note) {
  NoteReport report = {.guidance = note.name, .guided = note.guided, .reason = note.reason};
  if (note.mask.defined()) report.masked = note.mask.to(torch::kFloat).mean().item<double>();
  return report;
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
                       .filler_rows = evaluation.filler_rows,
                       .seconds = seconds[i]};
    for (const auto& note : evaluation.guidances) step.notes.push_back(note_report(note));
    steps.push_back(std::move(step));
  }
  return steps;
}

// The mean of a guidance's masks over the steps that it guided; undefined: there was none.
torch::Tensor mean_mask(const sag::GuiderReport& report, const std::string& guidance) {
  torch::Tensor sum;
  std::int64_t count = 0;
  for (const auto& evaluation : report.evaluations) {
    for (const auto& note : evaluation.guidances) {
      if (note.name != guidance || !note.guided || !note.mask.defined()) continue;
      const auto mask = note.mask.to(torch::kFloat);
      sum = sum.defined() ? sum + mask : mask;
      ++count;
    }
  }
  return sum.defined() ? (sum / count).cpu() : sum;
}

// Puts the rows of a batch into their places among all pictures.
void collect(torch::Tensor& all, const torch::Tensor& of_batch, const Batch& batch,
             std::int64_t images) {
  if (!of_batch.defined()) return;
  if (!all.defined()) {
    auto sizes = of_batch.sizes().vec();
    sizes[0] = images;
    all = torch::zeros(sizes, of_batch.options());
  }
  const std::vector<std::int64_t> rows(batch.pictures.begin(), batch.pictures.end());
  all.index_copy_(0, torch::tensor(rows), of_batch);
}

sag::SampleOptions options_for(const Batch& batch, const SamplingPlan& plan) {
  auto options = plan.options;
  if (batch.latent.defined()) options.latent = batch.latent * plan.latent_scale;
  options.denoise_mask = batch.mask;
  options.inpaint_noise = batch.inpaint_noise;
  options.seeds = batch.seeds;
  return options;
}

// Samples one batch into its places in `all`.
void sample_batch(const GuidedModel& model, const Batch& batch, const SamplingPlan& plan,
                  Progress& progress, Sampled& all) {
  sag::CfgGuider guider(
      model.model, batch.positive, batch.negative,
      {.cond_scale = batch.cfg, .cfg_window = plan.cfg_window, .max_rows = plan.max_rows});
  auto options = options_for(batch, plan);
  Watch watch(model.model.unet().device());
  options.evaluated = [&](const sag::EvaluationReport&) { watch.look(); };
  std::int64_t calls = 0;
  options.callback = [&](const sag::SamplerProgress& at) {
    const auto now = guider.report().unet_calls();
    progress.advance(work(model, batch) / static_cast<double>(plan.steps()),
                     now - std::exchange(calls, now),
                     fmt::format("{}, step {} of {}, sigma {:.3f}",
                                 model.guidances.empty() ? "unguided" : "guided", at.step + 1,
                                 at.steps, at.sigma));
    return true;
  };
  const auto latents = sag::sample(guider, batch.noise, options) / plan.latent_scale;
  const auto images = all.latents.size(0);
  collect(all.latents, latents.to(torch::kCPU, torch::kFloat), batch, images);
  for (const auto& guidance : model.guidances) {
    collect(all.masks[guidance], mean_mask(guider.report(), guidance), batch, images);
  }
  all.runs.push_back({.guidances = model.guidances,
                      .pictures = batch.pictures,
                      .cfg = batch.cfg,
                      .steps = step_reports(guider.report(), watch.seconds()),
                      .sites = guider.report().sites,
                      .seconds = watch.total()});
}

}  // namespace

double work(const GuidedModel& model, const std::vector<Batch>& batches) {
  double sum = 0;
  for (const auto& batch : batches) sum += work(model, batch);
  return sum;
}

Sampled sample_batches(const GuidedModel& model, const std::vector<Batch>& batches,
                       const SamplingPlan& plan, Progress& progress) {
  std::int64_t images = 0;
  for (const auto& batch : batches) images += static_cast<std::int64_t>(batch.pictures.size());
  auto sizes = batches.front().noise.sizes().vec();
  sizes[0] = images;
  Sampled sampled = {.latents = torch::zeros(sizes, torch::kFloat)};
  for (const auto& batch : batches) sample_batch(model, batch, plan, progress, sampled);
  return sampled;
}

}  // namespace sag_sample

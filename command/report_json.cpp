#include "report_json.h"

#include <cmath>
#include <string>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "sag/version.h"

namespace sag_sample {
namespace {

using json = nlohmann::ordered_json;

// JSON has no infinity.
json finite(double value) {
  return std::isfinite(value) ? json(value) : json(nullptr);
}

template <typename T>
json optional(const std::optional<T>& value) {
  return value ? json(*value) : json(nullptr);
}

const char* dtype_name(torch::ScalarType dtype) {
  return dtype == torch::kHalf ? "fp16" : dtype == torch::kBFloat16 ? "bf16" : "fp32";
}

json options_json(const Options& options, const Settings& settings, const Inputs& inputs) {
  const auto& sag = settings.guidance;
  json guidance = nullptr;
  if (settings.guided) {
    guidance = {{"scale", sag.scale},
                {"blur_sigma", sag.blur_sigma},
                {"threshold", sag.threshold},
                {"kernel_size", sag.kernel_size},
                {"sigma_start", finite(sag.sigma_start)},
                {"sigma_end", sag.sigma_end},
                {"interval", sag.interval},
                {"one_pass", sag.one_pass},
                {"shuffle", options.sag_shuffle},
                {"start_percent", optional(sag.start_percent)},
                {"end_percent", optional(sag.end_percent)},
                {"site", sag.site.name()}};
  }
  return {{"model", options.model},
          {"unet", settings.unet},
          {"prediction", settings.prediction},
          {"sampler", settings.sampler},
          {"schedule", options.sigmas.empty() ? json(settings.schedule) : json(nullptr)},
          {"steps", inputs.sigmas.size() - 1},
          {"sigmas", inputs.sigmas},
          {"denoise", settings.denoise},
          {"cfg", settings.cfg},
          {"negative", options.negative.value_or("")},
          {"sag", guidance},
          {"compare", options.compare},
          {"device", settings.device.str()},
          {"dtype", dtype_name(settings.dtype)},
          {"max_rows", options.max_rows},
          {"latent_shape", inputs.shape}};
}

json picture_json(const Picture& picture, bool seeded) {
  return {{"prompt", picture.prompt},
          {"unconditional", picture.unconditional},
          {"seed", seeded ? json(picture.seed) : json(nullptr)}};
}

json step_json(const StepReport& step) {
  return {{"step", step.step},
          {"sigma", step.sigma},
          {"evaluations", step.evaluations},
          {"rows", step.rows},
          {"guided", step.guided},
          {"reason", step.reason},
          {"masked", optional(step.masked)},
          {"seconds", step.seconds}};
}

json run_json(const RunReport& run) {
  json steps = json::array();
  for (const auto& step : run.steps) steps.push_back(step_json(step));
  const Totals totals = total({run});
  return {{"kind", run.guided ? "guided" : "unguided"},
          {"pictures", run.pictures},
          {"cfg", run.cfg},
          {"evaluations", totals.evaluations},
          {"rows", totals.rows},
          {"guided_steps", totals.guided},
          {"skipped", totals.skipped},
          {"seconds", run.seconds},
          {"steps", steps}};
}

json graphs_json(const sag::CudaGraphReport& graphs) {
  return {{"captures", graphs.captures},
          {"replays", graphs.replays},
          {"bytes", graphs.bytes},
          {"eager", graphs.eager},
          {"failure", graphs.failure}};
}

}  // namespace

std::string report_json(const Options& options, const Settings& settings, const Inputs& inputs,
                        const std::vector<RunReport>& runs,
                        const std::optional<sag::CudaGraphReport>& graphs) {
  const Totals totals = total(runs);
  json pictures = json::array(), run_list = json::array();
  for (const auto& picture : inputs.pictures)
    pictures.push_back(picture_json(picture, options.noise.empty()));
  for (const auto& run : runs) run_list.push_back(run_json(run));
  const json report = {{"sag_sample", fmt::format("{}.{}.{}", SAG_VERSION_MAJOR, SAG_VERSION_MINOR,
                                                  SAG_VERSION_PATCH)},
                       {"options", options_json(options, settings, inputs)},
                       {"pictures", pictures},
                       {"evaluations", totals.evaluations},
                       {"rows", totals.rows},
                       {"guided_steps", totals.guided},
                       {"skipped", totals.skipped},
                       {"notes", inputs.notes},
                       {"masked", totals.guided > 0 ? json(totals.masked) : json(nullptr)},
                       {"seconds", totals.seconds},
                       {"cuda_graphs", graphs ? graphs_json(*graphs) : json(nullptr)},
                       {"runs", run_list}};
  // Prompts may hold anything: what is no UTF-8 is replaced.
  return report.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace sag_sample

#include "report_json.h"

#include <cmath>
#include <type_traits>
#include <variant>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "files/unet_file.h"
#include "sag/checkpoint.h"
#include "sag/cuda_graph_unet.h"
#include "sag/version.h"

namespace sag_sample {
namespace {

using json = nlohmann::ordered_json;

json to_json(const Value& value) {
  return std::visit(
      [](const auto& held) -> json {
        using Held = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<Held, std::monostate>) {
          return nullptr;
        } else if constexpr (std::is_same_v<Held, double>) {
          // JSON has no infinity.
          return std::isfinite(held) ? json(held) : json(nullptr);
        } else {
          return held;
        }
      },
      value);
}

json to_json(const std::optional<double>& value) {
  return value ? json(*value) : json(nullptr);
}

void add(json& object, const std::vector<std::pair<std::string, Value>>& values) {
  for (const auto& [key, value] : values) object[key] = to_json(value);
}

json options_json(const Settings& settings, const Inputs& inputs, const SamplingPlan& plan,
                  const sag::UNet& unet) {
  json options;
  add(options, source_options().report(settings.source));
  add(options, checkpoint_options().report(settings.checkpoint));
  options["unet"] = settings.network.files.unet;
  options["prediction"] = settings.network.prediction;
  options["latent_scale"] = settings.network.latent_scale;
  add(options, sampling_options().report(plan.options));
  if (!plan.options.sigmas.empty()) options["schedule"] = nullptr;
  options["steps"] = plan.steps();
  options["sigmas"] = plan.sigmas;
  add(options, guider_options().report(settings.guider));
  add(options, further_options().report(settings.further));
  add(options, picture_options().report(settings.pictures));
  add(options, guidance_options().report(settings.guidance));
  for (const auto& kind : guidance_kinds()) options[kind.key] = nullptr;
  for (const auto& guidance : settings.guidances) {
    options[guidance.key] = json::object();
    add(options[guidance.key], guidance.options);
  }
  add(options, output_options().report(settings.output));
  options["device"] = unet.device().str();
  options["dtype"] = short_name(unet.dtype());
  options["latent_shape"] = {inputs.size.channels, inputs.size.height, inputs.size.width};
  return options;
}

json picture_json(const Picture& picture, bool seeded) {
  return {{"prompt", picture.prompt},
          {"unconditional", picture.unconditional},
          {"seed", seeded ? json(picture.seed) : json(nullptr)}};
}

json note_json(const NoteReport& note) {
  return {{"guidance", note.guidance},
          {"guided", note.guided},
          {"reason", note.reason},
          {"masked", to_json(note.masked)}};
}

json step_json(const StepReport& step) {
  const auto summary = summary_of(step);
  json notes = json::array();
  for (const auto& note : step.notes) notes.push_back(note_json(note));
  return {{"step", step.step},
          {"sigma", step.sigma},
          {"evaluations", step.evaluations},
          {"rows", step.rows},
          {"filler_rows", step.filler_rows},
          {"guided", summary.guided},
          {"reason", summary.reason},
          {"masked", to_json(summary.masked)},
          {"guidances", notes},
          {"seconds", step.seconds}};
}

json run_json(const RunReport& run) {
  json steps = json::array(), sites = json::array();
  for (const auto& step : run.steps) steps.push_back(step_json(step));
  for (const auto& site : run.sites) {
    sites.push_back({{"asked", site.asked}, {"site", site.site}, {"reason", site.reason}});
  }
  const Totals totals = total({run});
  const GuidanceTotals guidance = guidance_total({run});
  return {{"kind", run.guidances.empty() ? "unguided" : "guided"},
          {"guidances", run.guidances},
          {"sites", sites},
          {"pictures", run.pictures},
          {"cfg", run.cfg},
          {"evaluations", totals.evaluations},
          {"rows", totals.rows},
          {"filler_rows", totals.filler_rows},
          {"guided_steps", guidance.guided},
          {"skipped", guidance.skipped},
          {"seconds", run.seconds},
          {"steps", steps}};
}

// What was found out about a checkpoint.
json checkpoint_json(const Network& network) {
  if (!network.checkpoint) return nullptr;
  const auto& info = network.checkpoint->info();
  return {{"family", info.family},
          {"prediction", std::string(sag::to_string(info.prediction))},
          {"prediction_reason", info.prediction_reason},
          {"zero_terminal_snr", info.zero_terminal_snr},
          {"dtype", short_name(info.dtype)},
          {"not_needed", info.skipped}};
}

json graphs_json(const sag::UNet& unet) {
  const auto* captured = dynamic_cast<const sag::CudaGraphUNet*>(&unet);
  if (!captured) return nullptr;
  const auto graphs = captured->report();
  return {{"captures", graphs.captures},
          {"replays", graphs.replays},
          {"bytes", graphs.bytes},
          {"eager", graphs.eager},
          {"failure", graphs.failure}};
}

}  // namespace

std::string report_json(const Settings& settings, const Inputs& inputs, const SamplingPlan& plan,
                        const std::vector<RunReport>& runs, const sag::UNet& unet) {
  const Totals totals = total(runs);
  const GuidanceTotals guidance = guidance_total(runs);
  json pictures = json::array(), run_list = json::array();
  for (const auto& picture : inputs.pictures) {
    pictures.push_back(picture_json(picture, settings.pictures.noise.empty()));
  }
  for (const auto& run : runs) run_list.push_back(run_json(run));
  const json report = {{"sag_sample", fmt::format("{}.{}.{}", SAG_VERSION_MAJOR, SAG_VERSION_MINOR,
                                                  SAG_VERSION_PATCH)},
                       {"options", options_json(settings, inputs, plan, unet)},
                       {"checkpoint", checkpoint_json(settings.network)},
                       {"pictures", pictures},
                       {"evaluations", totals.evaluations},
                       {"rows", totals.rows},
                       {"filler_rows", totals.filler_rows},
                       {"guided_steps", guidance.guided},
                       {"skipped", guidance.skipped},
                       {"notes", inputs.notes},
                       {"masked", to_json(guidance.masked)},
                       {"seconds", totals.seconds},
                       {"cuda_graphs", graphs_json(unet)},
                       {"runs", run_list}};
  // Prompts may hold anything: what is not UTF-8 is replaced.
  return report.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace sag_sample

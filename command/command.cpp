#include "command.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/torch.h>

#include "checkpoint.h"
#include "drawing.h"
#include "errors.h"
#include "files/output_file.h"
#include "files/tensor_file.h"
#include "further_inputs.h"
#include "guidance_rows.h"
#include "input_tensors.h"
#include "inputs.h"
#include "model_networks.h"
#include "picture/pictures.h"
#include "picture/png_file.h"
#include "progress.h"
#include "report_json.h"
#include "sag/checkpoint.h"
#include "sag/cuda_graph_unet.h"
#include "sampling.h"
#include "settings.h"
#include "sites.h"

namespace sag_sample {
namespace {

// The files to write, checked before anything is computed.
struct Outputs {
  std::optional<OutputFile> out, latent, json;
};

Outputs open_outputs(const OutputOptions& options) {
  Outputs outputs;
  if (!options.out.empty()) outputs.out.emplace("--out", options.out);
  if (!options.save_latent.empty()) outputs.latent.emplace("--save-latent", options.save_latent);
  if (!options.json.empty()) outputs.json.emplace("--json", options.json);
  return outputs;
}

// All files are whole before the first gets its name.
void write_outputs(Outputs& outputs, const std::string& png, const torch::Tensor& latents,
                   const std::string& json) {
  if (outputs.out) outputs.out->write(png);
  if (outputs.latent) outputs.latent->write(tensor_file_bytes(latents));
  if (outputs.json) outputs.json->write(json);
  for (auto* output : {&outputs.out, &outputs.latent, &outputs.json}) {
    if (*output) (*output)->commit();
  }
}

void set_up_torch(const DeviceOptions& options) {
  if (options.threads) at::set_num_threads(static_cast<int>(*options.threads));
  // LibTorch lets convolutions use TF32 unless told otherwise.
  at::globalContext().setAllowTF32CuDNN(options.tf32);
  at::globalContext().setAllowTF32CuBLAS(options.tf32);
}

// Nothing: the latents are pictures.
std::optional<sag::PictureNetwork> load_decoder(const Network& network, std::int64_t channels,
                                                torch::Device device) {
  auto decoder = load_decoder(network, device);
  if (decoder || is_picture(channels)) return decoder;
  throw UsageError(
      fmt::format("--out needs a model with a decoder to make pictures of latents with {} "
                  "channels; --save-latent saves them.",
                  channels));
}

SamplingPlan make_plan(const Settings& settings) {
  SamplingPlan plan = {.options = settings.sampling,
                       .max_rows = settings.guider.max_rows,
                       .cfg_window = settings.guider.cfg_window,
                       .latent_scale = settings.network.latent_scale};
  if (!settings.pictures.sigmas.empty()) {
    plan.options.sigmas = read_sigmas(settings.pictures.sigmas);
  }
  plan.sigmas = sag::run_sigmas(settings.network.noise_levels, plan.options);
  return plan;
}

// The key of FILE:KEY says which prompt a tensor is of.
bool says_negative(const std::string& where) {
  const auto key = where.substr(where.rfind(':') + 1);
  return where.find(':') != std::string::npos &&
         (key.find("uncond") != std::string::npos || key.find("neg") != std::string::npos);
}

// What was guessed of a checkpoint, or contradicts itself.
std::vector<std::string> notes_on(const sag::CheckpointInfo& info) {
  auto notes = info.notes;
  if (info.prediction_reason.starts_with("judged")) {
    notes.push_back(fmt::format("that it predicts {} was {}; --prediction decides otherwise",
                                sag::to_string(info.prediction), info.prediction_reason));
  }
  return notes;
}

// What a run does that its user may not have meant.
std::vector<std::string> notes_on(const Settings& settings) {
  const auto& pictures = settings.pictures;
  std::vector<std::string> notes;
  if (settings.network.checkpoint) notes = notes_on(settings.network.checkpoint->info());
  const bool starts =
      (!pictures.image.empty() || !pictures.latent.empty()) && starts_from_picture(settings);
  if (starts && pictures.mask.empty() && pictures.sigmas.empty() &&
      settings.sampling.denoise == 1) {
    notes.push_back("nothing is left of the start picture; --denoise 0.6, say, keeps some of it");
  }
  if (says_negative(pictures.cond) && !says_negative(pictures.uncond)) {
    notes.push_back(
        fmt::format("--cond is {}, which sounds like the other one: were --cond and --uncond "
                    "swapped?",
                    pictures.cond));
  }
  const bool steers_away = std::any_of(
      settings.guidances.begin(), settings.guidances.end(), [](const Guidance& guidance) {
        return guidance.needs_uncond || guidance.needs_cross_attention;
      });
  if (!pictures.negative.empty() && settings.guider.cond_scale == 1 && !steers_away) {
    notes.push_back("--negative is not used at cfg 1; --guidance nag steers away from it there");
  }
  if (pictures.cond.empty() || !pictures.uncond.empty()) return notes;
  for (const auto& guidance : settings.guidances) {
    if (!guidance.needs_uncond) continue;
    notes.push_back(
        fmt::format("{} needs an unconditional prediction: give --uncond", guidance.title));
  }
  return notes;
}

// What rows cost that nobody asked for.
void note_fillers(Inputs& inputs, const std::vector<RunReport>& runs) {
  const Totals totals = total(runs);
  if (totals.filler_rows == 0) return;
  inputs.notes.push_back(fmt::format(
      "{} of {} rows only filled calls of the UNet up, as its file takes some numbers of rows only",
      totals.filler_rows, totals.rows));
}

GuidedModel guide(const sag::ModelPatcher& plain, std::span<const Guidance> guidances) {
  GuidedModel guided = {plain};
  for (const auto& guidance : guidances) {
    guided.model = guidance.apply(guided.model);
    guided.guidances.push_back(guidance.name);
  }
  return guided;
}

// A model whose pictures stand beside the guided ones, and the header of their column.
struct Compared {
  std::string header;
  GuidedModel model;
};

// The unguided model, and where there are several guidances each alone.
std::vector<Compared> to_compare(const GuidedModel& plain, std::span<const Guidance> guidances) {
  std::vector<Compared> compared = {{"unguided", plain}};
  if (guidances.size() == 1) return compared;
  for (std::size_t i = 0; i < guidances.size(); ++i)
    compared.push_back({guidances[i].label, guide(plain.model, guidances.subspan(i, 1))});
  return compared;
}

// How it was sampled, in one line.
std::string describe_run(const Settings& settings, const SamplingPlan& plan, const Inputs& inputs) {
  std::string text = fmt::format("{} {} steps", plan.steps(), plan.options.sampler);
  if (plan.options.sigmas.empty()) text += fmt::format(", {}", plan.options.schedule);
  const auto prompted = std::find_if(inputs.batches.begin(), inputs.batches.end(),
                                     [](const Batch& batch) { return !batch.positive.empty(); });
  if (prompted != inputs.batches.end()) {
    text += fmt::format(", cfg {:g}{}", prompted->cfg,
                        is_everywhere(settings.guider.cfg_window) ? "" : " in a window");
  }
  for (const auto& guidance : settings.guidances) text += ", " + guidance.summary;
  return text;
}

// The picture or the sheet, as a PNG file.
std::string draw_png(const Settings& settings, const Inputs& inputs, const SamplingPlan& plan,
                     const Sampled& sampled, const std::vector<Compared>& compared,
                     const std::vector<Sampled>& others,
                     const std::optional<sag::PictureNetwork>& decoder) {
  const auto pictures = [&](const torch::Tensor& latents) {
    return decoder ? decoder->run(latents) : latents;
  };
  Drawn drawn = {.pictures = pictures(sampled.latents),
                 .footer = describe_run(settings, plan, inputs)};
  for (std::size_t i = 0; i < compared.size(); ++i)
    drawn.compared.emplace_back(compared[i].header, pictures(others[i].latents));
  for (const auto& guidance : settings.guidances) {
    if (guidance.mask_header.empty()) continue;
    const auto mask = sampled.masks.find(guidance.name);
    drawn.masks.emplace_back(guidance.mask_header,
                             mask == sampled.masks.end() ? torch::Tensor() : mask->second);
  }
  drawn.guided_header = settings.guidances.size() == 1
                            ? "guided by " + settings.guidances.front().label
                            : "all together";
  return encode_png(draw(drawn, inputs.pictures, settings.output));
}

void print_summary(const Settings& settings, const Inputs& inputs,
                   const std::vector<RunReport>& runs, const sag::UNet& unet, std::ostream& out) {
  const Totals totals = total(runs);
  const std::size_t pictures = inputs.pictures.size();
  out << fmt::format("{} {} on {}: {} calls of the UNet in {:.1f} s\n", pictures,
                     pictures == 1 ? "picture" : "pictures", unet.device().str(),
                     totals.evaluations, totals.seconds);
  for (const auto& guidance : settings.guidances) {
    out << guidance.title << ": " << guidance_summary(guidance_total(runs, guidance.name)) << '\n';
  }
  for (const auto& note : inputs.notes) out << "note: " << note << '\n';
}

void print_outputs(const Outputs& outputs, const sag::UNet& unet, std::ostream& out) {
  for (const auto* output : {&outputs.out, &outputs.latent, &outputs.json}) {
    if (*output) out << "wrote " << (*output)->path() << '\n';
  }
  const auto* graphs = dynamic_cast<const sag::CudaGraphUNet*>(&unet);
  if (graphs && !graphs->report().failure.empty()) {
    out << "without CUDA graphs, as capturing one failed: " << graphs->report().failure << '\n';
  }
}

void draw_pictures(const Settings& settings, const std::shared_ptr<const sag::UNet>& unet,
                   ComingTextEncoder encoder, std::ostream& out) {
  auto outputs = open_outputs(settings.output);
  const auto plan = make_plan(settings);
  auto inputs = read_inputs(settings, std::move(encoder), unet->device());
  for (auto& note : notes_on(settings)) inputs.notes.push_back(std::move(note));
  const GuidedModel plain = {sag::ModelPatcher(unet, settings.network.noise_levels)};
  for (const auto& guidance : settings.guidances) check_sites(plain.model, guidance);
  const GuidedModel guided = guide(plain.model, settings.guidances);
  const auto decoder = outputs.out
                           ? load_decoder(settings.network, inputs.size.channels, unet->device())
                           : std::nullopt;

  const auto compared =
      settings.output.compare ? to_compare(plain, settings.guidances) : std::vector<Compared>();
  double all = work(guided, inputs.batches);
  for (const auto& other : compared) all += work(other.model, inputs.batches);
  Progress progress(Progress::style_for(settings.output.quiet), all);
  std::vector<Sampled> others;
  for (const auto& other : compared)
    others.push_back(sample_batches(other.model, inputs.batches, plan, progress));
  const auto sampled = sample_batches(guided, inputs.batches, plan, progress);
  progress.finish();

  std::vector<RunReport> runs;
  for (const auto& other : others) runs.insert(runs.end(), other.runs.begin(), other.runs.end());
  runs.insert(runs.end(), sampled.runs.begin(), sampled.runs.end());
  note_fillers(inputs, runs);
  std::string png;
  if (outputs.out) png = draw_png(settings, inputs, plan, sampled, compared, others, decoder);
  write_outputs(outputs, png, sampled.latents, report_json(settings, inputs, plan, runs, *unet));
  if (settings.output.quiet) return;
  print_summary(settings, inputs, runs, *unet, out);
  print_outputs(outputs, *unet, out);
}

void load_and_draw(const Settings& settings, std::ostream& out) {
  // What cannot be written, or is missing, is said before minutes of loading.
  static_cast<void>(open_outputs(settings.output));
  check_is_asked_for_pictures(settings);
  check_further_inputs(settings);
  auto encoder = start_text_encoder(settings);
  auto unet = load_unet(settings.network, settings.unet);
  if (unet->device().is_cuda() && !settings.device.no_cuda_graph) {
    unet = std::make_shared<sag::CudaGraphUNet>(unet);
  }
  draw_pictures(settings, unet, std::move(encoder), out);
}

}  // namespace

void run_command(const Choices& command_line, std::ostream& out) {
  const auto source = source_options().decide(command_line);
  std::optional<ModelDirectory> directory;
  if (!source.model.empty()) directory = read_model_directory(source.model);
  if (!source.checkpoint.empty()) {
    auto files = checkpoint_options().decide(command_line);
    if (command_line.contains("--prediction")) {
      files.prediction = network_options().decide(command_line).prediction;
    }
    const auto checkpoint = open_checkpoint(source.checkpoint, files);
    if (source.describe) return describe_checkpoint(*checkpoint, source.checkpoint, out);
    directory = model_of(checkpoint, source.checkpoint);
  }
  const auto settings = decide_settings(command_line, directory ? &*directory : nullptr);
  set_up_torch(settings.device);
  if (settings.source.list_sites) {
    const auto unet = load_unet(settings.network, settings.unet);
    list_sites(settings.pictures, settings.network, *unet, out);
  } else {
    load_and_draw(settings, out);
  }
}

}  // namespace sag_sample

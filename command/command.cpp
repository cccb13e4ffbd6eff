#include "command.h"

#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/torch.h>

#include "drawing.h"
#include "errors.h"
#include "files/networks.h"
#include "files/output_file.h"
#include "files/tensor_file.h"
#include "files/unet_file.h"
#include "inputs.h"
#include "picture/pictures.h"
#include "picture/png_file.h"
#include "progress.h"
#include "report.h"
#include "report_json.h"
#include "sag/cuda_graph_unet.h"
#include "sag/self_attention_guidance.h"
#include "sampling.h"
#include "shuffle.h"
#include "sites.h"

namespace sag_sample {
namespace {

// The files to write, checked before anything is computed.
struct Outputs {
  std::optional<OutputFile> out, latent, json;
};

Outputs open_outputs(const Options& options) {
  Outputs outputs;
  if (!options.out.empty()) outputs.out.emplace("--out", options.out);
  if (!options.save_latent.empty()) outputs.latent.emplace("--save-latent", options.save_latent);
  if (!options.json.empty()) outputs.json.emplace("--json", options.json);
  return outputs;
}

void set_up_torch(const Options& options) {
  if (options.threads) at::set_num_threads(static_cast<int>(*options.threads));
  // LibTorch lets convolutions use TF32 unless told otherwise.
  at::globalContext().setAllowTF32CuDNN(options.tf32);
  at::globalContext().setAllowTF32CuBLAS(options.tf32);
}

std::optional<Decoder> load_decoder(const Options& options, const Settings& settings,
                                    const Inputs& inputs, const sag::UNet& unet) {
  if (options.out.empty()) return std::nullopt;
  if (!settings.decoder.empty()) return Decoder(settings.decoder, unet.device());
  if (is_picture(inputs.shape[0])) return std::nullopt;
  throw UsageError(
      fmt::format("--out needs a model with a decoder to make pictures of latents with {} "
                  "channels; --save-latent saves them.",
                  inputs.shape[0]));
}

// What came of all batches, in the order of the pictures.
struct Results {
  torch::Tensor latents, heat;
};

void collect(torch::Tensor& all, const torch::Tensor& of_batch, const Batch& batch,
             std::size_t images) {
  if (!of_batch.defined()) return;
  if (!all.defined()) {
    auto sizes = of_batch.sizes().vec();
    sizes[0] = static_cast<std::int64_t>(images);
    all = torch::zeros(sizes, of_batch.options());
  }
  const std::vector<std::int64_t> rows(batch.pictures.begin(), batch.pictures.end());
  all.index_copy_(0, torch::tensor(rows), of_batch);
}

Results sample_all(const sag::ModelPatcher& model, bool guided, const Settings& settings,
                   const Options& options, const Inputs& inputs, Progress& progress,
                   std::vector<RunReport>& runs) {
  Results results;
  for (const auto& batch : inputs.batches) {
    auto sampled = sample_batch(model, guided, settings, options, inputs, batch, progress);
    collect(results.latents, sampled.latents, batch, inputs.pictures.size());
    collect(results.heat, sampled.heat, batch, inputs.pictures.size());
    runs.push_back(std::move(sampled.report));
  }
  return results;
}

double total_work(const Inputs& inputs, bool guided, bool compare) {
  double sum = 0;
  for (const auto& batch : inputs.batches) {
    sum += work(inputs, batch, guided) + (compare ? work(inputs, batch, false) : 0.0);
  }
  return sum;
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

void print_summary(const Settings& settings, const Inputs& inputs,
                   const std::vector<RunReport>& runs, const Outputs& outputs, std::ostream& out) {
  const Totals totals = total(runs);
  const std::size_t pictures = inputs.pictures.size();
  out << fmt::format("{} {} on {}: {} calls of the UNet in {:.1f} s\n", pictures,
                     pictures == 1 ? "picture" : "pictures", settings.device.str(),
                     totals.evaluations, totals.seconds);
  if (totals.steps > 0) out << "self-attention guidance: " << guidance_summary(totals) << '\n';
  for (const auto& note : inputs.notes) out << "note: " << note << '\n';
  for (const auto* output : {&outputs.out, &outputs.latent, &outputs.json}) {
    if (*output) out << "wrote " << (*output)->path() << '\n';
  }
}

std::optional<sag::CudaGraphReport> graph_report(const sag::UNet& unet) {
  const auto* graphs = dynamic_cast<const sag::CudaGraphUNet*>(&unet);
  return graphs ? std::optional(graphs->report()) : std::nullopt;
}

sag::ModelPatcher guided(const sag::ModelPatcher& plain, const Options& options,
                         const sag::SelfAttentionGuidanceOptions& guidance) {
  return sag::apply_self_attention_guidance(
      options.sag_shuffle ? shuffle_tokens(plain, guidance.site) : plain, guidance);
}

void sample_and_write(const Options& options, const Settings& settings,
                      const std::shared_ptr<const sag::UNet>& unet, std::ostream& out) {
  auto outputs = open_outputs(options);
  const auto inputs = read_inputs(options, settings);
  const sag::ModelPatcher plain(unet, settings.sampling);
  const auto model = settings.guided ? guided(plain, options, settings.guidance) : plain;
  const auto decoder = load_decoder(options, settings, inputs, *unet);

  Progress progress(Progress::style_for(options.quiet),
                    total_work(inputs, settings.guided, options.compare));
  std::vector<RunReport> runs;
  Results unguided;
  if (options.compare)
    unguided = sample_all(plain, false, settings, options, inputs, progress, runs);
  const auto results =
      sample_all(model, settings.guided, settings, options, inputs, progress, runs);
  progress.finish();

  std::string png;
  if (outputs.out) {
    const auto pictures = [&](const torch::Tensor& latents) {
      return decoder && latents.defined() ? decoder->run(latents) : latents;
    };
    const Drawn drawn = {pictures(results.latents), pictures(unguided.latents), results.heat};
    png = encode_png(draw(drawn, options, settings, inputs));
  }
  const auto graphs = graph_report(*unet);
  write_outputs(outputs, png, results.latents,
                report_json(options, settings, inputs, runs, graphs));
  if (options.quiet) return;
  print_summary(settings, inputs, runs, outputs, out);
  if (graphs && !graphs->failure.empty())
    out << "without CUDA graphs, as capturing one failed: " << graphs->failure << '\n';
}

}  // namespace

void run_command(const Options& options, std::ostream& out) {
  std::optional<ModelDirectory> directory;
  if (!options.model.empty()) directory = read_model_directory(options.model);
  auto settings = decide_settings(options, directory ? &*directory : nullptr);
  set_up_torch(options);
  if (!options.list_sites) static_cast<void>(open_outputs(options));  // before minutes of loading
  auto unet = load_unet(settings.unet, settings.unet_file);
  if (options.list_sites) {
    list_sites(options, settings, *unet, out);
    return;
  }
  settings.device = unet->device();
  settings.dtype = unet->dtype();
  if (settings.device.is_cuda() && !options.no_cuda_graph)
    unet = std::make_shared<sag::CudaGraphUNet>(unet);
  sample_and_write(options, settings, unet, out);
}

}  // namespace sag_sample

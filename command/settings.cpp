#include "settings.h"

#include <filesystem>
#include <utility>

#include <fmt/format.h>

#include "errors.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

// A folder holds compiled packages.
void check_unet(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error) &&
      !std::filesystem::is_directory(path, error)) {
    throw UsageError(
        fmt::format("--unet: there is no file \"{}\"{}", path, suggestion_beside(path)));
  }
}

// The command line must not choose noise levels that only other kinds of models have.
void refuse_foreign_options(const Choices& command_line, const std::string& prediction) {
  const auto* own = &noise_level_options(prediction);
  for (const std::string other : {"edm", "flow"}) {
    const auto& group = noise_level_options(other);
    if (&group == own) continue;
    for (const auto& option : group.options) {
      if (!command_line.contains(option.id())) continue;
      throw UsageError(fmt::format("{} is for {} models, but this one's prediction is {}.",
                                   option.name, other, prediction));
    }
  }
}

sag::ModelSampling noise_levels(const Choices& choices, const std::string& prediction) {
  if (prediction == "flow") return sag::ModelSampling::flow(flow_options().decide(choices));
  if (prediction != "edm") {
    return sag::ModelSampling::discrete(sag::parse_prediction(prediction),
                                        discrete_options().decide(choices));
  }
  const auto edm = edm_options().decide(choices);
  if (edm.sigma_min >= edm.sigma_max) {
    throw UsageError(
        fmt::format("The lowest noise level of the model must be below its highest, got {} and {}.",
                    edm.sigma_min, edm.sigma_max));
  }
  return sag::ModelSampling::edm(edm);
}

Network decide_network(const Choices& choices, const SourceOptions& source,
                       const ModelDirectory* directory) {
  const auto options = network_options().decide(choices);
  Network network = {.files = {.unet = source.unet},
                     .prediction = options.prediction,
                     .site = options.site,
                     .noise_levels = noise_levels(choices, options.prediction),
                     .latent_scale = options.latent_scale,
                     .size = latent_size_options().decide(choices),
                     .usual_size = latent_size_options().decide({})};
  if (directory) {
    network.has_directory = true;
    network.files = directory->files;
    network.checkpoint = directory->checkpoint;
    network.compiled = checkpoint_options().decide(choices).compiled;
    network.usual_size = latent_size_options().decide(directory->choices);
    network.channels = network.usual_size.channels;
    network.multiple = directory->multiple;
    network.inputs = directory->inputs;
  }
  return network;
}

}  // namespace

Settings decide_settings(const Choices& command_line, const ModelDirectory* directory) {
  Choices choices = command_line;
  if (directory) choices.insert(directory->choices.begin(), directory->choices.end());
  const auto source = source_options().decide(choices);
  if (!directory) check_unet(source.unet);
  const auto network = network_options().decide(choices);
  refuse_foreign_options(command_line, network.prediction);
  auto unet = unet_options().decide(choices);
  unet.rows = network.unet_rows;
  auto guidances = decide_guidances(choices, network.site);
  const auto output = output_options().decide(choices);
  if (output.compare && guidances.empty()) {
    throw UsageError("--compare needs a guidance, but all are turned off.");
  }
  return {.source = source,
          .checkpoint = checkpoint_options().decide(choices),
          .network = decide_network(choices, source, directory),
          .unet = unet,
          .pictures = picture_options().decide(choices),
          .sampling = sampling_options().decide(choices),
          .guider = guider_options().decide(choices),
          .further = further_options().decide(choices),
          .guidance = guidance_options().decide(choices),
          .guidances = std::move(guidances),
          .device = device_options().decide(choices),
          .output = output};
}

void check_size_is_in_cells(const Network& network) {
  constexpr std::int64_t kPixels = 8;
  const auto& [channels, height, width] = network.size;
  // A network of pictures has pixels for cells.
  const bool too_much = channels > 3 && (height >= kPixels * network.usual_size.height ||
                                         width >= kPixels * network.usual_size.width);
  if (!too_much) return;
  throw UsageError(fmt::format(
      "--height and --width count cells of the latent, of which Stable Diffusion has one for 8 x 8 "
      "pixels: for {0} x {1} pixels give {2} x {3}; if {0} x {1} cells are meant, give a --noise "
      "or "
      "--latent of that size.",
      height, width, height / kPixels, width / kPixels));
}

void check_latent_size(const Network& network, const std::string& what, const LatentSize& size) {
  if (network.channels && size.channels != *network.channels) {
    throw UsageError(fmt::format("{} must have {} channels for this model, got {}.", what,
                                 *network.channels, size.channels));
  }
  if (size.height % network.multiple != 0 || size.width % network.multiple != 0) {
    throw UsageError(fmt::format(
        "{} must have a height and width that are multiples of {} for this model, got {} x {}.",
        what, network.multiple, size.height, size.width));
  }
}

}  // namespace sag_sample

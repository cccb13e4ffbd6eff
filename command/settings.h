#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "guidances.h"
#include "model_directory.h"
#include "options.h"

namespace sag_sample {

/// What a run knows of its network.
struct Network {
  ModelFiles files = {};
  /// The file that the weights are in; null: in those files.
  std::shared_ptr<const sag::Checkpoint> checkpoint = {};
  /// The packages that a checkpoint's UNet runs on; empty: on the skeleton.
  std::string compiled = {};
  /// Whether a model directory describes it.
  bool has_directory = false;
  std::string prediction = {}, site = {};
  sag::ModelSampling noise_levels = sag::ModelSampling::discrete();
  double latent_scale = 1.0;
  /// Of the latent, where no tensor says otherwise.
  LatentSize size = {};
  /// How many channels a latent must have; nothing: as many as it has.
  std::optional<std::int64_t> channels = {};
  /// Height and width of the latent must be multiples of it.
  std::int64_t multiple = 1;
  /// The model's default size, or Stable Diffusion's.
  LatentSize usual_size = {};
  NetworkInputs inputs = {};
};

/// Everything that a run needs to know, decided.
struct Settings {
  SourceOptions source;
  CheckpointFiles checkpoint;
  Network network;
  UNetFileOptions unet;
  PictureOptions pictures;
  sag::SampleOptions sampling;
  sag::CfgGuiderOptions guider;
  FurtherOptions further;
  GuidanceChoice guidance;
  std::vector<Guidance> guidances;
  DeviceOptions device;
  OutputOptions output;
};

/// Decides the settings: the command line counts first, then the model directory (null: there is
/// none), then the defaults. Throws UsageError.
Settings decide_settings(const Choices& command_line, const ModelDirectory* directory);

/// Throws UsageError if the size of the latent, given by options, must be one in pixels: a side is
/// 8 times the usual one or more.
void check_size_is_in_cells(const Network& network);

/// Throws UsageError, naming `what`, unless a latent of this size fits the network.
void check_latent_size(const Network& network, const std::string& what, const LatentSize& size);

}  // namespace sag_sample

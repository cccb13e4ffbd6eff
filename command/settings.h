#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include <torch/types.h>

#include "files/unet_file.h"
#include "model_directory.h"
#include "options.h"
#include "sag/model_sampling.h"
#include "sag/self_attention_guidance.h"

namespace sag_sample {

/// The constants of a run, every one decided: the command line counts, then the model directory,
/// then the command's defaults.
struct Settings {
  /// Paths; empty: there is none.
  std::string unet = {}, text_encoder = {}, decoder = {}, encoder = {};
  std::string prediction;
  sag::ModelSampling sampling;
  std::string sampler = "euler", schedule = "normal";
  std::int64_t steps = 20;
  double denoise = 1.0;
  double cfg = 7.5;
  bool guided = true;
  sag::SelfAttentionGuidanceOptions guidance = {};
  /// Channels, height and width of the latent, where no tensor says otherwise.
  std::array<std::int64_t, 3> shape = {4, 64, 64};
  std::optional<std::int64_t> channels = {};  ///< that the model directory asks for
  std::int64_t multiple = 1;                  ///< that height and width must be multiples of
  UNetFileOptions unet_file = {};
  torch::Device device = torch::kCPU;  ///< the loaded UNet's
  torch::ScalarType dtype = torch::kFloat;
};

/// Decides the settings. `model` is null without a model directory. Throws UsageError.
Settings decide_settings(const Options& options, const ModelDirectory* model);

/// Throws UsageError, naming `what`, unless a latent of these sizes fits the model.
void check_latent_size(const Settings& settings, const std::string& what, std::int64_t channels,
                       std::int64_t height, std::int64_t width);

}  // namespace sag_sample

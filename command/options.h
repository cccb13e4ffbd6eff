#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "files/unet_file.h"
#include "option.h"
#include "sag/cfg_guider.h"
#include "sag/model_sampling.h"
#include "sag/sample.h"

namespace sag_sample {

/// Which model, and what to do with it.
struct SourceOptions {
  std::string model = {}, checkpoint = {}, unet = {};
  bool list_sites = false, describe = false;
};

/// What goes with a checkpoint. Empty: not given.
struct CheckpointFiles {
  /// That of --prediction.
  std::string prediction = {};
  std::string vae = {}, skeleton = {}, compiled = {};
  /// FILE or FILE:STRENGTH, and NAME=FILE.
  std::vector<std::string> loras = {}, embeddings = {};
};

/// The network, as far as it is not a matter of its kind.
struct NetworkOptions {
  std::string prediction = "eps";
  /// The self-attention that guidances watch.
  std::string site = "middle";
  /// Latents of the user times this are the network's.
  double latent_scale = 1.0;
  /// The only number of rows that the UNet's file works with; 0: it is found out.
  std::int64_t unet_rows = 0;
};

/// The size of a latent.
struct LatentSize {
  std::int64_t channels = 4, height = 64, width = 64;
};

/// What to draw. Tensors are FILE or FILE:KEY; empty: not given.
struct PictureOptions {
  std::vector<std::string> prompts = {};
  std::string negative = {};
  /// Whether parentheses weigh what they hold.
  bool prompt_weights = true;
  /// The text encoder's layer, counted from its end; nothing: the encoder's own.
  std::optional<std::int64_t> clip_skip = {};
  std::int64_t unconditional = 0;
  std::optional<std::int64_t> batch = {};
  std::uint64_t seed = 0;
  std::string cond = {}, uncond = {}, cond_y = {}, uncond_y = {};
  std::string noise = {}, latent = {}, image = {}, mask = {}, inpaint_noise = {}, sigmas = {};
};

/// The embedded scale of guidance where nobody gives one: diffusers'
/// LatentConsistencyModelPipeline has it too.
constexpr double kEmbeddedGuidance = 8.5;

/// What only some networks take.
struct FurtherOptions {
  /// A class, and that of the unconditional prediction.
  std::optional<std::int64_t> label = {}, uncond_label = {};
  /// FILE or FILE:KEY; empty: not given.
  std::string concat = {};
  double image_cfg = 1.0;
  std::optional<double> embedded_guidance = {};
};

struct DeviceOptions {
  std::optional<std::int64_t> threads = {};
  bool no_cuda_graph = false, tf32 = false;
};

struct OutputOptions {
  /// Paths; empty: not to be written.
  std::string out = {}, save_latent = {}, json = {};
  bool compare = false, quiet = false;
  /// 0: as it looks right.
  std::int64_t columns = 0, zoom = 0;
};

/// The options of the command, each stated here and nowhere else. Where the struct is one of the
/// library's, so are the defaults. (The options of guidances are in guidances.h.)
const OptionTable<SourceOptions>& source_options();
const OptionTable<CheckpointFiles>& checkpoint_options();
const OptionTable<NetworkOptions>& network_options();
const OptionTable<sag::EdmSamplingOptions>& edm_options();
const OptionTable<sag::FlowSamplingOptions>& flow_options();
const OptionTable<sag::DiscreteSamplingOptions>& discrete_options();
const OptionTable<LatentSize>& latent_size_options();
const OptionTable<PictureOptions>& picture_options();
const OptionTable<sag::SampleOptions>& sampling_options();
const OptionTable<sag::CfgGuiderOptions>& guider_options();
const OptionTable<FurtherOptions>& further_options();
const OptionTable<UNetFileOptions>& unet_options();
const OptionTable<DeviceOptions>& device_options();
const OptionTable<OutputOptions>& output_options();

/// Returns the options that a model of this prediction has for its noise levels.
const OptionGroup& noise_level_options(const std::string& prediction);

/// Returns all groups of options, those of guidances too, in the order of --help.
std::span<const OptionGroup* const> all_options();

}  // namespace sag_sample

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sag/model_sampling.h"
#include "sag/safetensors.h"

namespace sag {

/// What a checkpoint in one file is, as far as its names and shapes say.
struct CheckpointKind {
  /// "sd1", "sd2" or "sdxl"; empty: nobody asked.
  std::string family = {};
  /// eps or v, and what says so.
  Prediction prediction = Prediction::eps;
  std::string reason = {};
  /// Whether the noise table ends in pure noise (the markers "v_pred" and "ztsnr").
  bool zero_terminal_snr = false;
  /// Channels that the UNet takes: 4, or 9 and 8 with those of inpainting and instruct-pix2pix.
  std::int64_t in_channels = 4;
  /// What contradicts what, as ends of sentences.
  std::vector<std::string> notes = {};
};

/// Recognises a checkpoint by the names and shapes of its tensors (and, for the prediction of
/// Stable Diffusion 2, by one small tensor). Throws ValueError, in one sentence that names what it
/// is instead, for files of other kinds (a LoRA, a VAE, one of diffusers' networks, transformers
/// such as Flux) and families that are not supported (SDXL's refiner, SSD-1B, depth models).
/// ComfyUI: `detect_unet_config`, `supported_models`.
CheckpointKind recognise_checkpoint(const Safetensors& file, const std::string& path);

/// Returns the same for a checkpoint of a family of one's own, which predicts `usual` unless a
/// marker says otherwise.
CheckpointKind read_kind(const Safetensors& file, Prediction usual, const std::string& path);

}  // namespace sag

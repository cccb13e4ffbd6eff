#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/aoti_unet.h"
#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/picture_network.h"
#include "sag/text_encoder.h"
#include "sag/torchscript_unet.h"

namespace sag {

/// A LoRA to be merged into a checkpoint as it is loaded.
struct LoraFile {
  /// A .safetensors file with the names of kohya's programs or of diffusers and PEFT.
  std::string path = {};
  /// Its changes are multiplied by it; may be negative.
  double strength = 1.0;
};

/// A textual inversion: vectors that a word of prompts stands for.
struct EmbeddingFile {
  /// The word, as prompts have it.
  std::string name = {};
  /// A .safetensors file.
  std::string path = {};
};

/// How to open a checkpoint, and what goes into it.
struct CheckpointOptions {
  /// The folder with a skeleton of each family. Empty: the environment's SAG_SKELETONS, else those
  /// that were built or installed with sag.
  std::string skeletons = {};
  /// The folder of the one skeleton to use, whatever the checkpoint looks like: for families of
  /// one's own.
  std::string skeleton = {};
  /// A file with a VAE, which is used in place of the checkpoint's: LDM's names, or diffusers'.
  std::string vae = {};
  /// Merged in this order.
  std::vector<LoraFile> loras = {};
  /// Words for prompts.
  std::vector<EmbeddingFile> embeddings = {};
  /// What the UNet predicts: eps, v or x0. Nothing: what is recognised.
  std::optional<Prediction> prediction = {};
};

/// What a checkpoint is.
struct CheckpointInfo {
  /// "sd1", "sd2" or "sdxl"; with a skeleton of one's own its folder's name.
  std::string family = {};
  /// Whether it is one of those three, by its tensors.
  bool recognised = false;
  /// What the UNet predicts: eps, v or x0.
  Prediction prediction = Prediction::eps;
  /// Why this one.
  std::string prediction_reason = {};
  /// Whether the noise table is rescaled to end in pure noise (the markers "v_pred" and "ztsnr").
  bool zero_terminal_snr = false;
  /// Channels that the UNet takes: the latent's 4; 9 with those of inpainting; 8 of
  /// instruct-pix2pix.
  std::int64_t in_channels = 4;
  /// The dtype of most weights of the UNet, in the file.
  torch::ScalarType dtype = torch::kFloat;
  /// How many numbers the UNet has.
  std::int64_t unet_parameters = 0;
  /// How many the text encoders have; 0: there is none.
  std::int64_t text_parameters = 0;
  /// How many the VAE has that is used; 0: there is none.
  std::int64_t vae_parameters = 0;
  /// Whether there is a text encoder.
  bool has_text_encoder = false;
  /// Whether there is a VAE's decoder.
  bool has_decoder = false;
  /// Whether there is a VAE's encoder.
  bool has_encoder = false;
  /// How many tensors of the file nobody needs, by their name, or by how it begins ("model_ema.*").
  std::map<std::string, std::int64_t> skipped = {};
  /// What may be wrong with the file, as ends of sentences.
  std::vector<std::string> notes = {};
};

/// A checkpoint of Stable Diffusion 1, 2 or XL, or of something made from them, in one .safetensors
/// file (or an index.json and its files) with the names of latent-diffusion (LDM), which ComfyUI
/// and A1111 use too.
///
/// Its networks are TorchScript skeletons, which have everything but the weights: each parameter is
/// filled once from the file. Every tensor of the file is used, or known to be unneeded.
class SAG_API Checkpoint {
 public:
  /// Recognises a file and checks all names and shapes in it and in its VAE's and textual
  /// inversions', and the names in its LoRAs, before any weight is read. Throws ValueError, in one
  /// sentence, for other files, families that are not supported, and tensors that are missing, left
  /// over, quantized or of another shape.
  static Checkpoint open(const std::string& path, const CheckpointOptions& options = {});

  /// Returns what the checkpoint is.
  const CheckpointInfo& info() const;
  /// Returns the folder of the skeleton.
  const std::string& skeleton() const;
  /// Returns the noise levels and the prediction.
  ModelSampling model_sampling() const;

  /// Loads the UNet. `options.weights` must be empty. Where `options.dtype` is, it runs in fp32 on
  /// the CPU, else in the file's dtype (in fp16 and fp32 where that is fp8 and fp64). Throws
  /// ValueError as `TorchScriptUNet::load` does, and for weights that are not finite.
  std::shared_ptr<TorchScriptUNet> load_unet(const TorchScriptUNetOptions& options = {}) const;
  /// Loads the UNet as packages that were compiled from the family's skeleton, at `path`, with the
  /// checkpoint's weights. `device`: see `AotiUNetOptions`. Throws ValueError as `AotiUNet::load`
  /// does, and for packages of something else.
  std::shared_ptr<AotiUNet> load_compiled_unet(const std::string& path,
                                               std::optional<torch::Device> device = {}) const;
  /// Loads the text encoders, as one. Throws ValueError if the file has none.
  TextEncoder load_text_encoder() const;
  /// Loads the VAE's decoder, in fp32. Throws ValueError if there is none.
  PictureNetwork load_decoder(torch::Device device = torch::kCPU) const;
  /// Loads the VAE's encoder, likewise.
  PictureNetwork load_encoder(torch::Device device = torch::kCPU) const;

 private:
  struct State;
  explicit Checkpoint(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

/// Everything that a sampler needs of a checkpoint.
struct LoadedCheckpoint {
  /// The UNet, with its sites.
  std::shared_ptr<TorchScriptUNet> unet = {};
  /// Its noise levels and prediction.
  ModelSampling model_sampling;
  /// What the checkpoint is.
  CheckpointInfo info = {};
  /// Nothing: the file has none.
  std::optional<TextEncoder> text_encoder = {};
  /// The VAE, from latents to pictures; nothing: the file has none.
  std::optional<PictureNetwork> decoder = {};
  /// The VAE, from pictures to latents; nothing: the file has none.
  std::optional<PictureNetwork> encoder = {};
};

/// Opens a checkpoint and loads all of it; the UNet and the VAE onto `unet.device`. Throws as
/// `Checkpoint` does.
SAG_API LoadedCheckpoint load_checkpoint(const std::string& path,
                                         const CheckpointOptions& options = {},
                                         const TorchScriptUNetOptions& unet = {});

}  // namespace sag

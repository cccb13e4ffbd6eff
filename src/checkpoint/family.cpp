#include "checkpoint/family.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include "checkpoint/json_text.h"
#include "checkpoint/names.h"

namespace sag {
namespace {

constexpr std::string_view kUNet = "model.diffusion_model.";

class Names {
 public:
  explicit Names(const Safetensors& file) : tensors_(file.tensors()) {}

  bool has(const std::string& name) const { return tensors_.contains(name); }

  bool begins(const std::string& prefix) const {
    const auto found = tensors_.lower_bound(prefix);
    return found != tensors_.end() && found->first.starts_with(prefix);
  }

  bool any_contains(std::string_view part) const {
    return std::any_of(tensors_.begin(), tensors_.end(), [&](const auto& tensor) {
      return tensor.first.find(part) != std::string::npos;
    });
  }

  // A side of a tensor; 0 if there is no such tensor or side.
  std::int64_t size(const std::string& name, std::size_t dimension) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end() || dimension >= found->second.sizes.size()) return 0;
    return found->second.sizes[dimension];
  }

  // How many numbered modules there are: prefix + "0.", prefix + "1.", …
  std::int64_t count(const std::string& prefix) const {
    std::int64_t n = 0;
    while (begins(prefix + std::to_string(n) + ".")) ++n;
    return n;
  }

 private:
  const std::map<std::string, Safetensors::Info>& tensors_;
};

// What a file without an LDM UNet is, as the end of a sentence.
std::string what_else(const Names& names) {
  const std::vector<std::pair<std::string_view, const char*>> parts = {
      {"lora", "which is a LoRA: give it as --lora beside a checkpoint"},
      {"double_blocks.", "which is a Flux model: only Stable Diffusion 1, 2 and XL are read"},
      {"joint_blocks.", "which is a Stable Diffusion 3 model: only 1, 2 and XL are read"},
      {"emb_params", "which is a textual inversion: give it as --embedding"},
      {"string_to_param", "which is a textual inversion: give it as --embedding"},
      {"control_model.", "which is a ControlNet, and no checkpoint"},
      {"input_hint_block.", "which is a ControlNet, and no checkpoint"},
  };
  for (const auto& [part, text] : parts)
    if (names.any_contains(part)) return text;
  if (names.begins("down_blocks.") || names.begins("unet."))
    return "which is a UNet with diffusers' names: sag-export exports its folder";
  if (names.has("input_blocks.0.0.weight"))
    return "which is a UNet alone, without the prefix model.diffusion_model.";
  if (names.begins("decoder.") || names.begins("first_stage_model."))
    return "which is a VAE: give it as --vae beside a checkpoint";
  if (names.begins("text_model.") || names.begins("transformer."))
    return "which is a text encoder, and no checkpoint";
  return "which has no UNet: no tensor is called model.diffusion_model.input_blocks.0.0.weight";
}

// What tells the UNets apart.
struct UNetShape {
  std::int64_t channels = 0, in_channels = 0, context = 0, features = 0;
  // Transformer blocks of the input blocks that have some, and of the middle.
  std::vector<std::int64_t> depths = {};
  bool operator==(const UNetShape&) const = default;
};

UNetShape shape_of(const Names& names) {
  const std::string unet(kUNet);
  UNetShape shape = {.channels = names.size(unet + "input_blocks.0.0.weight", 0),
                     .in_channels = names.size(unet + "input_blocks.0.0.weight", 1),
                     .features = names.size(unet + "label_emb.0.0.weight", 1)};
  const auto blocks = names.count(unet + "input_blocks.");
  const auto look_at = [&](const std::string& attention) {
    const auto depth = names.count(attention + "transformer_blocks.");
    if (depth == 0) return;
    shape.depths.push_back(depth);
    shape.context = names.size(attention + "transformer_blocks.0.attn2.to_k.weight", 1);
  };
  for (std::int64_t i = 1; i < blocks; ++i)
    look_at(unet + "input_blocks." + std::to_string(i) + ".1.");
  look_at(unet + "middle_block.1.");
  return shape;
}

struct KnownUNet {
  const char* family;
  UNetShape shape;
};

const std::vector<KnownUNet>& known_unets() {
  static const std::vector<KnownUNet> known = {
      {"sd1", {.channels = 320, .context = 768, .depths = {1, 1, 1, 1, 1, 1, 1}}},
      {"sd2", {.channels = 320, .context = 1024, .depths = {1, 1, 1, 1, 1, 1, 1}}},
      {"sdxl", {.channels = 320, .context = 2048, .features = 2816, .depths = {2, 2, 10, 10, 10}}},
  };
  return known;
}

// What a UNet that is not known may be, as the end of a sentence.
std::string unknown_unet(const UNetShape& shape) {
  if (shape.channels == 384 && shape.features == 2560)
    return "which is SDXL's refiner: only the base model is read";
  if (shape.context == 2048 && shape.features == 2816)
    return "which is a smaller SDXL (SSD-1B, Vega, KOALA): only SDXL itself is read";
  if (shape.channels == 256) return "which is an upscaling model, which is not read";
  if (shape.context == 1024 && shape.features != 0)
    return "which is an unCLIP model of Stable Diffusion 2, which is not read";
  return c10::str("whose UNet is of no known family: ", shape.channels, " channels, context of ",
                  shape.context, ", y of ", shape.features, ", and ", shape.depths.size(),
                  " attention blocks in the first half");
}

std::string family_of(const UNetShape& shape, const std::string& path) {
  for (const auto& [family, expected] : known_unets()) {
    auto any_input = expected;
    any_input.in_channels = shape.in_channels;
    if (shape != any_input) continue;
    if (shape.in_channels == 5)
      refuse_checkpoint({path}, "which is a model with a depth picture, which is not read");
    if (shape.in_channels != 4 && shape.in_channels != 8 && shape.in_channels != 9)
      refuse_checkpoint({path}, c10::str("whose UNet takes ", shape.in_channels,
                                         " channels, where 4, 8 and 9 are known"));
    return family;
  }
  refuse_checkpoint({path}, unknown_unet(shape));
}

// ComfyUI: `SD20.model_type`. Nothing else in the file tells which one was trained.
std::optional<Prediction> judge_sd2(const Safetensors& file) {
  const auto name = std::string(kUNet) + "output_blocks.11.1.transformer_blocks.0.norm1.bias";
  // A file may claim anything; this is as wide as the UNet.
  if (Names(file).size(name, 0) != 320 || file.tensors().at(name).sizes.size() != 1)
    return std::nullopt;
  const auto spread = file.tensor(name).to(torch::kDouble).std(/*unbiased=*/false).item<double>();
  return spread > 0.09 ? Prediction::v : Prediction::eps;
}

// What the notes of the header say: modelspec.prediction_type, as kohya's programs write it.
std::optional<Prediction> noted_prediction(const Safetensors& file, CheckpointKind& kind) {
  const auto found = file.metadata().find("modelspec.prediction_type");
  if (found == file.metadata().end()) return std::nullopt;
  if (found->second == "v" || found->second == "v_prediction") return Prediction::v;
  if (found->second == "epsilon") return Prediction::eps;
  kind.notes.push_back("its modelspec.prediction_type is unknown: " + quoted_name(found->second));
  return std::nullopt;
}

void refuse_edm(const Names& names, const std::string& path) {
  for (const char* marker : {"edm_vpred.sigma_max", "edm_vpred.sigma_min"})
    if (names.has(marker))
      refuse_checkpoint({path}, c10::str("which has the marker ", marker,
                                         ": EDM with v-prediction, which is not read"));
  for (const char* marker : {"edm_mean", "edm_std"})
    if (names.has(marker))
      refuse_checkpoint({path}, c10::str("which has the marker ", marker,
                                         " (Playground 2.5): its latents are scaled by channel, "
                                         "which is not read"));
}

// ComfyUI: `SDXL.model_type`, `SD20.model_type`.
void read_prediction(const Safetensors& file, const std::string& path, CheckpointKind& kind) {
  const Names names(file);
  refuse_edm(names, path);
  const bool marked = names.has("v_pred");
  kind.zero_terminal_snr = marked && names.has("ztsnr");
  if (!marked && names.has("ztsnr"))
    kind.notes.emplace_back("its marker ztsnr does nothing without v_pred, as in ComfyUI");
  const auto choose = [&](Prediction prediction, const char* reason) {
    kind.prediction = prediction;
    kind.reason = reason;
  };
  const auto noted = noted_prediction(file, kind);
  const auto judged =
      kind.family == "sd2" && kind.in_channels == 4 ? judge_sd2(file) : std::nullopt;
  if (marked) {
    choose(Prediction::v, "the file has the marker v_pred");
  } else if (judged) {
    choose(*judged, "judged by a weight of the last attention, as ComfyUI does");
    // kohya's merge_lora.py notes v in every file of Stable Diffusion 2.
    if (noted && noted != judged)
      kind.notes.push_back(c10::str("its modelspec.prediction_type says ", to_string(*noted),
                                    ", but a weight says ", to_string(*judged),
                                    ", which is believed"));
  } else if (noted) {
    choose(*noted, "the file's modelspec.prediction_type says so");
  } else {
    choose(kind.prediction, "usual for the family, and no marker says otherwise");
  }
}

CheckpointKind kind_of(const Safetensors& file, const std::string& family, Prediction usual,
                       const std::string& path) {
  CheckpointKind kind = {
      .family = family, .prediction = usual, .in_channels = shape_of(Names(file)).in_channels};
  read_prediction(file, path, kind);
  return kind;
}

}  // namespace

CheckpointKind recognise_checkpoint(const Safetensors& file, const std::string& path) {
  const Names names(file);
  if (!names.has(std::string(kUNet) + "input_blocks.0.0.weight"))
    refuse_checkpoint({path}, what_else(names));
  if (names.any_contains(".time_stack."))
    refuse_checkpoint({path}, "which is a video model, which is not read");
  return kind_of(file, family_of(shape_of(names), path), Prediction::eps, path);
}

CheckpointKind read_kind(const Safetensors& file, Prediction usual, const std::string& path) {
  return kind_of(file, "", usual, path);
}

}  // namespace sag

#include "further_inputs.h"

#include <utility>
#include <vector>

#include <fmt/format.h>
#include <torch/torch.h>

#include "errors.h"
#include "sag/conditioning.h"

namespace sag_sample {
namespace {

namespace F = torch::nn::functional;

const std::string& concat_kind(const Settings& settings) {
  static const std::string none;
  return settings.network.inputs.concat ? settings.network.inputs.concat->kind : none;
}

bool inpaints(const Settings& settings) {
  return sees_picture(settings) && concat_kind(settings) == "inpaint";
}

void check_class(const FurtherOptions& options, const Network& network) {
  const auto& inputs = network.inputs;
  if (network.has_directory && !inputs.takes_class && options.label) {
    throw UsageError("--class is for models that draw classes, which this one does not.");
  }
  if (inputs.takes_class && !options.label) {
    throw UsageError(
        inputs.classes > 0
            ? fmt::format("This model draws classes: give --class N, 0 to {}.", inputs.classes - 1)
            : "This model draws classes: give --class N.");
  }
  for (const auto& [option, label] :
       {std::pair("--class", options.label), std::pair("--uncond-class", options.uncond_label)}) {
    if (inputs.classes > 0 && label && *label >= inputs.classes) {
      throw UsageError(fmt::format("{} must be 0 to {} for this model, got {}.", option,
                                   inputs.classes - 1, *label));
    }
  }
}

void check_channels(const Settings& settings) {
  const auto& concat = settings.network.inputs.concat;
  const auto& pictures = settings.pictures;
  const bool given = !settings.further.concat.empty();
  if (settings.network.has_directory && !concat && given) {
    throw UsageError("--concat is for models with further channels, which this one has not.");
  }
  if (!concat || given) return;
  if (concat->kind.empty()) {
    throw UsageError(
        fmt::format("This model takes {} channels beside the latent: give them with --concat.",
                    concat->channels));
  }
  if (concat->kind == "inpaint" && (pictures.image.empty() || pictures.mask.empty())) {
    throw UsageError(
        "This model repaints a part of a picture: give --image, and --mask for the part (white is "
        "repainted).");
  }
  if (pictures.image.empty()) {
    throw UsageError("This model edits a picture: give it with --image.");
  }
  if (inpaints(settings) && !pictures.inpaint_noise.empty()) {
    throw UsageError(
        "--inpaint-noise is noise for what is kept, but this model keeps it by itself.");
  }
}

void check_guidance(const Settings& settings) {
  const auto& options = settings.further;
  if (options.embedded_guidance && settings.network.inputs.guidance_size == 0) {
    throw UsageError(
        "--embedded-guidance is for models that guidance was distilled into, and whose model.json "
        "says so with \"timestep_cond\".");
  }
  if (options.image_cfg == 1) return;
  if (concat_kind(settings) != "edit") {
    throw UsageError("--image-cfg is for models that edit a picture, which this one does not.");
  }
  if (settings.guider.cond_scale == 1) {
    throw UsageError("--image-cfg needs a --cfg other than 1.");
  }
}

// 1 where the picture is repainted, of the size of one of them.
torch::Tensor binary(const torch::Tensor& mask) {
  return (mask >= 0.5).to(torch::kFloat);
}

torch::Tensor nearest(const torch::Tensor& picture, std::int64_t height, std::int64_t width) {
  return F::interpolate(picture, F::InterpolateFuncOptions()
                                     .size(std::vector<std::int64_t>{height, width})
                                     .mode(torch::kNearest));
}

// diffusers: `prepare_mask_latents`. In [−1, 1] what is repainted becomes 0, which is grey.
torch::Tensor inpaint_channels(const InputTensors& tensors, const Settings& settings,
                               const LatentSize& size, double scale, torch::Device device) {
  const auto& picture = tensors.picture;
  const auto pixels = binary(tensors.mask_picture.defined()
                                 ? tensors.mask_picture
                                 : nearest(tensors.mask, picture.size(2), picture.size(3)));
  const auto masked = encode_picture(picture * (1 - pixels), settings.network, device) * scale;
  const auto cells = nearest(pixels, size.height, size.width);
  return torch::cat({cells, masked.expand({cells.size(0), -1, -1, -1})}, 1);
}

void check_size(const torch::Tensor& channels, const Network& network, const LatentSize& size) {
  const auto count = network.inputs.concat ? network.inputs.concat->channels : channels.size(1);
  if (channels.size(1) == count && channels.size(2) == size.height &&
      channels.size(3) == size.width) {
    return;
  }
  throw UsageError(fmt::format("--concat must have shape [images, {}, {}, {}], got {}.", count,
                               size.height, size.width, c10::str(channels.sizes())));
}

// Three-way guidance, x + a·(x − y) + b·(y − z) for the prompt x, the picture alone y, and neither
// z, is guidance by a away from the mean of y and z with these weights.
void guide_by_picture(Batch& batch, double image_cfg) {
  if (batch.positive.empty() || image_cfg == 1) return;
  if (batch.negative.empty()) {
    throw UsageError("--image-cfg needs an unconditional prediction: give --uncond.");
  }
  std::vector<sag::Conditioning> negative;
  for (auto& cond : batch.negative) {
    auto blind = cond;
    blind.concat = torch::zeros_like(cond.concat);
    blind.strength = image_cfg - 1;
    cond.strength = batch.cfg - image_cfg;
    if (cond.strength != 0) negative.push_back(cond);
    negative.push_back(blind);
  }
  batch.negative = std::move(negative);
}

}  // namespace

bool sees_picture(const Settings& settings) {
  return !concat_kind(settings).empty() && settings.further.concat.empty();
}

bool starts_from_picture(const Settings& settings) {
  return !sees_picture(settings) || settings.sampling.denoise < 1 || blends_mask(settings);
}

bool blends_mask(const Settings& settings) {
  return !settings.pictures.mask.empty() && !inpaints(settings);
}

void check_further_inputs(const Settings& settings) {
  check_class(settings.further, settings.network);
  check_channels(settings);
  check_guidance(settings);
}

torch::Tensor further_channels(const InputTensors& tensors, const Settings& settings,
                               const LatentSize& size, torch::Device device) {
  if (tensors.concat.defined()) {
    check_size(tensors.concat, settings.network, size);
    return tensors.concat;
  }
  if (!sees_picture(settings)) return {};
  const double scale = settings.network.inputs.concat->scale * settings.network.latent_scale;
  if (inpaints(settings)) return inpaint_channels(tensors, settings, size, scale, device);
  return tensors.latent * scale;
}

void add_further_inputs(Batch& batch, const torch::Tensor& channels, const Settings& settings) {
  const auto& options = settings.further;
  const auto& inputs = settings.network.inputs;
  for (auto* branch : {&batch.positive, &batch.negative}) {
    for (auto& cond : *branch) {
      cond.concat = channels;
      const bool positive = branch == &batch.positive;
      const auto label = positive ? options.label : options.uncond_label;
      if (options.label) {
        cond.extra["class_labels"] = torch::full({1}, label.value_or(*options.label), torch::kLong);
      }
      if (inputs.guidance_size > 0) {
        cond.extra["timestep_cond"] = sag::guidance_scale_embedding(
            options.embedded_guidance.value_or(kEmbeddedGuidance), inputs.guidance_size);
      }
    }
  }
  guide_by_picture(batch, options.image_cfg);
}

}  // namespace sag_sample

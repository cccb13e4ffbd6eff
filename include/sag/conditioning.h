#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/pass.h"

namespace sag {

/// What a prompt gives to the UNet, and where, how strongly and when it applies (ComfyUI: a `cond`
/// entry). Tensors with a first dimension of 1 are repeated for every image of a batch.
struct Conditioning {
  /// Text for cross-attention, [1 or images, tokens, width]. Undefined for UNets that take none.
  torch::Tensor context = {};
  /// The tokens of each prompt in `context`, where it holds several, one after the other. Only
  /// hooks on all cross-attentions can tell them apart (`ModelPatcher::set_attn2_replace`,
  /// `RowGroup::context_parts`). Empty: it is one prompt.
  std::vector<std::int64_t> context_parts = {};
  /// Vector for the whole picture (SDXL: pooled text and sizes), [1 or images, features].
  torch::Tensor y = {};
  /// Further channels of the network's x, [1 or images, channels, height, width] of the latent's
  /// size: what an inpainting UNet (mask, then the latent of the masked picture) or
  /// instruct-pix2pix (latent of the picture) sees beside the latent. They stand after it, as they
  /// are, and are cropped to `area`. ComfyUI: `c_concat`.
  torch::Tensor concat = {};
  /// Further inputs of the UNet by argument name, each [1 or images, …]. Where the argument is a
  /// dict, list or tuple of tensors, "argument.key" and "argument.0" name its entries. Pictures of
  /// the latent's height and width, [1 or images, channels, height, width], are cropped to `area`;
  /// anything else that depends on the size must fit the area as it is.
  std::map<std::string, torch::Tensor> extra = {};

  /// Weight relative to other conditionings of the same branch.
  double strength = 1.0;
  /// The part of the latent it is evaluated on; unset: all of it. Clipped to the latent.
  std::optional<Area> area = {};
  /// Weight per latent cell, [height, width] or [1 or images, height, width] of the latent, 0 … 1.
  torch::Tensor mask = {};
  /// Active while sigma_end <= sigma <= sigma_start.
  double sigma_start = std::numeric_limits<double>::infinity();
  /// See sigma_start.
  double sigma_end = 0.0;
};

/// Returns what a UNet that guidance was distilled into (LCM: `time_cond_proj_dim`) takes for the
/// scale of the guidance that it shall imitate, [1, size] fp32: sines and then cosines of 1000 ·
/// (guidance_scale − 1) at size / 2 frequencies. Give it as `extra["timestep_cond"]`. Throws
/// ValueError when the scale is not finite or size is less than 4. diffusers:
/// `get_guidance_scale_embedding`.
SAG_API torch::Tensor guidance_scale_embedding(double guidance_scale, std::int64_t size);

}  // namespace sag

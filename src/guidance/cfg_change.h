#pragma once

#include <functional>

#include <torch/types.h>

#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// A guidance that computes CFG in another way.
struct CfgChange {
  Owner owner;
  /// Returns what is to take the place of CFG; both predictions exist.
  std::function<torch::Tensor(const PostCfgArgs&)> cfg;
  /// In sigmas.
  GuidanceWindow window;
  /// See `PostCfgOptions`.
  bool needs_steps = false;
};

/// Returns why no CFG of two predictions was computed inside of the window, so that there is
/// nothing to change; null if there is.
const char* cfg_idle_reason(const GuidanceWindow& window, const PostCfgArgs& args);

/// Returns a clone of `model` whose results change by what `cfg` returns, less plain CFG.
ModelPatcher change_cfg(const ModelPatcher& model, const CfgChange& change);

/// Returns the scalar product of each image's latent, [images, 1, 1, 1] fp64. a and b: [images,
/// channels, height, width].
torch::Tensor image_dot(const torch::Tensor& a, const torch::Tensor& b);

}  // namespace sag

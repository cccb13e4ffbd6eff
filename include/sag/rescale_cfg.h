#pragma once

#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// ComfyUI's node input with its default.
struct RescaleCfgOptions {
  /// φ: how much of the rescaled result is taken, 0 … 1; 0 is off.
  double multiplier = 0.7;
  /// Where it guides.
  GuidanceWindow window = {};
};

/// CFG rescale, against the overexposure of high scales. Returns a clone of `model` where the
/// result is scaled, for each image, to the spread of the conditional prediction: with v the result
/// so far, v_c the conditional prediction, both as the v that a v model would have predicted (flow
/// and edm models: as their own output), and std over the image's latent,
///
///     v = multiplier · v · std(v_c) / std(v) + (1 − multiplier) · v
///
/// It acts on what CFG and the guidances applied before it made, and costs no row. Without a
/// conditional prediction there is nothing to guide.
///
/// Throws ValueError when multiplier is outside 0 … 1.
/// Source: Lin et al. 2023 (arXiv 2305.08891), section 3.4; ComfyUI: `RescaleCFG`, which replaces
/// the CFG formula; diffusers: `guidance_rescale`.
SAG_API ModelPatcher apply_rescale_cfg(const ModelPatcher& model,
                                       const RescaleCfgOptions& options = {});

}  // namespace sag

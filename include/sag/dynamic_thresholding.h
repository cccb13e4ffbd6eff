#pragma once

#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// The inputs of ComfyUI's node, with its defaults.
struct DynamicThresholdingOptions {
  /// The scale of CFG whose spread the result gets.
  double mimic_scale = 7.0;
  /// p: the share of a channel's values that is not clamped, 0 … 1.
  double threshold_percentile = 1.0;
  /// Where it guides.
  GuidanceWindow window = {};
};

/// Dynamic thresholding, against the colours that high scales burn. Returns a clone of `model`
/// where, in every channel of every image, with d the result so far,
///
///     mimic  = uncond_denoised + mimic_scale · (cond_denoised − uncond_denoised)
///     aim    = max |mimic − mean(mimic)|
///     limit  = max(aim, the p-quantile of |d − mean(d)|)
///     result = mean(d) + clamp(d − mean(d), −limit, limit) · aim / limit
///
/// All are clean latents, [images, channels, height, width], as in the original. d is what CFG and
/// the guidances applied before this one made, so applied last it bounds what all of them did;
/// mimic is plain CFG. A d that spreads less than mimic stays as it is. It costs no row. At
/// cond_scale 1, and where one of the predictions is missing, there is nothing to guide.
///
/// Throws ValueError when mimic_scale is negative or not finite, or threshold_percentile is outside
/// 0 … 1.
/// Source: mcmonkeyprojects/sd-dynamic-thresholding; ComfyUI: its `DynamicThresholdingFull` with
/// both modes constant, separate feature channels, scaling from the MEAN by AD, and phi 1. The node
/// computes CFG itself, so it drops what other CFG functions do, and a channel without any spread
/// becomes NaN there. The idea is from Saharia et al. 2022 (arXiv 2205.11487, section 2.3), who
/// clamp pictures.
SAG_API ModelPatcher apply_dynamic_thresholding(const ModelPatcher& model,
                                                const DynamicThresholdingOptions& options = {});

}  // namespace sag

#pragma once

#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// The paper's symbols, with its values for SDXL.
struct AdaptiveProjectedGuidanceOptions {
  /// η: how much of the part that is parallel to the conditional prediction stays; 1 is plain CFG.
  double eta = 0.0;
  /// r: what is longer than this, over a whole latent, is made as long; 0: no limit. Smaller
  /// latents are shorter: the paper takes 2.5 for them.
  double norm_threshold = 15.0;
  /// β: how much of the step before is added; negative values push away from it, 0 is off.
  double momentum = -0.5;
  /// Where it guides; elsewhere it is plain CFG.
  GuidanceWindow window = {};
};

/// Adaptive projected guidance (APG): CFG without the part of its direction that oversaturates.
/// Returns a clone of `model` where, for each image, with · the scalar product over the latent,
///
///     d      = cond_denoised − uncond_denoised + momentum · (d of the step before)
///     d      = d · min(1, norm_threshold / ‖d‖)
///     along  = cond_denoised · (d · cond_denoised) / ‖cond_denoised‖²
///     result = cond_denoised + (cond_scale − 1) · (d − along + eta · along)
///
/// takes the place of CFG. It adds the difference to plain CFG, so what other guidances add stays,
/// and so does what a CFG function of the model's own (`set_cfg_function`) does differently. The
/// step before is the latest one that it guided. It costs no row. At cond_scale 1, and where one of
/// the predictions is missing, there is nothing to guide.
///
/// d is kept from step to step within a run, so a momentum needs `CfgGuider::begin_run`. Throws
/// ValueError when an option is out of range.
/// Source: Sadat et al. 2024 (arXiv 2410.02416), algorithm 1; ComfyUI: `APG`, whose result has
/// cond_scale where the paper has cond_scale − 1, and which takes no negative momentum; diffusers:
/// `AdaptiveProjectedGuidance`, which adds to uncond_denoised.
SAG_API ModelPatcher apply_adaptive_projected_guidance(
    const ModelPatcher& model, const AdaptiveProjectedGuidanceOptions& options = {});

}  // namespace sag

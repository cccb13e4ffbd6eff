#pragma once

#include <cstdint>

#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// What the paper lets choose.
struct CfgZeroStarOptions {
  /// In how many of the first steps the network's output is taken as 0. For flow and eps models x
  /// stays what it is then, for others it only shrinks. The paper takes 1 for flow models, or the
  /// first 4 % of the steps.
  std::int64_t zero_init_steps = 0;
  /// Where it guides; elsewhere it is plain CFG.
  GuidanceWindow window = {};
};

/// CFG-Zero*: CFG from an unconditional prediction of the best length. Returns a clone of `model`
/// where, with c and u the network's outputs (`ModelSampling::calculate_output`) and · the scalar
/// product over an image's latent,
///
///     alpha  = (c · u) / ‖u‖²
///     output = alpha · u + cond_scale · (c − alpha · u)
///
/// takes the place of CFG. It adds the difference to plain CFG, so what other guidances add stays,
/// and so does what a CFG function of the model's own (`set_cfg_function`) does differently. It
/// costs no row. At cond_scale 1, and where one of the predictions is missing, there is nothing to
/// guide. CFG++ samplers move along the unconditional prediction, which zero_init_steps leaves.
///
/// Throws ValueError when zero_init_steps is below 0; if it is above, the guider needs
/// `CfgGuider::begin_run`.
/// Source: Fan et al. 2025 (arXiv 2503.18886), algorithm 1; ComfyUI: `CFGZeroStar`, which computes
/// alpha from x − denoised but scales the denoised latent by it; diffusers:
/// `ClassifierFreeZeroStarGuidance`.
SAG_API ModelPatcher apply_cfg_zero_star(const ModelPatcher& model,
                                         const CfgZeroStarOptions& options = {});

}  // namespace sag

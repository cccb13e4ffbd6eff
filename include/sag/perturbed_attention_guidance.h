#pragma once

#include <vector>

#include "sag/attention_hook.h"
#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"
#include "sag/token_grid.h"

namespace sag {

/// The scale and its default are ComfyUI's.
struct PerturbedAttentionGuidanceOptions {
  /// How strongly to steer; 0 is off.
  double scale = 3.0;
  /// Lowers the scale towards the end, where details form: scale − adaptive_scale · (1000 − t), at
  /// least 0, with t the timestep on a scale of 1000. diffusers: `pag_adaptive_scale`. EDM models
  /// have no such timestep.
  double adaptive_scale = 0.0;
  /// The self-attentions to perturb, all in the same rows: {"middle"}, {"middle", "output.3.0"}.
  std::vector<AttentionSite> sites = {"middle"};
  /// Where the picture's tokens are in them, if they have others, too; only those are perturbed. If
  /// nothing is said, all tokens are, whether they are a grid of the latent or not.
  PictureTokens tokens = {};
  /// Where it guides.
  GuidanceWindow window = {};
};

/// Perturbed-attention guidance (PAG). Returns a clone of `model` that steers away from what the
/// model predicts when each token of the picture attends to itself alone, that is, where the
/// attention's output is v:
///
///     denoised = denoised + scale · (cond_denoised − cond_denoised with out := v)
///
/// It costs one row more per image and active positive, in the main UNet call. Without positives
/// the unconditional prediction is perturbed, in a call of its own. Where it cannot guide (the site
/// did not run, it is no self-attention, or `tokens` finds no picture in it) the CFG result stays,
/// and the guider's report says why.
///
/// Throws ValueError when an option is out of range, or the UNet has no such site.
/// Source: Ahn et al. 2024 (arXiv 2403.17377), equations 12 to 16; ComfyUI:
/// `PerturbedAttentionGuidance`, which also evaluates unconditional rows at cond_scale 1 that it
/// does not use; diffusers: `pag_scale`, whose tokens all are the picture's.
SAG_API ModelPatcher apply_perturbed_attention_guidance(
    const ModelPatcher& model, const PerturbedAttentionGuidanceOptions& options = {});

}  // namespace sag

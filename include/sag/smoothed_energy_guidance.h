#pragma once

#include <limits>
#include <vector>

#include "sag/attention_hook.h"
#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"
#include "sag/token_grid.h"

namespace sag {

/// The paper's defaults.
struct SmoothedEnergyGuidanceOptions {
  /// How strongly to steer; 0 is off.
  double scale = 3.0;
  /// Of the blur of q, in tokens, > 0; infinity: every q becomes their mean.
  double blur_sigma = std::numeric_limits<double>::infinity();
  /// The self-attentions to smooth, all in the same rows.
  std::vector<AttentionSite> sites = {"middle"};
  /// Where the picture's tokens are in them, if they have others, too; only those are smoothed.
  PictureTokens tokens = {};
  /// Where it guides.
  GuidanceWindow window = {};
};

/// Smoothed-energy guidance (SEG). Returns a clone of `model` that steers away from what the model
/// predicts when the queries of its self-attention are blurred over the picture, along each side
/// with ⌈6·blur_sigma⌉ taps, but no more than there are tokens, and one more if that is even:
///
///     denoised = denoised + scale · (cond_denoised − cond_denoised with q := blur(q))
///
/// It costs one row more per image and active positive, in the main UNet call. Without positives
/// the unconditional prediction is smoothed, in a call of its own. Where it cannot guide (the site
/// did not run, its tokens are no grid of the latent, or a file computes that attention step by
/// step and shows no queries) the CFG result stays, and the guider's report says why.
///
/// Throws ValueError when an option is out of range, or the UNet has no such site.
/// Source: Hong 2024 (arXiv 2408.00760), section 4, and its public code, which limits the taps of
/// both sides by the width, and so fails on wide, thin pictures; here each side limits its own.
/// diffusers: `SmoothedEnergyGuidance`, which takes the mean where the sigma is finite, and blurs
/// where it is not.
SAG_API ModelPatcher apply_smoothed_energy_guidance(
    const ModelPatcher& model, const SmoothedEnergyGuidanceOptions& options = {});

}  // namespace sag

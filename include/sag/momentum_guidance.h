#pragma once

#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// The paper's symbols, with the values of ComfyUI's node.
struct MomentumGuidanceOptions {
  /// α: how far to go on, away from the average; 0 is off, negative values go towards it.
  double momentum = 0.5;
  /// β: how much of the average stays when a step is added, 0 … 1; 0: it is the step before.
  double ema = 0.6;
  /// Where it guides; the average is of the steps outside of it, too.
  GuidanceWindow window = {};
};

/// Momentum guidance (MG): steers on in the direction in which the run is going. Returns a clone of
/// `model` where, with d the result so far and average that of the steps before,
///
///     result  = d + momentum · (d − average)
///     average = ema · average + (1 − ema) · d
///
/// d and average are clean latents, [images, channels, height, width]. d is what CFG and the
/// guidances applied before this one made. It costs no row, and needs neither prompt nor negative.
///
/// The average is kept from step to step within a run, so it needs `CfgGuider::begin_run`, and a
/// latent of another shape starts it anew. The first step is the first average, and is not guided.
/// A step that is evaluated again replaces what it added.
///
/// Throws ValueError when momentum is not finite or ema is outside 0 … 1.
/// Source: Liao et al. 2026 (arXiv 2602.20360), algorithm 1, which has these formulas for the
/// velocity of flow models. ComfyUI: pamparamm's extension `MomentumGuidance`, which has them for
/// clean latents, as they are here: they mean the same for every kind of model. The two differ on
/// flow models, where a change of the velocity is σ times as much in the clean latent: here early
/// changes weigh more in d − average.
SAG_API ModelPatcher apply_momentum_guidance(const ModelPatcher& model,
                                             const MomentumGuidanceOptions& options = {});

}  // namespace sag

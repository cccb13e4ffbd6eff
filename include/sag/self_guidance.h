#pragma once

#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// The authors take a scale of 3, in the second half of the timesteps: `{.scale = 3, .window =
/// {.start_percent = 0.5}}`.
struct SelfGuidanceOptions {
  /// How strongly to steer; 0 is off, negative values steer the opposite way.
  double scale = 1.0;
  /// Where it guides; it compares with steps outside of it, too.
  GuidanceWindow window = {};
};

/// Self-guidance (SG-prev; it has nothing to do with self-attention): steers away from what the
/// step before, where there was more noise, predicted. Returns a clone of `model` where, with c the
/// network's output for the prompt (`ModelSampling::calculate_output`), before any guidance, and
/// before the c of the step before,
///
///     output = output + scale · (c − before)
///
/// [images, channels, height, width] each; output is the result so far, so what CFG and other
/// guidances did stays. Without a conditional prediction c is the unconditional one. It costs no
/// row.
///
/// In clean latents this adds scale · (D(c) − D(before)), both as denoised from this step's x.
/// After a step of Euler's method that nothing guided, that is D(σ_i) − D(σ_{i−1}), how the clean
/// latent changed.
///
/// c is kept from step to step within a run, so it needs `CfgGuider::begin_run`, and a latent of
/// another shape starts anew. The first step is not guided. Both evaluations of a step that is
/// evaluated twice are compared with the step before.
///
/// Throws ValueError when scale is not finite.
/// Source: Li et al. 2024 (arXiv 2412.05827). What is kept, and in which space, is from the
/// authors' code (maple-research-lab/Self-Guidance: its pipelines for Stable Diffusion, SD3, Flux,
/// CogVideoX and Mochi), not from the paper's text. There the window is `sg_prev_max_t`, timestep
/// 500. SG itself, which evaluates the network once more at a higher noise level, is not here.
SAG_API ModelPatcher apply_self_guidance(const ModelPatcher& model,
                                         const SelfGuidanceOptions& options = {});

}  // namespace sag

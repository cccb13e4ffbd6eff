#pragma once

#include <optional>

#include "sag/conditioning.h"
#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// See `apply_normalized_attention_guidance`.
struct NormalizedAttentionGuidanceOptions {
  /// How far to steer away from the negative prompt, the paper's φ. ComfyUI's NAGuidance and the
  /// authors' code count from 1: their nag_scale is this + 1.
  double scale = 2.0;
  /// The paper's τ: at most how many times as long as the attention's output, by its L1 norm, the
  /// steered output may be.
  double tau = 2.5;
  /// The paper's α: how much of the result is the steered output; the rest is the plain one.
  double alpha = 0.5;
  /// What to steer away from, 1 or as many rows as images; its strength and its window do not
  /// count. Unset: the guider's negative prompt, while it is active.
  std::optional<Conditioning> negative = {};
  /// The noise levels at which it works.
  GuidanceWindow window = {};
};

/// Returns a clone of `model` with Normalized Attention Guidance (2505.21179, algorithm 1): in
/// every cross-attention of the conditional rows, with the outputs Z⁺ for the prompt and Z⁻ for the
/// negative prompt,
///
///     Z̃ = Z⁺ + scale · (Z⁺ − Z⁻)
///     Ẑ = Z̃ · min(1, τ·‖Z⁺‖₁ / ‖Z̃‖₁)        per token, over all heads
///     Z = α·Ẑ + (1 − α)·Z⁺
///
/// It costs no UNet rows: the negative prompt's context is joined to the prompt's
/// (`Conditioning::context_parts`), so its keys and values come from the same call. So it works
/// without CFG, also where guidance was distilled into the model, and beside it.
///
/// It acts on all conditional rows, also those of other guidances. It does nothing, and says so in
/// the report, outside of its window, without a prompt or a negative one, with several negatives,
/// and where the negative has an area or a mask. Evaluations throw ValueError when it was applied
/// twice and on contexts whose width or rows do not fit, and RuntimeError when a cross-attention
/// did not run, runs with a mask, or does not have the context's tokens as its keys (both prompts
/// would be drawn then), and where a file computes it step by step in fp16 or in an unusual layout.
///
/// Throws ValueError on a scale that is not finite, a tau that is not above 0, an alpha outside of
/// 0 … 1, and when the UNet does not list its cross-attentions.
///
/// Differs from ComfyUI's NAGuidance, which patches the self-attentions, and from the ComfyUI
/// extension's (sd-perturbed-attention), which keeps keys and values from when it was applied.
SAG_API ModelPatcher apply_normalized_attention_guidance(
    const ModelPatcher& model, const NormalizedAttentionGuidanceOptions& options = {});

}  // namespace sag

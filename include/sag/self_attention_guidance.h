#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>

#include <torch/types.h>

#include "sag/attention_hook.h"
#include "sag/export.h"
#include "sag/model_patcher.h"
#include "sag/token_grid.h"

namespace sag {

/// The guidance itself, for callers with their own UNet and sampler.
struct SelfAttentionGuidanceStep {
  /// How strongly to steer; 0 is off.
  double scale = 0.5;
  /// Of the blur, in latent cells; 0 is off.
  double blur_sigma = 2.0;
  /// Tokens that receive strictly more attention are blurred; 1 is the average.
  double threshold = 1.0;
  /// Taps of the blur, odd; 0: as many as blur_sigma needs.
  std::int64_t kernel_size = 9;
  /// a of x = a·x0 + σ·n: 1 if the noisy latent is x0 + σ·n, 1 − σ for flow models.
  double renoise_scale = 1.0;
};

/// Returns the denoised latent, steered away from what the model predicts when the parts that it
/// attends to are blurred:
///
///     degraded = create_blur_map(uncond_denoised, attn_map)
///     x_again  = x + renoise_scale · (degraded − uncond_denoised)
///     result   = denoised + scale · (degraded − predict_uncond(x_again))
///
/// denoised: the CFG result; x: the noisy latent; uncond_denoised: the unconditional prediction at
/// x; all [B, C, H, W]. attn_map: what `attention_map` returned for the unconditional rows of the
/// same UNet call, [B, tokens], a grid of the latent (`token_grid`), or [B, 1, H, W].
/// predict_uncond: one more unconditional prediction, at the same σ. It is not called, and
/// `denoised` is returned as it is, if scale or blur_sigma is 0 or a side of the latent is 4 or
/// less.
///
/// The formula holds for every prediction type, because it uses predictions of the clean latent.
/// Throws ValueError or TypeError on other arguments. Exceptions of `predict_uncond` pass through.
/// Source: Hong et al. 2023, equation 10 and algorithm 1; ComfyUI: `SelfAttentionGuidance.patch`.
SAG_API torch::Tensor self_attention_guidance(
    const torch::Tensor& denoised, const torch::Tensor& x, const torch::Tensor& uncond_denoised,
    const torch::Tensor& attn_map,
    const std::function<torch::Tensor(const torch::Tensor& x_again)>& predict_uncond,
    const SelfAttentionGuidanceStep& step = {});

/// ComfyUI's node inputs with their defaults, and what ComfyUI keeps fixed.
struct SelfAttentionGuidanceOptions {
  /// How strongly to steer; 0 is off, negative values steer the wrong way.
  double scale = 0.5;
  /// Sigma of the blur, in latent cells, >= 0; 0 is off.
  double blur_sigma = 2.0;
  /// Tokens that receive strictly more attention are blurred; 1 is the average.
  double threshold = 1.0;
  /// Taps of the blur, odd; 0: as many as blur_sigma needs.
  std::int64_t kernel_size = 9;
  /// Guided while sigma_end <= sigma <= sigma_start.
  double sigma_start = std::numeric_limits<double>::infinity();
  /// See sigma_start.
  double sigma_end = 0.0;
  /// The same window as shares of the model's timesteps, 0 = start, 1 = end, converted by
  /// `ModelSampling::percent_to_sigma`. If set, it replaces sigma_start or sigma_end.
  std::optional<double> start_percent = {};
  /// See start_percent.
  std::optional<double> end_percent = {};
  /// Guides every interval-th step of the run, from the first; the steps in between cost nothing.
  /// A step is the interval of the run's sigmas that an evaluation falls into (Heun's corrector
  /// counts as the next); without `CfgGuider::begin_run` the guider throws.
  std::int64_t interval = 1;
  /// Perturbs with what was blurred in the step before, so that the guidance's own rows go through
  /// the UNet together with the main ones: with δ = degraded − uncond_denoised of the latest
  /// earlier step,
  ///
  ///     result = denoised + scale · (uncond_denoised + δ − predict_uncond(x + renoise_scale · δ))
  ///
  /// The first guided step has no δ and runs as without it. This needs `CfgGuider::begin_run` too.
  bool one_pass = false;
  /// The self-attention to watch: {"middle", 0, 0}, "model.mid.1", "#6"; "middle" finds that of the
  /// middle block, whatever names the UNet uses, and the guider's report says which one and why.
  AttentionSite site = "middle";
  /// Where the picture's tokens are in that attention, if it has others, too: {.before = 1} for a
  /// class token, {.after = 77} for a text that follows, {.before = PictureTokens::kRest,
  /// .reduction = 2} for a text of any length before patches of 2 × 2.
  ///
  /// The map is then what the picture's tokens give to each other: the softmax is over all keys,
  /// the sums are those of the picture's queries and keys, divided by their mean. So a threshold of
  /// 1 is still the average token of the picture, however much attention the others draw.
  PictureTokens tokens = {};
};

/// Returns a clone of `model` that guides itself: a hook records the attention map of the
/// unconditional rows while the UNet runs, and a post-CFG function turns it into
/// `self_attention_guidance`.
///
/// Where it cannot guide (no unconditional prediction, a side of the latent 4 or less, the site did
/// not run, its tokens are no grid of the latent), the CFG result stays, and the guider's report
/// says why. Outside the window, and with
/// scale or blur_sigma 0, it evaluates nothing and does not change a bit. At cond_scale 1 it has
/// the unconditional rows evaluated while it is active. With several negatives, their maps are
/// averaged per latent cell with the weights of the prediction, before the comparison. If applied
/// twice, each works as if alone, in order.
///
/// Throws ValueError when an option is out of range, or the UNet has no such site. Where only a
/// probe can find the middle block, the guider's first evaluation decides or throws ValueError.
SAG_API ModelPatcher apply_self_attention_guidance(
    const ModelPatcher& model, const SelfAttentionGuidanceOptions& options = {});

}  // namespace sag

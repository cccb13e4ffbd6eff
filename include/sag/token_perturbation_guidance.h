#pragma once

#include <cstdint>
#include <vector>

#include "sag/attention_hook.h"
#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// See `apply_token_perturbation_guidance`.
struct TokenPerturbationGuidanceOptions {
  /// How strongly to steer; 0 is off.
  double scale = 3.0;
  /// The transformer blocks whose tokens are shuffled, all in the same rows. The authors shuffle
  /// those of SDXL's way down: input.4.0 … input.8.9.
  std::vector<AttentionSite> blocks = {"middle"};
  /// What the orders are drawn from, together with the step, the noise level and the block.
  std::uint64_t seed = 0;
  /// Where it guides.
  GuidanceWindow window = {};
};

/// Token perturbation guidance (TPG). Returns a clone of `model` that steers away from what the
/// model predicts when the tokens of some transformer blocks are in another order, drawn anew for
/// every block and step:
///
///     denoised = denoised + scale · (cond_denoised − cond_denoised with shuffled tokens)
///
/// What is shuffled is what a block returns. In blocks that know no places, such as those of Stable
/// Diffusion's UNets, this is what the block returns for shuffled tokens, as in the paper; a block
/// that adds positions of its own is only shuffled behind them.
///
/// It costs one row more per image and active positive, in the main UNet call, and its steps are
/// not replayed as CUDA graphs, as every step has other orders. Without positives the unconditional
/// prediction is shuffled, in a call of its own. Where it cannot guide (a block did not
/// run, or works on other rows than the batch's) the
/// CFG result stays, and the guider's report says why.
///
/// Throws ValueError when an option is out of range, or the UNet lists no such block
/// (`UNet::block_sites`; compiled packages list none).
/// Source: Rajabi et al. 2025 (arXiv 2506.10036), section 3, and its public code; ComfyUI:
/// `TokenPerturbationGuidance` (an extension, sd-perturbed-attention). Both draw from the process's
/// random numbers; here a run repeats.
SAG_API ModelPatcher apply_token_perturbation_guidance(
    const ModelPatcher& model, const TokenPerturbationGuidanceOptions& options = {});

}  // namespace sag

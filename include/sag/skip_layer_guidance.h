#pragma once

#include <vector>

#include "sag/attention_hook.h"
#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// Scale and window are ComfyUI's for SD3.5, whose blocks are 7, 8 and 9.
struct SkipLayerGuidanceOptions {
  /// How strongly to steer; 0 is off.
  double scale = 3.0;
  /// The transformer blocks to skip, all in the same rows: {"transformer_blocks.7", …}, {"middle"}.
  std::vector<AttentionSite> blocks = {"middle"};
  /// Where it guides.
  GuidanceWindow window = {.start_percent = 0.01, .end_percent = 0.15};
};

/// Skip-layer guidance (SLG), and with it spatiotemporal skip guidance (STG) by whole blocks.
/// Returns a clone of `model` that steers away from what the model predicts when some transformer
/// blocks return what they were given:
///
///     denoised = denoised + scale · (cond_denoised − cond_denoised without the blocks)
///
/// It costs one row more per image and active positive, in the main UNet call; the skipped blocks
/// are computed for it all the same. Without positives the unconditional prediction goes without
/// the blocks, in a call of its own. Where it cannot guide (a block did not
/// run, or works on other rows than the batch's) the CFG result
/// stays, and the guider's report says why. A joint block of two streams (SD3) is skipped as a
/// whole where both streams are named.
///
/// Throws ValueError when an option is out of range, or the UNet lists no such block
/// (`UNet::block_sites`; compiled packages list none).
/// Source: Stability AI's sd3.5 (pull request 11, 2024), of which there is no paper; Hyung et al.
/// 2024 (arXiv 2411.18664), equation 6; ComfyUI: `SkipLayerGuidanceDiT`, without its rescaling.
SAG_API ModelPatcher apply_skip_layer_guidance(const ModelPatcher& model,
                                               const SkipLayerGuidanceOptions& options = {});

}  // namespace sag

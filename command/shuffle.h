#pragma once

#include "sag/model_patcher.h"
#include "sag/token_grid.h"

namespace sag_sample {

/// Returns a clone of `model` whose later hooks of `site` see the picture's tokens (`where` says
/// which they are) in a random order, another in every step and for every picture of a UNet call;
/// the output is put back in order, so the model's predictions stay, up to rounding. Guidance
/// applied to the clone blurs as many cells as else, at random places: the control that tells what
/// the attention map is worth. The order follows from the step and the place in the batch; nothing
/// else is drawn.
sag::ModelPatcher shuffle_tokens(const sag::ModelPatcher& model, const sag::AttentionSite& site,
                                 const sag::PictureTokens& where = {});

}  // namespace sag_sample

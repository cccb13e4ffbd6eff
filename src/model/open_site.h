#pragma once

#include "sag/model_patcher.h"
#include "sag/step_context.h"

namespace sag {

/// Returns whether a hook that is active in this evaluation has no site yet
/// (`ModelPatcher::decide_sites`). An idle one needs none.
bool has_open_site(const ModelPatcher& model, const StepContext& step);

}  // namespace sag

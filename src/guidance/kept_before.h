#pragma once

#include <torch/types.h>

#include "sag/cfg_functions.h"

namespace sag {

/// Returns what `owner` kept in the latest step before this one, in the dtype of `args.denoised`.
/// Undefined if there is none, or if the latent had another shape then.
torch::Tensor kept_before(const Owner& owner, const PostCfgArgs& args);

/// What a guidance says that does nothing without it.
constexpr const char* kNoStepBefore = "there is no step before this one";

}  // namespace sag

#pragma once

#include "guidances.h"

namespace sag_sample {

/// The guidances that change what CFG made of the predictions; given with --guidance alone.
GuidanceKind apg_kind();
GuidanceKind cfg_zero_kind();
GuidanceKind rescale_kind();
GuidanceKind dynamic_threshold_kind();
GuidanceKind momentum_kind();
GuidanceKind self_guidance_kind();

}  // namespace sag_sample

#pragma once

#include "guidances.h"

namespace sag_sample {

/// The guidances beside SAG that look into the network; given with --guidance alone.
GuidanceKind pag_kind();
GuidanceKind seg_kind();
GuidanceKind tpg_kind();
GuidanceKind slg_kind();
GuidanceKind nag_kind();

}  // namespace sag_sample

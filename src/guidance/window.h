#pragma once

#include "sag/guidance_window.h"
#include "sag/model_sampling.h"

namespace sag {

/// Returns the window with its percents turned into sigmas. Throws ValueError, naming `caller`, on
/// percents outside 0 … 1 and on a window that ends before it starts.
GuidanceWindow in_sigmas(GuidanceWindow window, const ModelSampling& sampling, const char* caller);

/// Whether the window holds a noise level.
bool contains(const GuidanceWindow& window, double sigma);

/// What a guidance says that does nothing there.
constexpr const char* kOutsideWindow = "sigma is outside the window";

}  // namespace sag

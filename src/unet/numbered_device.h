#pragma once

#include <torch/types.h>

namespace sag {

/// Returns `device` with its number: "cuda" alone is the current one. Throws ValueError, as
/// `caller`, where there is no device of that number.
torch::Device numbered_device(torch::Device device, const char* caller);

}  // namespace sag

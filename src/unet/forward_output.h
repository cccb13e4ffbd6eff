#pragma once

#include <ATen/core/ivalue.h>
#include <torch/types.h>

namespace sag {

/// Returns the tensor in what a file's `forward` returned: itself, the first of a tuple or list, or
/// "sample", "out" or the only entry of a dict, at any depth; undefined if there is none.
torch::Tensor output_tensor(const c10::IValue& output);

}  // namespace sag

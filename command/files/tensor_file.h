#pragma once

#include <string>

#include <torch/types.h>

namespace sag_sample {

/// Reads a tensor that Python's torch.save or safetensors wrote: "FILE" if the file holds one
/// tensor, "FILE:KEY" if it holds several by name. Returns it on the CPU, contiguous, with its own
/// dtype, wherever it was when it was saved. `option` is what messages call it, "--noise" say.
///
/// Throws UsageError, in one sentence, when there is no such file or key, and, with the command
/// that saves it again, for files in a form that LibTorch does not read (an OrderedDict, torch
/// before 1.6).
torch::Tensor read_tensor(const std::string& option, const std::string& where);

/// Returns the bytes of a file that holds the tensor alone, in fp32 on the CPU. Python's
/// torch.load(weights_only=True) reads it.
std::string tensor_file_bytes(const torch::Tensor& tensor);

}  // namespace sag_sample

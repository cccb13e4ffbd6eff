#pragma once

#include <string>

#include <torch/csrc/jit/api/module.h>

namespace sag {

/// Reads a TorchScript archive onto the CPU, in eval mode. Throws ValueError as `caller`, in one
/// sentence, when the file cannot be read or is something else.
torch::jit::Module read_archive(const std::string& path, const char* caller);

}  // namespace sag

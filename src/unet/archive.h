#pragma once

#include <optional>
#include <string>

#include <torch/csrc/jit/api/module.h>
#include <torch/types.h>

namespace sag {

/// Reads a TorchScript archive onto the CPU, in eval mode. Throws ValueError, in one sentence, when
/// the file cannot be read or is something else.
torch::jit::Module read_archive(const std::string& path);

/// Returns `device` with its number: "cuda" alone is the current one. Throws ValueError, as
/// `caller`, where there is none of that number.
torch::Device numbered_device(const char* caller, torch::Device device);

/// Moves parameters and buffers to `device`. Floating parameters get `dtype`; floating buffers are
/// only ever widened to it (see `convert_constants`).
void convert_module(torch::jit::Module& module, torch::Device device,
                    std::optional<torch::ScalarType> dtype);

/// Lays the weights of convolutions out with channels last.
void use_channels_last(torch::jit::Module& module);

/// Returns the share of a module's parameters that convolutions hold.
double convolution_share(const torch::jit::Module& module);

/// Returns the dtype of the floating parameters, by number of elements; nothing if there are none.
std::optional<torch::ScalarType> parameters_dtype(const torch::jit::Module& module);

/// Returns what keeps a path from being read as a zip archive ("which does not exist"), or nothing.
std::string zip_problem(const std::string& path);

/// Returns what an exception of LibTorch's interpreter or loader says, without tracebacks, on one
/// line.
std::string plain_message(const std::exception& error);

}  // namespace sag

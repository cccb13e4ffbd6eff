#pragma once

#include <optional>

#include <torch/types.h>

namespace torch::jit {
struct Module;
}

// Device, dtype and layout of the tensors of a TorchScript module.
namespace sag {

/// Moves parameters and buffers to `device`. Floating parameters get `dtype`; floating buffers are
/// only ever widened to it (see `convert_constants`).
void convert_module(torch::jit::Module& module, torch::Device device,
                    std::optional<torch::ScalarType> dtype);

/// Stores the weights of convolutions with channels last.
void use_channels_last(torch::jit::Module& module);

/// Returns the share of the parameters' elements that belongs to convolutions.
double convolution_share(const torch::jit::Module& module);

/// Returns the dtype that most elements of floating parameters have; nothing if there are none.
std::optional<torch::ScalarType> parameters_dtype(const torch::jit::Module& module);

}  // namespace sag

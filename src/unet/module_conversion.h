#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

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

/// The value of a parameter, by its name.
using WeightSource = std::function<torch::Tensor(const std::string& parameter)>;

/// Gives every parameter its value on `device` in `dtype`, one after the other, so that no more
/// than one is held twice. Throws ValueError, as `caller`, for one that is not floating, has
/// another shape (a convolution may take other channels), or is not finite in `dtype`.
void fill_parameters(torch::jit::Module& module, const WeightSource& weights, torch::Device device,
                     torch::ScalarType dtype, const char* caller);

/// Throws ValueError, as `caller`, if one of the weights is not finite: `finite` holds a truth
/// value for each, on any device, and they are fetched from there at once. `dtype`: in what.
void check_finite(const std::vector<std::string>& names, const std::vector<torch::Tensor>& finite,
                  const std::string& dtype, const char* caller);

/// Stores the weights of convolutions with channels last.
void use_channels_last(torch::jit::Module& module);

/// Returns the share of the parameters' elements that belongs to convolutions.
double convolution_share(const torch::jit::Module& module);

/// Returns the dtype that most elements of floating parameters have; nothing if there are none.
std::optional<torch::ScalarType> parameters_dtype(const torch::jit::Module& module);

}  // namespace sag

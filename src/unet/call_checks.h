#pragma once

#include <functional>
#include <string>

#include <torch/types.h>

#include "sag/unet.h"

// What one call of a network is given, and what it returns. `caller` is who reports an error.
namespace sag {

/// Throws ValueError unless x is given and has four dimensions.
void check_x(const torch::Tensor& x, const char* caller);

/// Throws ValueError unless `t`, an input called `name`, is on `device`, and TypeError unless it
/// has `dtype`.
void check_place(const std::string& name, const torch::Tensor& t, torch::Device device,
                 torch::ScalarType dtype, const char* caller);

/// Throws ValueError or TypeError unless the input's shapes, dtypes and devices fit each other and
/// the UNet's.
void check_input(const UNetInput& input, torch::Device device, torch::ScalarType dtype,
                 const char* caller);

/// Returns what a network was given, for errors: a network that fails names only one of its layers.
std::string list_shapes(const UNetInput& input);

/// Throws ValueError unless `out` has x's rows, height and width. `model` is what the error calls
/// the network; what `note` returns ends its text.
void check_output(const torch::Tensor& out, const torch::Tensor& x, const std::string& model,
                  const char* caller, const std::function<std::string()>& note = {});

}  // namespace sag

#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include "sag/unet.h"

namespace sag {

/// Which input of a UNet goes to which argument of a file's `forward`.
class ForwardCall {
 public:
  /// `forward` as its schema describes it, self included. Throws ValueError, naming `caller` and
  /// `model`, unless it takes at least x and timesteps.
  ForwardCall(const c10::FunctionSchema& forward, const char* caller, const std::string& model);

  std::vector<std::string> argument_names() const;

  /// Returns the arguments in order, without self. Throws ValueError when the file does not take an
  /// input that is given, or needs one that is not.
  std::vector<c10::IValue> arguments(const UNetInput& input) const;

 private:
  std::size_t index_of(const std::string& name) const;
  void place(const std::string& name, const torch::Tensor& t,
             std::vector<c10::IValue>& values) const;
  std::string context_name(const UNetInput& input) const;
  void place_extra(const std::map<std::string, torch::Tensor>& extra,
                   std::vector<c10::IValue>& values) const;
  std::string list() const;

  std::vector<c10::Argument> arguments_;
};

/// Throws ValueError or TypeError unless the input's shapes, dtypes and devices fit each other and
/// the UNet's.
void check_input(const UNetInput& input, torch::Device device, torch::ScalarType dtype);

/// Returns what a network was given, for errors: one that fails says itself only which of its
/// layers minded.
std::string list_shapes(const UNetInput& input);

/// Throws ValueError unless `out` has x's rows, height and width. `model` is what the error calls
/// the network, `caller` who reports.
void check_output(const torch::Tensor& out, const torch::Tensor& x, const char* caller,
                  const std::string& model);

/// Returns the tensor in what `forward` returned: itself, the first of a tuple or list, or
/// "sample", "out" or the only entry of a dict, at any depth; undefined if there is none.
torch::Tensor output_tensor(const c10::IValue& output);

}  // namespace sag

#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include "sag/unet.h"
#include "timestep_form.h"

namespace sag {

/// Gives the inputs of a UNet to the arguments of a file's `forward`.
class ForwardCall {
 public:
  /// `forward` includes self. Throws ValueError, as `caller`, unless it takes x and timesteps
  /// first; `model` is what the error calls the network.
  ForwardCall(const c10::FunctionSchema& forward, const char* caller, const std::string& model);

  std::vector<std::string> argument_names() const;
  const c10::Argument& timesteps() const;

  /// Returns the arguments in order, the timesteps in the form that is given, without self. Throws
  /// ValueError when the file does not take an input that is given, or needs one that is not.
  std::vector<c10::IValue> arguments(const UNetInput& input, const TimestepForm& form) const;

 private:
  std::size_t index_of(const std::string& name) const;
  void set(const std::string& name, const torch::Tensor& t, std::vector<c10::IValue>& values) const;
  void set_extra(const std::map<std::string, torch::Tensor>& extra,
                 std::vector<c10::IValue>& values) const;
  std::string context_name(const UNetInput& input) const;
  std::string list_arguments() const;

  std::vector<c10::Argument> arguments_;
};

}  // namespace sag

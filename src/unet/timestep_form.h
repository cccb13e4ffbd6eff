#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <torch/types.h>

namespace torch::jit {
struct Value;
}

namespace sag {

/// How a file takes its timesteps, which callers give as [rows] fp32.
struct TimestepForm {
  enum class Kind { tensor, whole_number, number };
  Kind kind = Kind::tensor;
  /// Of a tensor: one value for all rows, of this many dimensions, 0 or 1; −1: one for each row.
  std::int64_t one_of_dims = -1;
  /// Of a tensor: whole numbers, int64.
  bool indices = false;
};

/// Whether the argument can be given timesteps in some form.
bool takes_timesteps(const c10::Argument& argument);

/// Finds the form: from the argument's type, from what the flattened graph does with its value, and
/// from the timesteps that the file was traced with (undefined: unknown), for `traced_rows` rows.
TimestepForm find_timestep_form(const c10::Argument& argument, torch::jit::Value* value,
                                const torch::Tensor& traced, std::int64_t traced_rows);

/// Whether the graph computes with the numbers of a value, and not with its shape alone.
bool is_computed_with(const torch::jit::Value* value);

/// Throws ValueError, as `caller`, when nothing would be left of a timestep that is rounded, for
/// forms that round. Looks at the values, so it waits for the device.
void check_can_be_rounded(const TimestepForm& form, const torch::Tensor& timesteps,
                          const char* caller);

/// Returns the timesteps in this form. Throws ValueError, as `caller`, when one value must do for
/// all rows and they differ; on the CPU only, for elsewhere looking would wait for the device:
/// there values that differ become NaN.
c10::IValue timesteps_as(const TimestepForm& form, const torch::Tensor& timesteps,
                         const char* caller);

}  // namespace sag

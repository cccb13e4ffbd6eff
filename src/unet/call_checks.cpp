#include "call_checks.h"

#include <cstdint>

#include <c10/util/Exception.h>

#include "model/latent.h"

namespace sag {
namespace {

// An input of `dims` dimensions, or of any number if that is 0.
void check_rows(const std::string& name, const torch::Tensor& t, std::int64_t dims,
                const torch::Tensor& x, const char* caller) {
  const bool fits = (dims == 0 || t.dim() == dims) && t.dim() > 0 && t.size(0) == x.size(0);
  TORCH_CHECK_VALUE(fits, "[", caller, "] ", name, " must have ",
                    dims == 0 ? std::string() : c10::str(dims, " dimensions and "), x.size(0),
                    " rows as x has, got ", t.sizes(), ".");
}

// An input that may be missing.
void check_optional(const std::string& name, const torch::Tensor& t, std::int64_t dims,
                    const torch::Tensor& x, torch::ScalarType dtype, const char* caller) {
  if (!t.defined()) return;
  check_rows(name, t, dims, x, caller);
  check_place(name, t, x.device(), dtype, caller);
}

}  // namespace

void check_x(const torch::Tensor& x, const char* caller) {
  TORCH_CHECK_VALUE(x.defined() && x.dim() == 4, "[", caller, "] x must have 4 dimensions, got ",
                    shape_text(x), ".");
}

void check_place(const std::string& name, const torch::Tensor& t, torch::Device device,
                 torch::ScalarType dtype, const char* caller) {
  TORCH_CHECK_VALUE(t.device() == device, "[", caller, "] ", name,
                    " must be on the UNet's device, ", device, ", got ", t.device(), ".");
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "[", caller, "] ", name, " must be ", dtype, ", got ",
                   t.scalar_type(), ".");
}

void check_input(const UNetInput& input, torch::Device device, torch::ScalarType dtype,
                 const char* caller) {
  const auto& x = input.x;
  check_x(x, caller);
  check_place("x", x, device, dtype, caller);
  TORCH_CHECK_VALUE(input.timesteps.defined(), "[", caller,
                    "] timesteps must be given, got an undefined tensor.");
  check_optional("timesteps", input.timesteps, 1, x, torch::kFloat, caller);
  check_optional("context", input.context, 3, x, dtype, caller);
  check_optional("y", input.y, 2, x, dtype, caller);
  // Only floating ones must have the UNet's dtype: a mask may be bool.
  for (const auto& [name, t] : input.extra)
    check_optional(name, t, 0, x, t.defined() && !t.is_floating_point() ? t.scalar_type() : dtype,
                   caller);
}

std::string list_shapes(const UNetInput& input) {
  auto text = c10::str("x of shape ", input.x.sizes());
  if (input.context.defined()) text += c10::str(", context of shape ", input.context.sizes());
  if (input.y.defined()) text += c10::str(", y of shape ", input.y.sizes());
  for (const auto& [name, t] : input.extra)
    if (t.defined()) text += c10::str(", ", name, " of shape ", t.sizes());
  return text;
}

void check_output(const torch::Tensor& out, const torch::Tensor& x, const std::string& model,
                  const char* caller, const std::function<std::string()>& note) {
  const bool fits = out.defined() && out.dim() == 4 && out.size(0) == x.size(0) &&
                    out.size(2) == x.size(2) && out.size(3) == x.size(3);
  TORCH_CHECK_VALUE(fits, "[", caller, "] ", model, " must return x's rows, height and width, got ",
                    shape_text(out), " for x of shape ", x.sizes(), ".", note ? note() : "");
}

}  // namespace sag

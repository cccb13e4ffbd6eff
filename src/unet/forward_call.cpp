#include "forward_call.h"

#include <optional>

#include <ATen/core/Dict.h>
#include <c10/util/Exception.h>

namespace sag {
namespace {

constexpr std::size_t kX = 0, kTimesteps = 1, kContext = 2;

bool takes_tensor(const c10::Argument& argument) {
  return c10::TensorType::get()->isSubtypeOf(*argument.type());
}

bool may_be_none(const c10::Argument& argument) {
  return c10::NoneType::get()->isSubtypeOf(*argument.type());
}

void check_rows(const char* name, const torch::Tensor& t, std::int64_t dims,
                const torch::Tensor& x) {
  const bool fits = (dims < 0 || t.dim() == dims) && t.dim() > 0 && t.size(0) == x.size(0);
  TORCH_CHECK_VALUE(fits, "[TorchScriptUNet::forward] ", name, " must have ",
                    dims < 0 ? std::string() : std::to_string(dims) + " dimensions and ", x.size(0),
                    " rows as x has, got ", t.sizes());
}

void check_place(const char* name, const torch::Tensor& t, torch::Device device,
                 std::optional<torch::ScalarType> dtype) {
  TORCH_CHECK_VALUE(t.device() == device, "[TorchScriptUNet::forward] ", name,
                    " must be on the UNet's device, ", device, ", got ", t.device());
  TORCH_CHECK_TYPE(!dtype || t.scalar_type() == *dtype, "[TorchScriptUNet::forward] ", name,
                   " must be ", *dtype, ", got ", t.scalar_type());
}

void check_optional(const char* name, const torch::Tensor& t, std::int64_t dims,
                    const torch::Tensor& x, torch::Device device, torch::ScalarType dtype) {
  if (!t.defined()) return;
  check_rows(name, t, dims, x);
  check_place(name, t, device,
              dims < 0 && !t.is_floating_point() ? std::nullopt : std::make_optional(dtype));
}

template <typename Elements>
torch::Tensor first_tensor(const Elements& elements) {
  for (const c10::IValue& element : elements) {
    if (element.isTensor()) return element.toTensor();
  }
  return {};
}

torch::Tensor entry(const c10::Dict<c10::IValue, c10::IValue>& dict) {
  if (dict.size() == 1) return first_tensor(std::vector{dict.begin()->value()});
  if (*dict.keyType() != *c10::StringType::get()) return {};
  for (const char* name : {"sample", "out"}) {
    if (dict.contains(name)) return first_tensor(std::vector{dict.at(name)});
  }
  return {};
}

}  // namespace

ForwardCall::ForwardCall(const c10::FunctionSchema& forward, const char* caller,
                         const std::string& model)
    : arguments_(forward.arguments().begin() + 1, forward.arguments().end()) {
  const bool fits = arguments_.size() > kTimesteps && takes_tensor(arguments_[kX]) &&
                    takes_tensor(arguments_[kTimesteps]);
  TORCH_CHECK_VALUE(fits, "[", caller, "] the forward of ", model,
                    " must take x and timesteps first, but its arguments are (", list(), ")");
}

std::vector<std::string> ForwardCall::argument_names() const {
  std::vector<std::string> names;
  for (const auto& argument : arguments_) names.push_back(argument.name());
  return names;
}

std::string ForwardCall::list() const {
  std::string text;
  for (const auto& name : argument_names()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::size_t ForwardCall::index_of(const std::string& name) const {
  std::size_t i = 0;
  while (i < arguments_.size() && arguments_[i].name() != name) ++i;
  return i;
}

void ForwardCall::place(const std::string& name, const torch::Tensor& t,
                        std::vector<c10::IValue>& values) const {
  if (!t.defined()) return;
  const auto i = index_of(name);
  const bool fits =
      i > kTimesteps && i < arguments_.size() && takes_tensor(arguments_[i]) && values[i].isNone();
  TORCH_CHECK_VALUE(fits, "[TorchScriptUNet::forward] the file takes no tensor '", name,
                    "', its arguments are (", list(), ")");
  values[i] = t;
}

std::vector<c10::IValue> ForwardCall::arguments(const UNetInput& input) const {
  std::vector<c10::IValue> values(arguments_.size());
  values[kX] = input.x;
  values[kTimesteps] = input.timesteps;
  // The third argument is the context under whatever name, unless it is known as something else.
  std::string context = "context";
  if (arguments_.size() > kContext && takes_tensor(arguments_[kContext])) {
    const auto& name = arguments_[kContext].name();
    if (name != "y" && !input.extra.contains(name)) context = name;
  }
  place(context, input.context, values);
  place("y", input.y, values);
  for (const auto& [name, t] : input.extra) place(name, t, values);

  for (std::size_t i = 0; i < arguments_.size(); ++i) {
    if (!values[i].isNone()) continue;
    if (const auto& value = arguments_[i].default_value()) {
      values[i] = *value;
      continue;
    }
    TORCH_CHECK_VALUE(may_be_none(arguments_[i]), "[TorchScriptUNet::forward] the file needs '",
                      arguments_[i].name(), "', which is not given; its arguments are (", list(),
                      ")");
  }
  return values;
}

void check_input(const UNetInput& input, torch::Device device, torch::ScalarType dtype) {
  const auto& x = input.x;
  TORCH_CHECK_VALUE(x.defined() && x.dim() == 4,
                    "[TorchScriptUNet::forward] x must have 4 dimensions, got ",
                    x.defined() ? c10::str(x.sizes()) : "none");
  check_place("x", x, device, dtype);
  TORCH_CHECK_VALUE(input.timesteps.defined(),
                    "[TorchScriptUNet::forward] timesteps must be given");
  check_optional("timesteps", input.timesteps, 1, x, device, torch::kFloat);
  check_optional("context", input.context, 3, x, device, dtype);
  check_optional("y", input.y, 2, x, device, dtype);
  for (const auto& [name, t] : input.extra) check_optional(name.c_str(), t, -1, x, device, dtype);
}

std::string list_shapes(const UNetInput& input) {
  auto text = c10::str("x of shape ", input.x.sizes());
  if (input.context.defined()) text += c10::str(", context of shape ", input.context.sizes());
  if (input.y.defined()) text += c10::str(", y of shape ", input.y.sizes());
  for (const auto& [name, t] : input.extra)
    if (t.defined()) text += c10::str(", ", name, " of shape ", t.sizes());
  return text;
}

torch::Tensor output_tensor(const c10::IValue& output) {
  if (output.isTensor()) return output.toTensor();
  if (output.isTuple()) return first_tensor(output.toTupleRef().elements());
  if (output.isList()) return first_tensor(output.toListRef());
  if (output.isGenericDict()) return entry(output.toGenericDict());
  return {};
}

}  // namespace sag

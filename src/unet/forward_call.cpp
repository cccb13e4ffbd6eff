#include "forward_call.h"

#include <algorithm>
#include <utility>

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

// The entries of a dict, list or tuple that an argument takes, by key or by number.
using Entries = std::map<std::string, torch::Tensor>;

// The type of an argument if it is not None.
c10::TypePtr given_type(const c10::Argument& argument) {
  const auto optional = argument.type()->cast<c10::OptionalType>();
  return optional ? optional->getElementType() : argument.type();
}

bool holds_tensors(const c10::TypePtr& type) {
  const auto takes = [](const c10::TypePtr& part) {
    return c10::TensorType::get()->isSubtypeOf(*part);
  };
  if (const auto dict = type->cast<c10::DictType>())
    return *dict->getKeyType() == *c10::StringType::get() && takes(dict->getValueType());
  if (const auto list = type->cast<c10::ListType>()) return takes(list->getElementType());
  const auto tuple = type->cast<c10::TupleType>();
  return tuple && std::all_of(tuple->elements().begin(), tuple->elements().end(), takes);
}

// The entries "0", "1", … in order.
std::vector<torch::Tensor> in_order(const Entries& entries, const std::string& argument) {
  std::vector<torch::Tensor> tensors;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const auto found = entries.find(std::to_string(i));
    TORCH_CHECK_VALUE(found != entries.end(), "[TorchScriptUNet::forward] the entries of \"",
                      argument, "\" must be numbered from 0 without gaps, but of ", entries.size(),
                      " \"", argument, ".", i, "\" is not given.");
    tensors.push_back(found->second);
  }
  return tensors;
}

c10::IValue container(const c10::TypePtr& type, const Entries& entries,
                      const std::string& argument) {
  if (const auto dict_type = type->cast<c10::DictType>()) {
    c10::impl::GenericDict dict(dict_type->getKeyType(), dict_type->getValueType());
    for (const auto& [key, t] : entries) dict.insert(key, t);
    return dict;
  }
  auto tensors = in_order(entries, argument);
  if (const auto list_type = type->cast<c10::ListType>()) {
    c10::impl::GenericList list(list_type->getElementType());
    for (auto& t : tensors) list.push_back(std::move(t));
    return list;
  }
  const auto size = type->expect<c10::TupleType>()->elements().size();
  TORCH_CHECK_VALUE(tensors.size() == size, "[TorchScriptUNet::forward] the file's tuple \"",
                    argument, "\" must have ", size, " tensors, \"", argument,
                    ".0\" and so on, got ", tensors.size(), ".");
  return c10::ivalue::Tuple::create({tensors.begin(), tensors.end()});
}

// How to give an argument that holds several tensors, in brackets.
std::string how_to_give(const c10::Argument& argument) {
  const auto type = given_type(argument);
  if (!holds_tensors(type)) return "";
  const char* key = type->kind() == c10::TypeKind::DictType ? ".key" : ".0";
  return c10::str(" (its entries as \"", argument.name(), key, "\")");
}

}  // namespace

ForwardCall::ForwardCall(const c10::FunctionSchema& forward, const char* caller,
                         const std::string& model)
    : arguments_(forward.arguments().begin() + 1, forward.arguments().end()) {
  const bool fits = arguments_.size() > kTimesteps && takes_tensor(arguments_[kX]) &&
                    takes_timesteps(arguments_[kTimesteps]);
  TORCH_CHECK_VALUE(fits, "[", caller, "] the forward of ", model,
                    " must take x and timesteps first, got (", list_arguments(), ").");
}

const c10::Argument& ForwardCall::timesteps() const {
  return arguments_[kTimesteps];
}

std::vector<std::string> ForwardCall::argument_names() const {
  std::vector<std::string> names;
  for (const auto& argument : arguments_) names.push_back(argument.name());
  return names;
}

std::string ForwardCall::list_arguments() const {
  std::string text;
  for (const auto& name : argument_names()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::size_t ForwardCall::index_of(const std::string& name) const {
  std::size_t i = 0;
  while (i < arguments_.size() && arguments_[i].name() != name) ++i;
  return i;
}

void ForwardCall::set(const std::string& name, const torch::Tensor& t,
                      std::vector<c10::IValue>& values) const {
  if (!t.defined()) return;
  const auto i = index_of(name);
  const bool fits =
      i > kTimesteps && i < arguments_.size() && takes_tensor(arguments_[i]) && values[i].isNone();
  TORCH_CHECK_VALUE(fits,
                    "[TorchScriptUNet::forward] an input must be a tensor argument of the file, "
                    "whose arguments are (",
                    list_arguments(), "), got \"", name, "\".");
  values[i] = t;
}

void ForwardCall::set_extra(const std::map<std::string, torch::Tensor>& extra,
                            std::vector<c10::IValue>& values) const {
  std::map<std::size_t, Entries> containers;
  for (const auto& [name, t] : extra) {
    const auto dot = name.find('.');
    const auto i = index_of(name.substr(0, dot));
    const bool is_entry = dot != std::string::npos && i < arguments_.size() &&
                          holds_tensors(given_type(arguments_[i]));
    if (is_entry && t.defined())
      containers[i][name.substr(dot + 1)] = t;
    else
      set(name, t, values);
  }
  for (const auto& [i, entries] : containers)
    values[i] = container(given_type(arguments_[i]), entries, arguments_[i].name());
}

// The third argument if it must be given, else one with a usual name, else the third under any
// name. Arguments that are given in another way do not count.
std::string ForwardCall::context_name(const UNetInput& input) const {
  const auto may_be = [&](std::size_t i) {
    return i > kTimesteps && i < arguments_.size() && takes_tensor(arguments_[i]) &&
           arguments_[i].name() != "y" && !input.extra.contains(arguments_[i].name());
  };
  const auto must_be_given = [&](const c10::Argument& argument) {
    return !argument.default_value() && !may_be_none(argument);
  };
  if (may_be(kContext) && must_be_given(arguments_[kContext])) return arguments_[kContext].name();
  for (const char* name : {"context", "encoder_hidden_states"})
    if (may_be(index_of(name))) return name;
  return may_be(kContext) ? arguments_[kContext].name() : "context";
}

std::vector<c10::IValue> ForwardCall::arguments(const UNetInput& input,
                                                const TimestepForm& form) const {
  std::vector<c10::IValue> values(arguments_.size());
  values[kX] = input.x;
  values[kTimesteps] = timesteps_as(form, input.timesteps, "TorchScriptUNet::forward");
  set(context_name(input), input.context, values);
  set("y", input.y, values);
  set_extra(input.extra, values);

  for (std::size_t i = 0; i < arguments_.size(); ++i) {
    if (!values[i].isNone()) continue;
    if (const auto& value = arguments_[i].default_value()) {
      values[i] = *value;
      continue;
    }
    TORCH_CHECK_VALUE(may_be_none(arguments_[i]),
                      "[TorchScriptUNet::forward] the file's argument \"", arguments_[i].name(),
                      "\" must be given", how_to_give(arguments_[i]),
                      ", got nothing; its arguments are (", list_arguments(), ").");
  }
  return values;
}

}  // namespace sag

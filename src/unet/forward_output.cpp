#include "forward_output.h"

#include <ATen/core/Dict.h>
#include <ATen/core/jit_type.h>

namespace sag {
namespace {

template <typename Elements>
torch::Tensor first_tensor(const Elements& elements) {
  for (const c10::IValue& element : elements)
    if (auto t = output_tensor(element); t.defined()) return t;
  return {};
}

torch::Tensor sample_of(const c10::Dict<c10::IValue, c10::IValue>& dict) {
  if (dict.size() == 1) return output_tensor(dict.begin()->value());
  if (*dict.keyType() != *c10::StringType::get()) return {};
  for (const char* name : {"sample", "out"})
    if (dict.contains(name)) return output_tensor(dict.at(name));
  return {};
}

}  // namespace

torch::Tensor output_tensor(const c10::IValue& output) {
  if (output.isTensor()) return output.toTensor();
  if (output.isTuple()) return first_tensor(output.toTupleRef().elements());
  if (output.isList()) return first_tensor(output.toListRef());
  if (output.isGenericDict()) return sample_of(output.toGenericDict());
  return {};
}

}  // namespace sag

#include "timestep_form.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include "ops.h"

namespace sag {
namespace {

using torch::jit::Node;
using torch::jit::Value;

bool takes_tensor(const c10::Argument& argument) {
  return c10::TensorType::get()->isSubtypeOf(*argument.type());
}

bool takes(const c10::Argument& argument, const c10::TypePtr& type) {
  return type->isSubtypeOf(*argument.type());
}

// Ops whose first input and output hold the same values, in another shape or place.
bool keeps_values(const Node* node) {
  namespace aten = c10::aten;
  static const Ops shapes = {aten::unsqueeze, aten::squeeze, aten::reshape, aten::view,
                             aten::expand, aten::expand_as, aten::flatten, aten::unflatten,
                             aten::repeat, aten::select, aten::slice, aten::repeat_interleave,
                             // Of an argument that may be None.
                             c10::prim::unchecked_cast, c10::prim::unchecked_unwrap_optional};
  return shapes.contains(node->kind()) || kCasts.contains(node->kind());
}

bool casts_to_whole_numbers(const Node* node) {
  if (node->kind() != c10::aten::to) return false;
  const auto* schema = node->maybeSchema();
  const auto input = schema ? schema->argumentIndexWithName("dtype") : std::nullopt;
  if (!input) return false;
  const auto dtype = torch::jit::toIValue(node->input(static_cast<std::size_t>(*input)));
  return dtype && dtype->isInt() &&
         at::isIntegralType(static_cast<at::ScalarType>(dtype->toInt()), /*includeBool=*/false);
}

// Whether input `offset` of the node picks from a table.
bool is_index(const Node* node, std::size_t offset) {
  using namespace c10::aten;
  if (node->kind() == embedding) return offset == 1;
  if (node->kind() == index_select || node->kind() == gather) return offset == 2;
  if (node->kind() == one_hot) return offset == 0;
  return node->kind() == take && offset == 1;
}

bool is_list_of_indices(const Node* node) {
  if (node->kind() != c10::prim::ListConstruct) return false;
  for (const auto& use : node->output()->uses())
    if (use.user->kind() == c10::aten::index && use.offset == 1) return true;
  return false;
}

bool must_be_whole(Value* value) {
  for (const auto& use : value->uses()) {
    if (is_index(use.user, use.offset) || is_list_of_indices(use.user)) return true;
    if (use.offset != 0) continue;
    if (casts_to_whole_numbers(use.user)) return true;
    if (keeps_values(use.user) && must_be_whole(use.user->output())) return true;
  }
  return false;
}

// Whether the op looks at its input's shape, dtype or device only.
bool takes_shape_only(const Node* node, std::size_t offset) {
  namespace aten = c10::aten;
  static const Ops shapes = {aten::size,        aten::dim,        aten::len,
                             aten::zeros_like,  aten::ones_like,  aten::full_like,
                             aten::empty_like,  aten::rand_like,  aten::randn_like,
                             aten::new_zeros,   aten::new_ones,   aten::new_full,
                             aten::new_empty,   aten::stride,     aten::is_floating_point,
                             c10::prim::device, c10::prim::dtype, c10::prim::layout};
  if (shapes.contains(node->kind())) return offset == 0;
  // As what the first input becomes.
  static const Ops others = {aten::to, aten::type_as, aten::expand_as, aten::view_as,
                             aten::reshape_as};
  return others.contains(node->kind()) && offset == 1;
}

// One value for all rows, of no dimensions.
torch::Tensor only_timestep(const torch::Tensor& timesteps, const char* caller) {
  const auto first = timesteps.select(0, 0);
  if (timesteps.size(0) == 1) return first;
  const auto same = timesteps.eq(first).all();
  if (!timesteps.is_cpu())
    return at::where(same, first, std::numeric_limits<double>::quiet_NaN()).to(torch::kFloat);
  TORCH_CHECK_VALUE(same.item<bool>(), "[", caller,
                    "] timesteps must be equal for this file, which takes one for all rows, got ",
                    timesteps.min().item<double>(), " to ", timesteps.max().item<double>(), ".");
  return first;
}

}  // namespace

bool takes_timesteps(const c10::Argument& argument) {
  return takes_tensor(argument) || takes(argument, c10::IntType::get()) ||
         takes(argument, c10::FloatType::get());
}

TimestepForm find_timestep_form(const c10::Argument& argument, Value* value,
                                const torch::Tensor& traced, std::int64_t traced_rows) {
  TimestepForm form;
  if (!takes_tensor(argument)) {
    const bool fractions = takes(argument, c10::FloatType::get());
    form.kind = fractions ? TimestepForm::Kind::number : TimestepForm::Kind::whole_number;
    return form;
  }
  form.indices = must_be_whole(value);
  const bool one = traced.defined() && traced.dim() <= 1 && traced.numel() == 1;
  if (one && (traced.dim() == 0 || traced_rows > 1)) form.one_of_dims = traced.dim();
  return form;
}

bool is_computed_with(const Value* value) {
  return std::any_of(value->uses().begin(), value->uses().end(), [](const auto& use) {
    if (takes_shape_only(use.user, use.offset)) return false;
    return use.offset != 0 || !keeps_values(use.user) || is_computed_with(use.user->output());
  });
}

void check_can_be_rounded(const TimestepForm& form, const torch::Tensor& timesteps,
                          const char* caller) {
  if (!form.indices && form.kind != TimestepForm::Kind::whole_number) return;
  const auto size = timesteps.abs();
  const auto lost = timesteps.masked_select(size.gt(0).logical_and(size.lt(1)));
  TORCH_CHECK_VALUE(lost.numel() == 0, "[", caller,
                    "] timesteps must be whole numbers for this file, which uses them as indices, "
                    "got ",
                    lost.numel() == 0 ? 0.0 : lost[0].item<double>(),
                    ": choose the prediction, or the range of timesteps, that the model has.");
}

c10::IValue timesteps_as(const TimestepForm& form, const torch::Tensor& timesteps,
                         const char* caller) {
  using Kind = TimestepForm::Kind;
  if (form.kind != Kind::tensor) {
    const auto value = only_timestep(timesteps, caller).item<double>();
    if (form.kind == Kind::number) return value;
    return static_cast<std::int64_t>(std::llround(value));
  }
  auto given = timesteps;
  if (form.one_of_dims >= 0) given = only_timestep(timesteps, caller);
  if (form.one_of_dims == 1) given = given.unsqueeze(0);
  return form.indices ? given.round().to(torch::kLong) : given;
}

}  // namespace sag

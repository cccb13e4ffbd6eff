#include "module_conversion.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <vector>

#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/module.h>

namespace sag {
namespace {

// A convolution may take other channels than the file's.
bool fits_shape(torch::IntArrayRef given, torch::IntArrayRef wanted) {
  if (given.size() != wanted.size()) return false;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const bool is_free = i == 1 && wanted.size() == 4;
    if (given[i] != wanted[i] && !is_free) return false;
  }
  return true;
}

// Kernels round differently where memory begins at odd places, as it does in a mapped file, and the
// same weights must give the same picture from any file.
torch::Tensor aligned(const torch::Tensor& values) {
  constexpr std::uintptr_t kAlignment = 64;
  const auto address = reinterpret_cast<std::uintptr_t>(values.const_data_ptr());
  return values.is_cpu() && address % kAlignment != 0 ? values.clone() : values;
}

// A sum passes over the values once and copies nothing, where `isfinite` writes several tensors of
// their size. If the sum is finite, so is every value.
torch::Tensor all_finite(const torch::Tensor& values) {
  if (values.is_cpu() && std::isfinite(values.sum().item<double>()))
    return at::ones({}, torch::kBool);
  return values.isfinite().all();
}

}  // namespace

void check_finite(const std::vector<std::string>& names, const std::vector<torch::Tensor>& finite,
                  const std::string& dtype, const char* caller) {
  if (finite.empty()) return;
  const auto wrong = at::stack(finite).logical_not().cpu().nonzero();
  if (wrong.size(0) == 0) return;
  TORCH_CHECK_VALUE(false, "[", caller, "] weights must be finite in ", dtype,
                    ", got NaN or infinity in ", wrong.size(0), " of ", names.size(),
                    ", first in \"", names[wrong[0].item<std::int64_t>()], "\".");
}

void convert_module(torch::jit::Module& module, torch::Device device,
                    std::optional<torch::ScalarType> dtype) {
  torch::NoGradGuard no_grad;
  c10::InferenceMode ordinary_tensors(false);
  for (torch::Tensor t : module.parameters())
    t.set_data(t.to(device, dtype && t.is_floating_point() ? *dtype : t.scalar_type()));
  for (torch::Tensor t : module.buffers()) {
    const bool wider = dtype && t.is_floating_point() &&
                       c10::elementSize(*dtype) > c10::elementSize(t.scalar_type());
    t.set_data(t.to(device, wider ? *dtype : t.scalar_type()));
  }
}

void fill_parameters(torch::jit::Module& module, const WeightSource& weights, torch::Device device,
                     torch::ScalarType dtype, const char* caller) {
  torch::NoGradGuard no_grad;
  c10::InferenceMode ordinary_tensors(false);
  std::vector<std::string> names;
  std::vector<torch::Tensor> finite;
  for (const auto& [name, parameter] : module.named_parameters()) {
    const auto value = weights(name);
    const bool fits = value.defined() && value.is_floating_point() &&
                      fits_shape(value.sizes(), parameter.sizes());
    TORCH_CHECK_VALUE(fits, "[", caller, "] weights must return a floating tensor of shape ",
                      parameter.sizes(), " for \"", name, "\", got ",
                      value.defined() ? c10::str(value.sizes(), " of ", value.scalar_type())
                                      : std::string("nothing"),
                      ".");
    parameter.set_data(aligned(value.detach().to(device, dtype)));
    names.push_back(name);
    finite.push_back(all_finite(parameter));
  }
  check_finite(names, finite, c10::toString(dtype), caller);
}

void use_channels_last(torch::jit::Module& module) {
  torch::NoGradGuard no_grad;
  c10::InferenceMode ordinary_tensors(false);
  for (torch::Tensor t : module.parameters())
    if (t.dim() == 4) t.set_data(t.contiguous(at::MemoryFormat::ChannelsLast));
}

double convolution_share(const torch::jit::Module& module) {
  double convolutions = 0, all = 0;
  for (const torch::Tensor& t : module.parameters()) {
    const auto elements = static_cast<double>(t.numel());
    all += elements;
    if (t.dim() == 4) convolutions += elements;
  }
  return all > 0 ? convolutions / all : 0.0;
}

std::optional<torch::ScalarType> parameters_dtype(const torch::jit::Module& module) {
  std::map<torch::ScalarType, std::int64_t> elements;
  for (const torch::Tensor& t : module.parameters())
    if (t.is_floating_point()) elements[t.scalar_type()] += t.numel();
  if (elements.empty()) return std::nullopt;
  return std::max_element(elements.begin(), elements.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

}  // namespace sag

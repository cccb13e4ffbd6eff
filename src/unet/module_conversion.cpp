#include "module_conversion.h"

#include <algorithm>
#include <map>

#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/module.h>

namespace sag {

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

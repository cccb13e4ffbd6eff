#include "sag/picture_network.h"

#include <utility>
#include <vector>

#include <ATen/ops/cat.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include "unet/archive.h"
#include "unet/module_conversion.h"
#include "unet/numbered_device.h"
#include "unet/plain_message.h"

namespace sag {

using torch::jit::Module;

struct PictureNetwork::State {
  Module module;
  std::string name;
  torch::Device device;
  torch::ScalarType dtype = torch::kFloat;

  torch::Tensor run(const torch::Tensor& input) const;
};

torch::Tensor PictureNetwork::State::run(const torch::Tensor& input) const {
  c10::IValue result;
  try {
    // Optimising the graph takes longer than a few pictures gain by it.
    const torch::jit::GraphOptimizerEnabledGuard as_it_is(false);
    // A copy shares everything, and only its own `forward` may be called.
    result = Module(module).forward({input});
  } catch (const std::exception& error) {
    throw_failure(error,
                  c10::str("[PictureNetwork::run] ", name, " failed: ", plain_message(error)));
  }
  const bool fits = result.isTensor() && result.toTensor().dim() == 4 &&
                    result.toTensor().size(0) == 1 && result.toTensor().is_floating_point();
  TORCH_CHECK(fits, "[PictureNetwork::run] ", name,
              " must return a tensor [images, channels, height, width].");
  return result.toTensor().to(torch::kCPU, torch::kFloat);
}

PictureNetwork::PictureNetwork(std::shared_ptr<const State> state) : state_(std::move(state)) {}

PictureNetwork PictureNetwork::load(const std::string& path, torch::Device device) {
  return from_module(read_archive(path, "PictureNetwork::load"), "the network \"" + path + "\"",
                     device);
}

PictureNetwork PictureNetwork::from_module(const Module& module, const std::string& name,
                                           torch::Device device) {
  auto state =
      std::make_shared<State>(State{module, name, numbered_device(device, "PictureNetwork::load")});
  if (!device.is_cpu()) state->dtype = parameters_dtype(module).value_or(torch::kFloat);
  convert_module(state->module, state->device, state->dtype);
  return PictureNetwork(std::move(state));
}

torch::Tensor PictureNetwork::run(const torch::Tensor& inputs) const {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> results;
  for (const auto& input : inputs.to(state_->device, state_->dtype).split(1))
    results.push_back(state_->run(input));
  return torch::cat(results);
}

}  // namespace sag

#include "networks.h"

#include <vector>

#include <fmt/format.h>
#include <torch/script.h>

#include "errors.h"

namespace sag_sample {
namespace {

std::unique_ptr<torch::jit::Module> load(const std::string& path, const char* what) {
  try {
    auto module = std::make_unique<torch::jit::Module>(torch::jit::load(path, torch::kCPU));
    module->eval();
    return module;
  } catch (const std::exception&) {
    throw UsageError(
        fmt::format("The {} \"{}\" is no TorchScript archive that can be read.", what, path));
  }
}

// The interpreter's errors hold a traceback; what went wrong is in the last line that says
// something.
std::string last_line(const std::exception& error) {
  std::string text = error.what();
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.substr(text.rfind('\n') + 1);
}

}  // namespace

TextEncoder::TextEncoder(const std::string& path)
    : path_(path), module_(load(path, "text encoder")) {
  if (!module_->find_method("encode")) {
    throw UsageError(fmt::format("The text encoder \"{}\" has no method encode(str).", path));
  }
  module_->to(torch::kFloat);
}

TextEncoder::~TextEncoder() = default;

torch::Tensor TextEncoder::encode(const std::string& text) const {
  const torch::NoGradGuard no_grad;
  c10::IValue context;
  try {
    context = module_->get_method("encode")({text});
  } catch (const std::exception& error) {
    throw RunError(fmt::format("The text encoder \"{}\" failed: {}", path_, last_line(error)));
  }
  if (!context.isTensor() || context.toTensor().dim() != 3 || context.toTensor().size(0) != 1 ||
      !context.toTensor().is_floating_point()) {
    throw RunError(
        fmt::format("The text encoder \"{}\" must return a tensor [1, tokens, width].", path_));
  }
  return context.toTensor().to(torch::kFloat);
}

Decoder::Decoder(const std::string& path, torch::Device device, torch::ScalarType dtype)
    : path_(path), device_(device), dtype_(dtype), module_(load(path, "decoder")) {
  module_->to(device, dtype);
}

Decoder::~Decoder() = default;
Decoder::Decoder(Decoder&&) noexcept = default;

torch::Tensor Decoder::decode(const torch::Tensor& latents) const {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> pictures;
  for (const auto& latent : latents.to(device_, dtype_).split(1)) {
    c10::IValue picture;
    try {
      picture = module_->forward({latent});
    } catch (const std::exception& error) {
      throw RunError(fmt::format("The decoder \"{}\" failed: {}", path_, last_line(error)));
    }
    if (!picture.isTensor() || picture.toTensor().dim() != 4 || picture.toTensor().size(0) != 1) {
      throw RunError(fmt::format(
          "The decoder \"{}\" must return a tensor [images, 3, height, width].", path_));
    }
    pictures.push_back(picture.toTensor().to(torch::kCPU, torch::kFloat));
  }
  return torch::cat(pictures);
}

}  // namespace sag_sample

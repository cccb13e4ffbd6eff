#include "files/networks.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
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
        fmt::format("The {} \"{}\" is not a TorchScript archive that can be read.", what, path));
  }
}

// The interpreter's errors hold a traceback; what went wrong is in the last line that says
// something.
std::string last_line(const std::exception& error) {
  std::string text = error.what();
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.substr(text.rfind('\n') + 1);
}

// Not Module::to, which makes floating point numbers of indices too.
void convert(torch::jit::Module& module, torch::ScalarType dtype) {
  const auto convert_one = [dtype](const torch::Tensor& tensor) {
    if (tensor.is_floating_point()) tensor.set_data(tensor.to(dtype));
  };
  for (const auto& parameter : module.parameters()) convert_one(parameter);
  for (const auto& buffer : module.buffers()) convert_one(buffer);
}

torch::ScalarType dtype_of(const torch::jit::Module& module) {
  for (const auto& parameter : module.parameters()) {
    if (parameter.is_floating_point()) return parameter.scalar_type();
  }
  return torch::kFloat;
}

// The module itself counts.
std::size_t count_arguments(const torch::jit::Module& module, const char* method) {
  const auto found = module.find_method(method);
  return found ? found->function().getSchema().arguments().size() : 0;
}

bool is_floating(const c10::IValue& value, std::int64_t dims) {
  return value.isTensor() && value.toTensor().dim() == dims && value.toTensor().size(0) == 1 &&
         value.toTensor().is_floating_point();
}

}  // namespace

TextEncoder::TextEncoder(const std::string& path)
    : path_(path), module_(load(path, "text encoder")) {
  const auto arguments = count_arguments(*module_, "encode");
  if (arguments != 2 && arguments != 4) {
    throw UsageError(fmt::format(
        "The text encoder \"{}\" has no method encode(str) or encode(str, int, int).", path));
  }
  takes_size_ = arguments == 4;
  takes_pieces_ = count_arguments(*module_, "encode_pieces") == arguments + 2 &&
                  module_->find_method("cut_pieces") && module_->find_method("clip_skip_range");
  convert(*module_, torch::kFloat);
}

TextEncoder::~TextEncoder() = default;

c10::IValue TextEncoder::call(const char* method, std::vector<c10::IValue> arguments) const {
  const torch::NoGradGuard no_grad;
  try {
    return module_->get_method(method)(std::move(arguments));
  } catch (const std::exception& error) {
    throw RunError(fmt::format("The text encoder \"{}\" failed: {}", path_, last_line(error)));
  }
}

void TextEncoder::check_gives(const std::vector<PromptPiece>& prompt,
                              std::optional<std::int64_t> clip_skip) const {
  constexpr const char* kAgain =
      "; sag-export writes text encoders that do, so export the model again";
  if (!takes_pieces_) {
    const auto weighted = std::find_if(prompt.begin(), prompt.end(),
                                       [](const auto& piece) { return piece.weight != 1.0; });
    if (weighted != prompt.end()) {
      throw UsageError(fmt::format(
          "The text encoder \"{}\" cannot weigh parts of a prompt, as the parentheses around "
          "\"{}\" ask for{}, or write \\( and \\) for parentheses of the text.",
          path_, weighted->text, kAgain));
    }
    if (clip_skip) {
      throw UsageError(
          fmt::format("The text encoder \"{}\" gives no other layer, as --clip-skip asks for{}.",
                      path_, kAgain));
    }
  } else if (clip_skip) {
    const auto range = call("clip_skip_range", {}).toTuple();
    const auto low = range->elements()[0].toInt(), high = range->elements()[1].toInt();
    if (*clip_skip < low || *clip_skip > high) {
      throw UsageError(fmt::format("--clip-skip must be between {} and {} for this model, got {}.",
                                   low, high, *clip_skip));
    }
  }
}

EncodedText TextEncoder::checked(c10::IValue result) const {
  c10::IValue y;
  if (takes_size_ && result.isTuple() && result.toTupleRef().elements().size() == 2) {
    const auto both = result.toTuple();
    result = both->elements()[0];
    y = both->elements()[1];
  }
  if (!is_floating(result, 3) || (takes_size_ && !is_floating(y, 2))) {
    throw RunError(fmt::format("The text encoder \"{}\" must return a tensor [1, tokens, width]{}.",
                               path_, takes_size_ ? " and a tensor [1, features]" : ""));
  }
  EncodedText encoded = {.context = result.toTensor().to(torch::kCPU, torch::kFloat)};
  if (takes_size_) encoded.y = y.toTensor().to(torch::kCPU, torch::kFloat);
  return encoded;
}

EncodedText TextEncoder::encode(const std::vector<PromptPiece>& prompt,
                                std::optional<std::int64_t> clip_skip, std::int64_t height,
                                std::int64_t width) const {
  check_gives(prompt, clip_skip);
  std::vector<std::string> texts;
  std::vector<double> weights;
  for (const auto& piece : prompt) {
    texts.push_back(piece.text);
    weights.push_back(piece.weight);
  }
  const c10::IValue text =
      takes_pieces_ ? c10::IValue(texts) : fmt::format("{}", fmt::join(texts, ""));
  std::vector<c10::IValue> arguments = {text};
  if (takes_pieces_) arguments.insert(arguments.end(), {weights, clip_skip.value_or(0)});
  if (takes_size_) arguments.insert(arguments.end(), {height, width});
  auto encoded = checked(call(takes_pieces_ ? "encode_pieces" : "encode", std::move(arguments)));
  const char* cut = takes_pieces_ ? "cut_pieces" : "cut";
  if (module_->find_method(cut)) {
    const auto rest = call(cut, {text});
    if (!rest.isString()) {
      throw RunError(fmt::format("The text encoder \"{}\"'s {} must return a text.", path_, cut));
    }
    encoded.cut = rest.toStringRef();
  }
  return encoded;
}

PictureNetwork::PictureNetwork(const char* what, const std::string& path, torch::Device device)
    : what_(what), path_(path), device_(device), module_(load(path, what)) {
  if (!device.is_cpu()) dtype_ = dtype_of(*module_);
  convert(*module_, dtype_);
  module_->to(device);
}

PictureNetwork::~PictureNetwork() = default;
PictureNetwork::PictureNetwork(PictureNetwork&&) noexcept = default;

torch::Tensor PictureNetwork::run(const torch::Tensor& inputs) const {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> results;
  for (const auto& input : inputs.to(device_, dtype_).split(1)) {
    c10::IValue result;
    try {
      result = module_->forward({input});
    } catch (const std::exception& error) {
      throw RunError(fmt::format("The {} \"{}\" failed: {}", what_, path_, last_line(error)));
    }
    if (!is_floating(result, 4)) {
      throw RunError(fmt::format(
          "The {} \"{}\" must return a tensor [images, channels, height, width].", what_, path_));
    }
    results.push_back(result.toTensor().to(torch::kCPU, torch::kFloat));
  }
  return torch::cat(results);
}

}  // namespace sag_sample

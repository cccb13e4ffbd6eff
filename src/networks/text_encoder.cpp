#include "sag/text_encoder.h"

#include <algorithm>
#include <cstddef>

#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include "unet/archive.h"
#include "unet/module_conversion.h"
#include "unet/plain_message.h"

namespace sag {

using torch::jit::Module;

struct TextEncoder::State {
  State(Module loaded, std::string called);

  c10::IValue call(const char* method, std::vector<c10::IValue> arguments) const;
  void check_gives(const std::vector<PromptPiece>& prompt,
                   std::optional<std::int64_t> clip_skip) const;
  EncodedText checked(c10::IValue result) const;
  std::string cut(const c10::IValue& text) const;

  Module module;
  std::string name;
  bool takes_size = false, takes_pieces = false;
  // Of the layers.
  std::pair<std::int64_t, std::int64_t> range = {};
};

namespace {

// The module itself counts.
std::size_t count_arguments(const Module& module, const char* method) {
  const auto found = module.find_method(method);
  return found ? found->function().getSchema().arguments().size() : 0;
}

bool is_row(const c10::IValue& value, std::int64_t dims) {
  return value.isTensor() && value.toTensor().dim() == dims && value.toTensor().size(0) == 1 &&
         value.toTensor().is_floating_point();
}

}  // namespace

TextEncoder::State::State(Module loaded, std::string called)
    : module(std::move(loaded)), name(std::move(called)) {
  const auto arguments = count_arguments(module, "encode");
  TORCH_CHECK_VALUE(arguments == 2 || arguments == 4, "[TextEncoder::load] ", name,
                    " must have a method encode(str) or encode(str, int, int), got no such one.");
  takes_size = arguments == 4;
  takes_pieces = count_arguments(module, "encode_pieces") == arguments + 2 &&
                 module.find_method("cut_pieces") && module.find_method("clip_skip_range");
  convert_module(module, torch::kCPU, torch::kFloat);
  if (!takes_pieces) return;
  const auto layers = call("clip_skip_range", {}).toTuple();
  range = {layers->elements()[0].toInt(), layers->elements()[1].toInt()};
}

c10::IValue TextEncoder::State::call(const char* method, std::vector<c10::IValue> arguments) const {
  const torch::NoGradGuard no_grad;
  // Optimising the graph takes longer than a few texts gain by it: 2 s for SDXL's.
  const torch::jit::GraphOptimizerEnabledGuard as_it_is(false);
  try {
    return module.get_method(method)(std::move(arguments));
  } catch (const std::exception& error) {
    throw_failure(error,
                  c10::str("[TextEncoder::encode] ", name, " failed: ", plain_message(error)));
  }
}

void TextEncoder::State::check_gives(const std::vector<PromptPiece>& prompt,
                                     std::optional<std::int64_t> clip_skip) const {
  if (takes_pieces) {
    TORCH_CHECK_VALUE(!clip_skip || (*clip_skip >= range.first && *clip_skip <= range.second),
                      "[TextEncoder::encode] clip_skip must be between ", range.first, " and ",
                      range.second, " for ", name, ", got ", clip_skip.value_or(0), ".");
    return;
  }
  const bool weighted = std::any_of(prompt.begin(), prompt.end(),
                                    [](const auto& piece) { return piece.weight != 1.0; });
  TORCH_CHECK_VALUE(!weighted && !clip_skip, "[TextEncoder::encode] ", name,
                    " must have encode_pieces to weigh parts of a prompt and to give other layers, "
                    "got one without it.");
}

EncodedText TextEncoder::State::checked(c10::IValue result) const {
  c10::IValue y;
  if (takes_size && result.isTuple() && result.toTupleRef().elements().size() == 2) {
    const auto both = result.toTuple();
    result = both->elements()[0];
    y = both->elements()[1];
  }
  TORCH_CHECK(is_row(result, 3) && (!takes_size || is_row(y, 2)), "[TextEncoder::encode] ", name,
              " must return a tensor [1, tokens, width]",
              takes_size ? " and a tensor [1, features]" : "", ".");
  EncodedText encoded = {.context = result.toTensor().to(torch::kCPU, torch::kFloat)};
  if (takes_size) encoded.y = y.toTensor().to(torch::kCPU, torch::kFloat);
  return encoded;
}

std::string TextEncoder::State::cut(const c10::IValue& text) const {
  const char* method = takes_pieces ? "cut_pieces" : "cut";
  if (!module.find_method(method)) return {};
  const auto rest = call(method, {text});
  TORCH_CHECK(rest.isString(), "[TextEncoder::encode] ", name, "'s ", method,
              " must return a text.");
  return rest.toStringRef();
}

TextEncoder::TextEncoder(std::shared_ptr<const State> state) : state_(std::move(state)) {}

TextEncoder TextEncoder::load(const std::string& path) {
  return from_module(read_archive(path, "TextEncoder::load"), "the text encoder \"" + path + "\"");
}

TextEncoder TextEncoder::from_module(const Module& module, const std::string& name) {
  return TextEncoder(std::make_shared<const State>(module, name));
}

EncodedText TextEncoder::encode(const std::string& prompt, std::int64_t height, std::int64_t width,
                                std::optional<std::int64_t> clip_skip) const {
  return encode(std::vector<PromptPiece>{{.text = prompt}}, height, width, clip_skip);
}

EncodedText TextEncoder::encode(const std::vector<PromptPiece>& prompt, std::int64_t height,
                                std::int64_t width, std::optional<std::int64_t> clip_skip) const {
  state_->check_gives(prompt, clip_skip);
  std::vector<std::string> texts;
  std::vector<double> weights;
  for (const auto& piece : prompt) {
    texts.push_back(piece.text);
    weights.push_back(piece.weight);
  }
  c10::IValue text = texts;
  if (!state_->takes_pieces) {
    std::string joined;
    for (const auto& piece : texts) joined += piece;
    text = joined;
  }
  std::vector<c10::IValue> arguments = {text};
  if (state_->takes_pieces) arguments.insert(arguments.end(), {weights, clip_skip.value_or(0)});
  if (state_->takes_size) arguments.insert(arguments.end(), {height, width});
  const char* method = state_->takes_pieces ? "encode_pieces" : "encode";
  auto encoded = state_->checked(state_->call(method, std::move(arguments)));
  encoded.cut = state_->cut(text);
  return encoded;
}

std::optional<std::pair<std::int64_t, std::int64_t>> TextEncoder::clip_skip_range() const {
  if (!state_->takes_pieces) return std::nullopt;
  return state_->range;
}

}  // namespace sag

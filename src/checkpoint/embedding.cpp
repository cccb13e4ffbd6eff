#include "checkpoint/embedding.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/module.h>

#include "checkpoint/json_text.h"
#include "sag/safetensors.h"

namespace sag {
namespace {

using torch::jit::Module;
using Codes = std::vector<std::int64_t>;

constexpr const char* kFirst = "text_encoder";
constexpr const char* kSecond = "text_encoder_2";
// Of SDXL's second text encoder, OpenCLIP bigG; no first one has it.
constexpr std::int64_t kWidthOfSecond = 1280;

// Which text encoder a tensor is for.
std::string part_of(const std::string& name, const torch::Tensor& vectors, bool is_only_one) {
  if (name == "clip_l" || name == "text_encoders_0") return kFirst;
  if (name == "clip_g" || name == "text_encoders_1") return kSecond;
  if (!is_only_one) return "";
  return vectors.size(-1) == kWidthOfSecond ? kSecond : kFirst;
}

bool are_vectors(const torch::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool is_floating = dtype == torch::kHalf || dtype == torch::kBFloat16 ||
                           dtype == torch::kFloat || dtype == torch::kDouble;
  return is_floating && (tensor.dim() == 1 || tensor.dim() == 2) && tensor.numel() > 0 &&
         tensor.to(torch::kFloat).isfinite().all().item<bool>();
}

// A tokenizer and its text model, and the vectors that they get.
struct Place {
  Module tokenizer, token_embedding;
  torch::Tensor vectors;
};

[[noreturn]] void refuse(const TextEmbedding& embedding, const std::string& problem) {
  C10_THROW_ERROR(ValueError,
                  c10::str("[add_embedding] the textual inversion ", quoted_name(embedding.name),
                           " must fit the text encoder, ", problem, "."));
}

std::optional<Module> find_token_embedding(const Module& clip) {
  for (const auto& found : clip.named_modules())
    if (found.name.ends_with(".token_embedding")) return found.value;
  return std::nullopt;
}

Place place_of(const Module& encoder, const char* clip_name, const char* part,
               const TextEmbedding& embedding) {
  const auto clip = encoder.attr(clip_name, c10::IValue()).isModule()
                        ? std::optional(encoder.attr(clip_name).toModule())
                        : std::nullopt;
  const auto token_embedding = clip ? find_token_embedding(*clip) : std::nullopt;
  if (!token_embedding || !clip->hasattr("tokenizer") || !token_embedding->hasattr("weight"))
    refuse(embedding, "which is none that sag-export wrote");
  Place place = {.tokenizer = clip->attr("tokenizer").toModule(),
                 .token_embedding = *token_embedding};
  for (const char* list : {"added", "added_ids", "raw_added", "tokens"})
    if (!place.tokenizer.hasattr(list))
      refuse(embedding, "whose tokenizer is none that sag-export wrote");

  const auto found = embedding.vectors.find(part);
  if (found == embedding.vectors.end())
    refuse(embedding, c10::str("but has no vectors for its ", part,
                               "; SDXL needs some for both (clip_l and clip_g)"));
  place.vectors = found->second;
  const auto width = token_embedding->attr("weight").toTensor().size(1);
  if (place.vectors.size(1) != width)
    refuse(embedding, c10::str("but its vectors for ", part, " are ", place.vectors.size(1),
                               " wide, and the model's ", width));
  // The text begins and ends with a token of its own.
  const auto room = place.tokenizer.attr("tokens").toInt() - 2;
  if (place.vectors.size(0) > room)
    refuse(embedding, c10::str("but has ", place.vectors.size(0), " vectors for ", part,
                               ", and a prompt has room for ", room));
  return place;
}

Codes codes_of(const Module& tokenizer, const std::string& text) {
  return tokenizer.get_method("decoded")({text}).toIntVector();
}

// In lower case and composed, as texts are before words are looked for.
Codes normalized(const Module& tokenizer, const Codes& codes) {
  return tokenizer.get_method("normalized")({codes}).toIntVector();
}

// The name as it is looked for.
Codes checked_name(const Module& tokenizer, const TextEmbedding& embedding) {
  auto name = normalized(tokenizer, codes_of(tokenizer, embedding.name));
  if (name.empty()) refuse(embedding, "but its name is empty");
  const auto space = tokenizer.attr("SPACE", c10::IValue(0)).toInt();
  for (const auto code : name)
    if (tokenizer.get_method("class_at")({code}).toInt() == space)
      refuse(embedding, "but its name has a blank in it");
  for (const char* list : {"added", "raw_added"})
    for (const c10::IValue& token : tokenizer.attr(list).toListRef())
      if (normalized(tokenizer, token.toIntVector()) == name)
        refuse(embedding, "but its name is a token already, perhaps in upper case");
  return name;
}

void add(Place& place, const Codes& name) {
  const torch::NoGradGuard no_grad;
  const auto weight = place.token_embedding.attr("weight").toTensor();
  auto longer = at::cat({weight.detach(), place.vectors.to(weight.options())});
  longer.set_requires_grad(weight.requires_grad());
  place.token_embedding.setattr("weight", longer);

  Codes ids;
  for (auto id = weight.size(0); id < longer.size(0); ++id) ids.push_back(id);
  // The longest first, for that one wins.
  auto names = place.tokenizer.attr("added").to<std::vector<Codes>>();
  auto all_ids = place.tokenizer.attr("added_ids").to<std::vector<Codes>>();
  const auto shorter = std::find_if(names.begin(), names.end(),
                                    [&](const Codes& other) { return other.size() < name.size(); });
  all_ids.insert(all_ids.begin() + (shorter - names.begin()), ids);
  names.insert(shorter, name);
  place.tokenizer.setattr("added", names);
  place.tokenizer.setattr("added_ids", all_ids);
}

}  // namespace

TextEmbedding read_embedding(const std::string& name, const std::string& path) {
  const auto file = Safetensors::open(path);
  TextEmbedding embedding = {.name = name};
  const auto refuse_file = [&](const std::string& problem) {
    C10_THROW_ERROR(ValueError,
                    c10::str("[read_embedding] embedding must name a textual inversion, got \"",
                             path, "\", ", problem, "."));
  };
  if (file.tensors().empty()) refuse_file("which holds no tensors");
  for (const auto& [tensor_name, info] : file.tensors()) {
    const auto tensor = file.tensor(tensor_name);
    if (!are_vectors(tensor))
      refuse_file(c10::str("in which ", quoted_name(tensor_name),
                           " is not [width] or [vectors, width] of finite floating point numbers"));
    const auto part = part_of(tensor_name, tensor, file.tensors().size() == 1);
    if (part.empty())
      refuse_file(c10::str("which holds ", quoted_name(tensor_name), " among ",
                           file.tensors().size(),
                           " tensors: known are clip_l and clip_g, or one "
                           "tensor alone"));
    auto& vectors = embedding.vectors[part];
    if (vectors.defined()) refuse_file("which has vectors for a text encoder twice");
    vectors = tensor.to(torch::kFloat).reshape({-1, tensor.size(-1)});
  }
  return embedding;
}

void add_embedding(Module& encoder, const TextEmbedding& embedding) {
  std::vector<std::pair<const char*, const char*>> clips = {{"clip", kFirst}};
  if (encoder.hasattr("clip_2")) clips.emplace_back("clip_2", kSecond);
  if (clips.size() == 1 && embedding.vectors.contains(kSecond))
    refuse(embedding, "but has vectors for a second one, as SDXL's");
  std::vector<Place> places;
  std::vector<Codes> names;
  for (const auto& [clip, part] : clips) {
    places.push_back(place_of(encoder, clip, part, embedding));
    names.push_back(checked_name(places.back().tokenizer, embedding));
  }
  for (std::size_t i = 0; i < places.size(); ++i) add(places[i], names[i]);
}

}  // namespace sag

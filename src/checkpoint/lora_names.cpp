#include "checkpoint/lora_names.h"

#include <algorithm>
#include <array>
#include <utility>

namespace sag {
namespace {

constexpr std::array<std::pair<std::string_view, LoraRole>, 12> kSuffixes = {{
    // kohya's scripts, LyCORIS, ComfyUI
    {".lora_down.weight", LoraRole::down},
    {".lora_up.weight", LoraRole::up},
    {".lora_mid.weight", LoraRole::mid},
    {".alpha", LoraRole::alpha},
    // diffusers: attention processors, layers, text encoders
    {"_lora.down.weight", LoraRole::down},
    {"_lora.up.weight", LoraRole::up},
    {".lora.down.weight", LoraRole::down},
    {".lora.up.weight", LoraRole::up},
    {".lora_linear_layer.down.weight", LoraRole::down},
    {".lora_linear_layer.up.weight", LoraRole::up},
    // PEFT
    {".lora_A.weight", LoraRole::down},
    {".lora_B.weight", LoraRole::up},
}};

// PEFT's with the adapter's name in it: ".lora_A.default.weight".
std::optional<LoraName> split_adapter_name(std::string_view name) {
  constexpr std::string_view kEnd = ".weight";
  if (!name.ends_with(kEnd)) return std::nullopt;
  const auto rest = name.substr(0, name.size() - kEnd.size());
  const auto adapter = rest.rfind('.');
  if (adapter == std::string_view::npos || adapter + 1 == rest.size()) return std::nullopt;
  const auto module = rest.substr(0, adapter);
  for (const auto& [half, role] :
       {std::pair(std::string_view(".lora_A"), LoraRole::down), {".lora_B", LoraRole::up}})
    if (module.ends_with(half))
      return LoraName{std::string(module.substr(0, module.size() - half.size())), role};
  return std::nullopt;
}

std::string with_underscores(std::string text) {
  std::replace(text.begin(), text.end(), '.', '_');
  return text;
}

std::string replaced(const std::string& text, std::string_view from, std::string_view to) {
  const auto place = text.rfind(from);
  if (place == std::string::npos) return text;
  return text.substr(0, place) + std::string(to) + text.substr(place + from.size());
}

// The path as older versions of diffusers wrote it; the path itself where they wrote the same.
std::string older_path(const LoraTarget& target) {
  const auto& path = target.path;
  if (target.part == "unet") {
    if (path.find(".attn") == std::string::npos) return path;
    const auto older = replaced(path, ".to_", ".processor.to_");
    return older.ends_with(".to_out.0") ? older.substr(0, older.size() - 2) : older;
  }
  auto older = replaced(path, ".self_attn.out_proj", ".self_attn.to_out");
  for (const char* letter : {"q", "k", "v"})
    older = replaced(older, std::string(".self_attn.") + letter + "_proj",
                     std::string(".self_attn.to_") + letter);
  return older;
}

}  // namespace

std::optional<LoraName> split_lora_name(const std::string& name) {
  for (const auto& [suffix, role] : kSuffixes)
    if (name.size() > suffix.size() && name.ends_with(suffix))
      return LoraName{name.substr(0, name.size() - suffix.size()), role};
  return split_adapter_name(name);
}

const char* other_kind_of(std::string_view name) {
  using Mark = std::pair<std::string_view, const char*>;
  constexpr std::array<Mark, 8> kAnywhere = {{
      {".hada_", "LoHa"},
      {".lokr_", "LoKr"},
      {".dora_scale", "DoRA"},
      {".lora_magnitude_vector", "DoRA"},
      {".oft_", "OFT"},
      {".boft_", "BOFT"},
      {".lora_embedding_", "a LoRA of the token embedding"},
      {"bundle_emb.", "textual inversions bundled with a LoRA"},
  }};
  constexpr std::array<Mark, 14> kAtTheEnd = {{
      {".on_input", "IA3"},
      {".a1.weight", "GLoRA"},
      {".a2.weight", "GLoRA"},
      {".b1.weight", "GLoRA"},
      {".b2.weight", "GLoRA"},
      {".diff", "differences of whole weights"},
      {".diff_b", "differences of biases"},
      {".set_weight", "whole weights"},
      {".w_norm", "differences of norms"},
      {".b_norm", "differences of norms"},
      {".reshape_weight", "weights of another size"},
      {".scalar", "LyCORIS' scalar"},
      {".lora_up.bias", "biases"},
      {".lora_B.bias", "biases"},
  }};
  for (const auto& [mark, kind] : kAnywhere)
    if (name.find(mark) != std::string_view::npos) return kind;
  for (const auto& [mark, kind] : kAtTheEnd)
    if (name.ends_with(mark)) return kind;
  return nullptr;
}

// kohya's names have underscores for dots, which cannot be undone. So all names are made from the
// targets, and none is taken apart into a path.
std::vector<std::string> lora_names_of(const LoraTarget& target) {
  const auto& [part, path, key] = target;
  const bool is_unet = part == "unet";
  std::vector<std::string> names;
  const auto kohya = with_underscores(path);
  if (is_unet)
    names = {"lora_unet_" + kohya, "lycoris_" + kohya};
  else if (part == "text_encoder")
    names = {"lora_te_" + kohya, "lora_te1_" + kohya};
  else
    names = {"lora_te2_" + kohya};

  std::vector<std::string> paths = {path};
  if (const auto older = older_path(target); older != path) paths.push_back(older);
  const std::string peft = "base_model.model.", in_part = part + ".";
  for (const auto& before : {std::string(), peft, in_part, in_part + peft})
    for (const auto& spelled : paths) names.push_back(before + spelled);

  if (!key.empty()) names.push_back(key);
  constexpr std::string_view kUNet = "model.diffusion_model.";
  if (is_unet && key.starts_with(kUNet)) {
    const auto ldm = key.substr(kUNet.size());
    names.push_back("lora_unet_" + with_underscores(ldm));
    names.push_back("diffusion_model." + ldm);
  }
  // ComfyUI's own for text encoders, by what it calls them.
  if (part == "text_encoder")
    for (const char* clip : {"clip_l", "clip_h"})
      names.push_back(std::string("text_encoders.") + clip + ".transformer." + path);
  if (part == "text_encoder_2") names.push_back("text_encoders.clip_g.transformer." + path);
  return names;
}

std::string_view part_in_front(std::string_view module) {
  for (const std::string_view part : {"unet", "text_encoder", "text_encoder_2"})
    if (module.starts_with(part) && module.substr(part.size()).starts_with('.')) return part;
  return {};
}

}  // namespace sag

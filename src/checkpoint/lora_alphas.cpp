#include "checkpoint/lora_alphas.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <utility>

#include <c10/util/Exception.h>

#include "checkpoint/json_text.h"
#include "checkpoint/lora_names.h"

namespace sag {
namespace {

using nlohmann::json;

constexpr std::string_view kPeft = "base_model.model.";

json object_in(const std::string& text, const std::string& path, const char* what) {
  auto read = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!read.is_object())
    refuse_lora(path, c10::str("whose ", what, " is not a JSON object that can be read"));
  return read;
}

// What follows the part's name in diffusers' notes, or everything in PEFT's.
std::string_view without(std::string_view text, std::string_view prefix) {
  return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
}

double alpha_in(const json& value, const std::string& name, const std::string& path) {
  if (!value.is_number() || !std::isfinite(value.get<double>()))
    refuse_lora(path, c10::str("whose ", quoted_name(name), " is not a finite number"));
  return value.get<double>();
}

// A pattern of PEFT's is a regular expression; those that diffusers and PEFT write by themselves
// are ends of paths.
bool is_plain(const std::string& pattern) {
  return !pattern.empty() && std::all_of(pattern.begin(), pattern.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '_' || c == '.';
  });
}

bool fits(std::string_view path, std::string_view end) {
  return path == end || (path.size() > end.size() && path.ends_with(end) &&
                         path[path.size() - end.size() - 1] == '.');
}

// The text of adapter_config.json beside the file.
std::string peft_config(const std::string& path) {
  const auto beside = std::filesystem::path(path).parent_path() / "adapter_config.json";
  std::ifstream stream(beside, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(stream), {});
  if (text.empty())
    refuse_lora(path,
                "which PEFT wrote (base_model.model. stands before its names), so its alpha is in "
                "adapter_config.json, which must lie beside it");
  return text;
}

}  // namespace

void refuse_lora(const std::string& path, const std::string& problem) {
  C10_THROW_ERROR(ValueError,
                  c10::str("[Lora::open] lora must name a LoRA that can be merged, got \"", path,
                           "\", ", problem, "."));
}

LoraAlphas::LoraAlphas(const Safetensors& file, const std::vector<std::string>& modules,
                       const std::string& path)
    : path_(path) {
  constexpr const char* kNotes = "lora_adapter_metadata";
  json config;
  const auto notes = file.metadata().find(kNotes);
  if (notes != file.metadata().end())
    config = object_in(notes->second, path, kNotes);
  else if (std::any_of(modules.begin(), modules.end(),
                       [](const auto& module) { return module.find(kPeft) != module.npos; }))
    config = object_in(peft_config(path), path, "adapter_config.json");

  for (const auto& [key, value] : config.items()) {
    const std::string part(part_in_front(key));
    const auto name = without(without(key, part), ".");
    auto& settings = settings_[part];
    if (name == "lora_alpha") settings.alpha = alpha_in(value, key, path);
    if (name == "use_rslora") settings.by_root_of_rank = value == true;
    if (name == "fan_in_fan_out" && value == true)
      refuse_lora(path, "whose matrices are transposed (\"fan_in_fan_out\"), which is not read");
    if (name != "alpha_pattern" || value.is_null()) continue;
    if (!value.is_object()) refuse_lora(path, "whose \"alpha_pattern\" is not a JSON object");
    for (const auto& [pattern, alpha] : value.items()) {
      if (!is_plain(pattern))
        refuse_lora(path, c10::str("whose \"alpha_pattern\" holds the regular expression ",
                                   quoted_name(pattern), ", which is not read"));
      settings.of_paths[pattern] = alpha_in(alpha, pattern, path);
    }
  }
  std::erase_if(settings_, [&](const auto& entry) {
    const auto& [part, settings] = entry;
    if (config.contains(part.empty() ? "lora_alpha" : part + ".lora_alpha")) return false;
    if (settings.by_root_of_rank || !settings.of_paths.empty())
      refuse_lora(path, "whose settings lack \"lora_alpha\"");
    // They are about something else.
    return true;
  });
}

double LoraAlphas::scale(const std::string& module, std::int64_t rank) const {
  const auto part = part_in_front(module);
  const auto found = settings_.find(part);
  if (found == settings_.end()) return 1;
  const auto& settings = found->second;
  const auto bare = without(without(without(module, part), "."), kPeft);
  std::optional<double> own;
  for (const auto& [end, alpha] : settings.of_paths) {
    if (!fits(bare, end)) continue;
    if (own && *own != alpha)
      refuse_lora(path_, c10::str("in whose \"alpha_pattern\" several fit ", quoted_name(module)));
    own = alpha;
  }
  const auto divisor = static_cast<double>(rank);
  return own.value_or(settings.alpha) / (settings.by_root_of_rank ? std::sqrt(divisor) : divisor);
}

}  // namespace sag

#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/lora.h"

namespace sag {

/// What a tensor of a LoRA is to the weight it changes.
enum class LoraRole { down, up, mid, alpha };

/// A tensor's name, taken apart.
struct LoraName {
  /// What the file calls the weight.
  std::string module;
  LoraRole role;
};

/// Takes a name apart; nothing when it is not one of a LoRA.
std::optional<LoraName> split_lora_name(const std::string& name);

/// Returns which other kind than LoRA has tensors of this name; null if none that is known.
const char* other_kind_of(std::string_view name);

/// Returns all that files may call a target.
std::vector<std::string> lora_names_of(const LoraTarget& target);

/// The part of the model that a name says it belongs to: "unet", "text_encoder" or
/// "text_encoder_2" before a dot. Empty when it says none.
std::string_view part_in_front(std::string_view module);

}  // namespace sag

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "sag/safetensors.h"

namespace sag {

/// The alphas that a LoRA keeps elsewhere than in its tensors: diffusers in the file's header
/// ("lora_adapter_metadata"), PEFT in adapter_config.json beside the file.
class LoraAlphas {
 public:
  /// Reads them. PEFT's are needed when one of the `modules` has PEFT's name ("base_model.model.").
  /// Throws ValueError when they are damaged, missing, or say what cannot be followed.
  LoraAlphas(const Safetensors& file, const std::vector<std::string>& modules,
             const std::string& path);

  /// Returns what a product of this rank is multiplied by, for a module without an alpha of its
  /// own: 1 when nobody says anything else. Throws ValueError when several patterns fit the module.
  double scale(const std::string& module, std::int64_t rank) const;

 private:
  struct Settings {
    double alpha = 0;
    bool by_root_of_rank = false;
    /// The end of a module's path → its alpha.
    std::map<std::string, double> of_paths = {};
  };

  std::string path_;
  /// By the part of the model; "" for modules whose name does not say it.
  std::map<std::string, Settings, std::less<>> settings_;
};

/// Ends the reading of a LoRA: throws ValueError "[Lora::open] path must name a LoRA that can be
/// merged, got "path", which …". `problem` is the end of that sentence.
[[noreturn]] void refuse_lora(const std::string& path, const std::string& problem);

}  // namespace sag

#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "option.h"
#include "sag/model_patcher.h"

namespace sag_sample {

/// A guidance of a run, with its options decided.
struct Guidance {
  /// Its entry in the report, "sag".
  std::string key = {};
  /// Its name in the library's reports, "self_attention_guidance".
  std::string name = {};
  /// What it is called in a sentence, "self-attention guidance", and on a sheet, "SAG".
  std::string title = {}, label = {};
  /// What a sheet says of it, "SAG scale 1, blur 2".
  std::string summary = {};
  /// The header of its masks on a sheet; empty: it has none.
  std::string mask_header = {};
  /// What was decided, for the report.
  std::vector<std::pair<std::string, Value>> options = {};
  /// Returns a clone of the model that it guides.
  std::function<sag::ModelPatcher(const sag::ModelPatcher&)> apply = {};
};

/// A guidance that the command knows.
struct GuidanceKind {
  /// Its entry in model.json's "defaults", "sag".
  const char* key;
  /// The option that turns it off, "--no-sag".
  const char* off;
  const OptionGroup* options;
  /// Throws UsageError when its options do not go together.
  void (*check)(const Choices& choices);
  /// Returns the guidance, watching the self-attention `site`.
  Guidance (*decide)(const Choices& choices, const std::string& site);
};

/// Returns all guidances that the command knows. To add one: describe it in guidances.cpp, and name
/// it in the list there.
std::span<const GuidanceKind> guidance_kinds();

/// Returns the guidances that are not turned off, in the order in which they are applied.
std::vector<Guidance> decide_guidances(const Choices& choices, const std::string& site);

}  // namespace sag_sample

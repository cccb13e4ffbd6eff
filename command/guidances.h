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
  /// Whether it does nothing without an unconditional prediction.
  bool needs_uncond = false;
  /// The self-attentions that it looks into, and the transformer blocks.
  std::vector<std::string> sites = {}, blocks = {};
  /// Whether it looks into all cross-attentions.
  bool needs_cross_attention = false;
  /// The header of its masks on a sheet; empty: it has none.
  std::string mask_header = {};
  /// What was decided, for the report.
  std::vector<std::pair<std::string, Value>> options = {};
  /// Returns a clone of the model that it guides.
  std::function<sag::ModelPatcher(const sag::ModelPatcher&)> apply = {};
};

/// A guidance that the command knows.
struct GuidanceKind {
  /// What --guidance calls it, "sag"; also its entry in the report and, if it has options of its
  /// own, in model.json's "defaults".
  const char* key;
  /// What it is, what it costs and where it is from, for `--guidance help`.
  const char* about;
  /// Options without a name on the command line are given with --guidance alone.
  const OptionGroup* options;
  /// Returns the guidance, watching the self-attention `site` where its options name none.
  Guidance (*decide)(const Choices& choices, const std::string& site);
  /// What else it is called: ComfyUI's node, and other spellings. --guidance hints at `key` then.
  std::vector<std::string> others = {};
  /// The option that turns it off, "--no-sag"; null: it guides only where --guidance names it.
  const char* off = nullptr;
  /// Throws UsageError when its options of the command line do not go together.
  void (*check)(const Choices& choices) = nullptr;
};

/// What --guidance says.
struct GuidanceChoice {
  /// NAME[:KEY=VALUE,…] each, in their order. None: the guidances that have an option to turn them
  /// off.
  std::vector<std::string> guidances = {};
};
const OptionTable<GuidanceChoice>& guidance_options();

/// Returns all guidances that the command knows. To add one: describe it in network_guidances.cpp
/// or in cfg_guidances.cpp, and name it in the list in guidances.cpp.
std::span<const GuidanceKind> guidance_kinds();

/// Returns the guidances of a run, in the order in which they are applied. Throws UsageError.
std::vector<Guidance> decide_guidances(const Choices& choices, const std::string& site);

}  // namespace sag_sample

#include "guidances.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cfg_guidances.h"
#include "errors.h"
#include "guidance_rows.h"
#include "network_guidances.h"
#include "sag/self_attention_guidance.h"
#include "shuffle.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

// Self-attention guidance.

using Sag = sag::SelfAttentionGuidanceOptions;

const OptionTable<Sag>& sag_options() {
  constexpr Range<std::int64_t> kTaps = {
      .low = 0, .high = 65535, .what = "an odd whole number, or 0", .odd_or_zero = true};
  static const OptionTable<Sag> table(
      "Self-attention guidance",
      {number("--sag-scale", "scale", &Sag::scale, kFinite, "X", "How strongly to steer; 0 is off")
           .from_model(),
       number("--sag-blur", "blur_sigma", &Sag::blur_sigma, kNotNegative, "X",
              "Sigma of the blur, in latent cells")
           .from_model(),
       number("--sag-threshold", "threshold", &Sag::threshold, kFinite, "X",
              "Blur what receives more attention than this; 1 is the average")
           .from_model(),
       number("--sag-kernel", "kernel_size", &Sag::kernel_size, kTaps, "N",
              "Taps of the blur, odd; 0: as many as --sag-blur needs")
           .from_model(),
       number("--sag-start", "sigma_start", &Sag::sigma_start, kSigma, "SIGMA",
              "Guide from this noise level on")
           .from_model(),
       number("--sag-end", "sigma_end", &Sag::sigma_end, kSigma, "SIGMA",
              "Guide down to this noise level")
           .from_model(),
       number("--sag-start-percent", "start_percent", &Sag::start_percent, kShare, "X",
              "The same as a share of the model's timesteps, 0 ... 1"),
       number("--sag-end-percent", "end_percent", &Sag::end_percent, kShare, "X",
              "The same as a share of the model's timesteps, 0 ... 1"),
       number("--sag-interval", "interval", &Sag::interval, whole(1, 10000), "N",
              "Guide every Nth step: 1/N of the extra rows, and less of the effect"),
       flag("--sag-one-pass", "one_pass", &Sag::one_pass,
            "Perturb with what the step before blurred, in one call of the UNet"),
       tokens_number<Sag>(
           "--sag-tokens-before", "tokens_before", &sag::PictureTokens::before, kOtherTokens,
           "Tokens before the picture's (class token, registers, text); -1: the rest")
           .from_model(),
       tokens_number<Sag>("--sag-tokens-after", "tokens_after", &sag::PictureTokens::after,
                          kOtherTokens, "Tokens after the picture's; -1: the rest")
           .from_model(),
       tokens_number<Sag>("--sag-reduction", "reduction", &sag::PictureTokens::reduction,
                          whole(0, 65535),
                          "Latent cells along a side of a token; 0: as the number of tokens says")
           .from_model(),
       mark<Sag>("--sag-shuffle", "Control: blur as much, at random places").hide(),
       mark<Sag>("--no-sag", "Sample without self-attention guidance")});
  return table;
}

void check_sag(const Choices& choices) {
  const auto never_both = [&](const char* a, const char* b) {
    if (choices.contains(a) && choices.contains(b)) {
      throw UsageError(fmt::format("{} and {} cannot be given together.", a, b));
    }
  };
  never_both("--sag-start", "--sag-start-percent");
  never_both("--sag-end", "--sag-end-percent");
  never_both("--sag-shuffle", "--no-sag");
  never_both("--sag-one-pass", "--no-sag");
  if (sag_options().decide(choices).interval > 1) never_both("--sag-interval", "--no-sag");
}

void check_window(const Sag& sag) {
  if (sag.sigma_start < sag.sigma_end) {
    throw UsageError(fmt::format("--sag-start must be at least --sag-end ({}), got {}.",
                                 sag.sigma_end, sag.sigma_start));
  }
  if (sag.start_percent.value_or(0.0) > sag.end_percent.value_or(1.0)) {
    throw UsageError(
        fmt::format("--sag-start-percent must be at most --sag-end-percent ({}), got {}.",
                    sag.end_percent.value_or(1.0), *sag.start_percent));
  }
}

void check_tokens(const sag::PictureTokens& tokens) {
  constexpr auto kRest = sag::PictureTokens::kRest;
  if (tokens.before == kRest && tokens.after == kRest) {
    throw UsageError("Only one of --sag-tokens-before and --sag-tokens-after can be -1, the rest.");
  }
  if ((tokens.before == kRest || tokens.after == kRest) && tokens.reduction == 0) {
    throw UsageError(fmt::format(
        "{} -1, the rest, needs --sag-reduction, which says how many tokens the picture has.",
        tokens.before == kRest ? "--sag-tokens-before" : "--sag-tokens-after"));
  }
}

Guidance decide_sag(const Choices& choices, const std::string& site) {
  auto sag = sag_options().decide(choices);
  sag.site = site;
  check_window(sag);
  check_tokens(sag.tokens);
  const bool shuffle = choices.contains("--sag-shuffle");
  auto options = sag_options().report(sag);
  options.emplace_back("shuffle", shuffle);
  options.emplace_back("site", site);
  return {.name = "self_attention_guidance",
          .title = "self-attention guidance",
          .label = "SAG",
          .summary = fmt::format("SAG scale {:g}, blur {:g}", sag.scale, sag.blur_sigma),
          .needs_uncond = true,
          .sites = {site},
          .mask_header = "attention mask",
          .options = std::move(options),
          .apply = [sag, shuffle](const sag::ModelPatcher& model) {
            return sag::apply_self_attention_guidance(
                shuffle ? shuffle_tokens(model, sag.site, sag.tokens) : model, sag);
          }};
}

// --guidance.

bool same_word(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](unsigned char c, unsigned char d) {
    return std::tolower(c) == std::tolower(d);
  });
}

// "; do you mean pag?", also for the names of ComfyUI's nodes; else ".".
std::string suggested_kind(const std::string& name) {
  std::vector<std::string> known;
  for (const auto& kind : guidance_kinds()) {
    for (const auto& other : kind.others) {
      if (same_word(name, other)) return fmt::format("; do you mean {}?", kind.key);
    }
    known.emplace_back(kind.key);
  }
  return suggestion(name, known);
}

const GuidanceKind& find_kind(const std::string& name, const std::string& where) {
  std::vector<std::string> known;
  for (const auto& kind : guidance_kinds()) {
    if (kind.key == name) return kind;
    known.emplace_back(kind.key);
  }
  throw UsageError(fmt::format("{} must be none or of {}, got \"{}\"{}", where,
                               fmt::join(known, ", "), name, suggested_kind(name)));
}

// `where`: what messages call the guidance, "--guidance pag".
const Option& find_option(const GuidanceKind& kind, const std::string& key,
                          const std::string& where) {
  std::vector<std::string> known;
  bool has_sites = false;
  for (const auto& option : kind.options->options) {
    if (option.key.empty()) continue;
    if (option.key == key) return option;
    known.push_back(option.key);
    has_sites = has_sites || option.type == "SITE+SITE";
  }
  auto hint = suggestion(key, known);
  if (hint == ".") {
    hint = fmt::format("; it has {}.{}", fmt::join(known, ", "),
                       has_sites ? " (Several sites have + between them.)" : "");
  }
  throw UsageError(fmt::format("{} has no option \"{}\"{}", where, key, hint));
}

// What follows the name, KEY=VALUE,KEY=VALUE. A flag needs no value.
Choices read_chosen(const GuidanceKind& kind, const std::string& text, const std::string& where) {
  Choices choices;
  for (std::size_t begin = 0; begin <= text.size();) {
    const auto end = std::min(text.find(',', begin), text.size());
    const auto word = text.substr(begin, end - begin);
    const auto equals = std::min(word.find('='), word.size());
    const auto key = word.substr(0, equals);
    const auto& option = find_option(kind, key, where);
    Given value = {.where = fmt::format("{}:{}", where, key)};
    if (option.type.empty()) {
      value.value = true;
    } else if (equals < word.size()) {
      value.words = {word.substr(equals + 1)};
    }
    if (option.type.empty() != (equals == word.size())) {
      throw UsageError(fmt::format("{} {}.", value.where,
                                   option.type.empty() ? "takes no value" : "needs a value"));
    }
    if (!choices.emplace(option.id(), std::move(value)).second) {
      throw UsageError(fmt::format("{}: {} is given twice.", where, key));
    }
    begin = end + 1;
  }
  return choices;
}

Guidance decide(const GuidanceKind& kind, const Choices& choices, const std::string& site) {
  auto guidance = kind.decide(choices, site);
  guidance.key = kind.key;
  return guidance;
}

// NAME or NAME:KEY=VALUE,…
Guidance guidance_of(const std::string& text, const std::string& where, const Choices& choices,
                     const std::string& site) {
  const auto colon = std::min(text.find(':'), text.size());
  const auto& kind = find_kind(text.substr(0, colon), where);
  // Its options on the command line and in model.json count, too, if it has any.
  Choices own = kind.off ? choices : Choices();
  if (colon == text.size()) return decide(kind, own, site);
  auto chosen = read_chosen(kind, text.substr(colon + 1), fmt::format("{} {}", where, kind.key));
  if (kind.check) kind.check(chosen);
  for (auto& [id, given] : chosen) {
    const auto other = own.find(id);
    if (other != own.end() && other->second.where == id) {
      throw UsageError(fmt::format("{} and {} cannot be given together.", given.where, id));
    }
    own[id] = std::move(given);
  }
  return decide(kind, own, site);
}

// All kinds with their options, for --guidance help.
const std::vector<std::string>& help_lines() {
  static const std::vector<std::string> lines = [] {
    std::vector<std::string> made;
    for (const auto& kind : guidance_kinds()) {
      made.push_back(fmt::format("{:<20}{}", kind.key, kind.about));
      for (const auto& option : kind.options->options) {
        if (option.key.empty()) continue;
        const auto value = option.type.empty() ? option.key : option.key + "=" + option.type;
        auto line = fmt::format("    {:<24}{}", value, option.help);
        if (!option.shown_default.empty()) line += fmt::format(" [{}]", option.shown_default);
        made.push_back(std::move(line));
      }
    }
    return made;
  }();
  return lines;
}

}  // namespace

const OptionTable<GuidanceChoice>& guidance_options() {
  static const OptionTable<GuidanceChoice> table = [] {
    auto row = several("--guidance", "guidance", &GuidanceChoice::guidances, "NAME[:KEY=VALUE,...]",
                       "Guidance to apply, in place of self-attention guidance alone; several are "
                       "applied in their order. none: no guidance. --guidance help lists all with "
                       "their options")
                   .from_model()
                   .by_default("sag");
    row.listed.assign(help_lines().begin(), help_lines().end());
    return OptionTable<GuidanceChoice>("Guidance", {row});
  }();
  return table;
}

std::span<const GuidanceKind> guidance_kinds() {
  static const GuidanceKind kinds[] = {
      {"sag",
       "Self-attention guidance: 1 row more an image; arXiv 2210.00939, ComfyUI's "
       "SelfAttentionGuidance",
       &sag_options(),
       decide_sag,
       {"SelfAttentionGuidance"},
       "--no-sag",
       check_sag},
      pag_kind(),
      seg_kind(),
      tpg_kind(),
      slg_kind(),
      nag_kind(),
      apg_kind(),
      cfg_zero_kind(),
      rescale_kind(),
      dynamic_threshold_kind(),
      momentum_kind(),
      self_guidance_kind(),
  };
  return kinds;
}

namespace {

// A list takes the place of the guidances that have options of their own on the command line: their
// options must not be given for nothing.
void check_named(const std::set<std::string>& keys, const Choices& choices) {
  for (const auto& kind : guidance_kinds()) {
    if (keys.contains(kind.key)) continue;
    for (const auto& option : kind.options->options) {
      const auto given = choices.find(option.name);
      // Those of model.json may stay there.
      const bool is_needless =
          !option.name.empty() && given != choices.end() && given->second.where == option.name;
      if (!is_needless || option.name == kind.off) continue;
      throw UsageError(fmt::format("{} needs --guidance {}, as --guidance says what guides.",
                                   option.name, kind.key));
    }
  }
}

}  // namespace

std::vector<Guidance> decide_guidances(const Choices& choices, const std::string& site) {
  const auto asked = choices.find("--guidance");
  std::vector<Guidance> guidances;
  if (asked == choices.end()) {
    for (const auto& kind : guidance_kinds()) {
      if (kind.off && !choices.contains(kind.off)) guidances.push_back(decide(kind, choices, site));
    }
    return guidances;
  }
  const auto& where = asked->second.where;
  std::set<std::string> keys;
  const auto texts = guidance_options().decide(choices).guidances;
  if (texts == std::vector<std::string>{"none"}) return {};
  for (const auto& text : texts) {
    auto guidance = guidance_of(text, where, choices, site);
    if (!keys.insert(guidance.key).second) {
      throw UsageError(fmt::format("{} {} is given twice.", where, guidance.key));
    }
    // Turned off on the command line, in model.json's list.
    const auto* off = find_kind(guidance.key, where).off;
    if (!off || !choices.contains(off)) guidances.push_back(std::move(guidance));
  }
  check_named(keys, choices);
  return guidances;
}

}  // namespace sag_sample

#include "guidances.h"

#include <fmt/format.h>

#include "errors.h"
#include "sag/self_attention_guidance.h"
#include "shuffle.h"

namespace sag_sample {
namespace {

// Self-attention guidance.

using Sag = sag::SelfAttentionGuidanceOptions;

// A number of the picture's tokens.
Row<Sag> tokens_number(const char* name, const char* key, std::int64_t sag::PictureTokens::*field,
                       Range<std::int64_t> range, const char* help) {
  return {{name, key, "N", help},
          [=](Sag& sag, const Given& given) { sag.tokens.*field = read_number(given, range); },
          [=](const Sag& sag) { return Value(sag.tokens.*field); }};
}

const OptionTable<Sag>& sag_options() {
  constexpr Range<std::int64_t> kTaps = {
      .low = 0, .high = 65535, .what = "an odd whole number, or 0", .odd_or_zero = true};
  constexpr auto kOthers = whole(sag::PictureTokens::kRest, 1'000'000);
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
       tokens_number("--sag-tokens-before", "tokens_before", &sag::PictureTokens::before, kOthers,
                     "Tokens before the picture's (class token, registers, text); -1: the rest")
           .from_model(),
       tokens_number("--sag-tokens-after", "tokens_after", &sag::PictureTokens::after, kOthers,
                     "Tokens after the picture's; -1: the rest")
           .from_model(),
       tokens_number("--sag-reduction", "reduction", &sag::PictureTokens::reduction,
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
          .mask_header = "attention mask",
          .options = std::move(options),
          .apply = [sag, shuffle](const sag::ModelPatcher& model) {
            return sag::apply_self_attention_guidance(
                shuffle ? shuffle_tokens(model, sag.site, sag.tokens) : model, sag);
          }};
}

}  // namespace

std::span<const GuidanceKind> guidance_kinds() {
  static const GuidanceKind kinds[] = {
      {"sag", "--no-sag", &sag_options(), check_sag, decide_sag},
  };
  return kinds;
}

std::vector<Guidance> decide_guidances(const Choices& choices, const std::string& site) {
  std::vector<Guidance> guidances;
  for (const auto& kind : guidance_kinds()) {
    if (choices.contains(kind.off)) continue;
    guidances.push_back(kind.decide(choices, site));
    guidances.back().key = kind.key;
  }
  return guidances;
}

}  // namespace sag_sample

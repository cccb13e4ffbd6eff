#include "further_guidances.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "errors.h"
#include "sag/adaptive_projected_guidance.h"
#include "sag/cfg_zero_star.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/rescale_cfg.h"
#include "sag/smoothed_energy_guidance.h"

namespace sag_sample {
namespace {

using Pag = sag::PerturbedAttentionGuidanceOptions;
using Seg = sag::SmoothedEnergyGuidanceOptions;
using Apg = sag::AdaptiveProjectedGuidanceOptions;
using Zero = sag::CfgZeroStarOptions;
using Rescale = sag::RescaleCfgOptions;

// A bound of `window`.
template <typename T, typename Field>
Row<T> bound(const char* key, Field sag::GuidanceWindow::*field, Range<double> range,
             const char* type, const char* help) {
  return {{"", key, type, help},
          [=](T& t, const Given& given) { t.window.*field = read_number(given, range); },
          [=](const T& t) { return value_of(t.window.*field); }};
}

template <typename T>
void add_window(std::vector<Row<T>>& rows) {
  using W = sag::GuidanceWindow;
  rows.push_back(
      bound<T>("sigma_start", &W::sigma_start, kSigma, "SIGMA", "Guide from this noise level on"));
  rows.push_back(
      bound<T>("sigma_end", &W::sigma_end, kSigma, "SIGMA", "Guide down to this noise level"));
  rows.push_back(bound<T>("start_percent", &W::start_percent, kShare, "X",
                          "The same as a share of the model's timesteps, 0 ... 1"));
  rows.push_back(bound<T>("end_percent", &W::end_percent, kShare, "X",
                          "The same as a share of the model's timesteps, 0 ... 1"));
}

// SITE+SITE.
std::vector<sag::AttentionSite> read_sites(const Given& given) {
  const auto text = read_text(given);
  std::vector<sag::AttentionSite> sites;
  for (std::size_t begin = 0; begin <= text.size();) {
    const auto end = std::min(text.find('+', begin), text.size());
    if (end == begin) {
      throw UsageError(
          fmt::format("{} must be sites with + between them, got \"{}\".", given.where, text));
    }
    sites.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return sites;
}

std::vector<std::string> names_of(const std::vector<sag::AttentionSite>& sites) {
  std::vector<std::string> names;
  for (const auto& site : sites) names.push_back(site.name());
  return names;
}

std::string joined_names(const std::vector<sag::AttentionSite>& sites) {
  std::string joined;
  for (const auto& name : names_of(sites)) joined += (joined.empty() ? "" : "+") + name;
  return joined;
}

template <typename T>
void add_sites(std::vector<Row<T>>& rows) {
  rows.push_back(Row<T>(
                     {"", "sites", "SITE+SITE", "Self-attentions to perturb"},
                     [](T& t, const Given& given) { t.sites = read_sites(given); },
                     [](const T& t) { return Value(joined_names(t.sites)); })
                     .by_default("the model's, else middle"));
  using P = sag::PictureTokens;
  rows.push_back(tokens_number<T>("", "tokens_before", &P::before, kOtherTokens,
                                  "Tokens before the picture's; -1: the rest"));
  rows.push_back(tokens_number<T>("", "tokens_after", &P::after, kOtherTokens,
                                  "Tokens after the picture's; -1: the rest"));
  rows.push_back(tokens_number<T>("", "reduction", &P::reduction, whole(0, 65535),
                                  "Latent cells along a side of a token; 0: as their number says"));
}

// Without a choice, the model's site.
template <typename T>
T decide_sites(const OptionTable<T>& table, const Choices& choices, const std::string& site) {
  auto options = table.decide(choices);
  if (!choices.contains("sites")) options.sites = {site};
  return options;
}

const OptionTable<Pag>& pag_options() {
  static const OptionTable<Pag> table = [] {
    std::vector<Row<Pag>> rows = {
        number("", "scale", &Pag::scale, kFinite, "X", "How strongly to steer; 0 is off"),
        number("", "adaptive_scale", &Pag::adaptive_scale, kNotNegative, "X",
               "How fast the scale falls, per timestep of 1000")};
    add_sites(rows);
    add_window(rows);
    return OptionTable<Pag>("Perturbed-attention guidance", rows);
  }();
  return table;
}

Guidance decide_pag(const Choices& choices, const std::string& site) {
  const auto pag = decide_sites(pag_options(), choices, site);
  return {.name = "perturbed_attention_guidance",
          .title = "perturbed-attention guidance",
          .label = "PAG",
          .summary = fmt::format("PAG scale {:g}", pag.scale),
          .sites = names_of(pag.sites),
          .options = pag_options().report(pag),
          .apply = [pag](const sag::ModelPatcher& model) {
            return sag::apply_perturbed_attention_guidance(model, pag);
          }};
}

const OptionTable<Seg>& seg_options() {
  constexpr Range<double> kBlur = {0.0, Limits::infinity(), "a number greater than 0", true};
  static const OptionTable<Seg> table = [=] {
    std::vector<Row<Seg>> rows = {
        number("", "scale", &Seg::scale, kFinite, "X", "How strongly to steer; 0 is off"),
        number("", "blur_sigma", &Seg::blur_sigma, kBlur, "SIGMA",
               "Of the blur of the queries, in tokens; inf: their mean")};
    add_sites(rows);
    add_window(rows);
    return OptionTable<Seg>("Smoothed-energy guidance", rows);
  }();
  return table;
}

Guidance decide_seg(const Choices& choices, const std::string& site) {
  const auto seg = decide_sites(seg_options(), choices, site);
  return {.name = "smoothed_energy_guidance",
          .title = "smoothed-energy guidance",
          .label = "SEG",
          .summary = fmt::format("SEG scale {:g}, blur {:g}", seg.scale, seg.blur_sigma),
          .sites = names_of(seg.sites),
          .options = seg_options().report(seg),
          .apply = [seg](const sag::ModelPatcher& model) {
            return sag::apply_smoothed_energy_guidance(model, seg);
          }};
}

const OptionTable<Apg>& apg_options() {
  constexpr Range<double> kMomentum = {-0.999, 0.999, "a number between -0.999 and 0.999"};
  static const OptionTable<Apg> table = [=] {
    std::vector<Row<Apg>> rows = {
        number("", "eta", &Apg::eta, kFinite, "X",
               "How much of the part that oversaturates stays; 1: all"),
        number("", "norm_threshold", &Apg::norm_threshold, kNotNegative, "X",
               "Longest direction, over the whole latent; 0: no limit"),
        number("", "momentum", &Apg::momentum, kMomentum, "X",
               "How much of the step before is added")};
    add_window(rows);
    return OptionTable<Apg>("Adaptive projected guidance", rows);
  }();
  return table;
}

Guidance decide_apg(const Choices& choices, const std::string& /*site*/) {
  const auto apg = apg_options().decide(choices);
  return {.name = "adaptive_projected_guidance",
          .title = "adaptive projected guidance",
          .label = "APG",
          .summary = fmt::format("APG eta {:g}", apg.eta),
          .needs_uncond = true,
          .options = apg_options().report(apg),
          .apply = [apg](const sag::ModelPatcher& model) {
            return sag::apply_adaptive_projected_guidance(model, apg);
          }};
}

const OptionTable<Zero>& cfg_zero_options() {
  static const OptionTable<Zero> table = [] {
    std::vector<Row<Zero>> rows = {number("", "zero_init_steps", &Zero::zero_init_steps,
                                          whole(0, 10000), "N",
                                          "First steps in which the output is taken as 0")};
    add_window(rows);
    return OptionTable<Zero>("CFG-Zero*", rows);
  }();
  return table;
}

Guidance decide_cfg_zero(const Choices& choices, const std::string& /*site*/) {
  const auto zero = cfg_zero_options().decide(choices);
  return {.name = "cfg_zero_star",
          .title = "CFG-Zero*",
          .label = "CFG-Zero*",
          .summary = "CFG-Zero*",
          .needs_uncond = true,
          .options = cfg_zero_options().report(zero),
          .apply = [zero](const sag::ModelPatcher& model) {
            return sag::apply_cfg_zero_star(model, zero);
          }};
}

const OptionTable<Rescale>& rescale_options() {
  static const OptionTable<Rescale> table = [] {
    std::vector<Row<Rescale>> rows = {number("", "multiplier", &Rescale::multiplier, kShare, "X",
                                             "How much of the rescaled result is taken, 0 ... 1")};
    add_window(rows);
    return OptionTable<Rescale>("CFG rescale", rows);
  }();
  return table;
}

Guidance decide_rescale(const Choices& choices, const std::string& /*site*/) {
  const auto rescale = rescale_options().decide(choices);
  return {.name = "rescale_cfg",
          .title = "CFG rescale",
          .label = "rescale",
          .summary = fmt::format("rescale {:g}", rescale.multiplier),
          .options = rescale_options().report(rescale),
          .apply = [rescale](const sag::ModelPatcher& model) {
            return sag::apply_rescale_cfg(model, rescale);
          }};
}

}  // namespace

GuidanceKind pag_kind() {
  return {"pag",
          "Perturbed-attention guidance: 1 row more an image; arXiv 2403.17377, ComfyUI's "
          "PerturbedAttentionGuidance",
          &pag_options(), decide_pag};
}

GuidanceKind seg_kind() {
  return {"seg", "Smoothed-energy guidance: 1 row more an image; arXiv 2408.00760", &seg_options(),
          decide_seg};
}

GuidanceKind apg_kind() {
  return {"apg",
          "Adaptive projected guidance, a form of CFG: no row; arXiv 2410.02416, ComfyUI's APG",
          &apg_options(), decide_apg};
}

GuidanceKind cfg_zero_kind() {
  return {"cfg_zero", "CFG-Zero*, a form of CFG: no row; arXiv 2503.18886, ComfyUI's CFGZeroStar",
          &cfg_zero_options(), decide_cfg_zero};
}

GuidanceKind rescale_kind() {
  return {"rescale",
          "CFG rescale, acts on the result so far: no row; arXiv 2305.08891, ComfyUI's RescaleCFG",
          &rescale_options(), decide_rescale};
}

}  // namespace sag_sample

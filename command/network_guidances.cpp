#include "network_guidances.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "errors.h"
#include "guidance_rows.h"
#include "sag/normalized_attention_guidance.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/skip_layer_guidance.h"
#include "sag/smoothed_energy_guidance.h"
#include "sag/token_perturbation_guidance.h"

namespace sag_sample {
namespace {

using Pag = sag::PerturbedAttentionGuidanceOptions;
using Seg = sag::SmoothedEnergyGuidanceOptions;
using Tpg = sag::TokenPerturbationGuidanceOptions;
using Slg = sag::SkipLayerGuidanceOptions;
using Nag = sag::NormalizedAttentionGuidanceOptions;

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
Row<T> sites_row(const char* key, std::vector<sag::AttentionSite> T::*field, const char* help) {
  return {{"", key, "SITE+SITE", help},
          [=](T& t, const Given& given) { t.*field = read_sites(given); },
          [=](const T& t) { return Value(joined_names(t.*field)); }};
}

template <typename T>
void add_sites(std::vector<Row<T>>& rows) {
  rows.push_back(sites_row("sites", &T::sites, "Self-attentions to perturb")
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
  auto options = decide_windowed(table, choices);
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

const OptionTable<Tpg>& tpg_options() {
  static const OptionTable<Tpg> table = [] {
    std::vector<Row<Tpg>> rows = {
        number("", "scale", &Tpg::scale, kFinite, "X", "How strongly to steer; 0 is off"),
        sites_row("blocks", &Tpg::blocks, "Transformer blocks whose tokens are shuffled"),
        number("", "seed", &Tpg::seed, kSeed, "N", "What the orders of the tokens are drawn from")};
    add_window(rows);
    return OptionTable<Tpg>("Token perturbation guidance", rows);
  }();
  return table;
}

Guidance decide_tpg(const Choices& choices, const std::string& /*site*/) {
  const auto tpg = decide_windowed(tpg_options(), choices);
  return {.name = "token_perturbation_guidance",
          .title = "token perturbation guidance",
          .label = "TPG",
          .summary = fmt::format("TPG scale {:g}", tpg.scale),
          .blocks = names_of(tpg.blocks),
          .options = tpg_options().report(tpg),
          .apply = [tpg](const sag::ModelPatcher& model) {
            return sag::apply_token_perturbation_guidance(model, tpg);
          }};
}

const OptionTable<Slg>& slg_options() {
  static const OptionTable<Slg> table = [] {
    std::vector<Row<Slg>> rows = {
        number("", "scale", &Slg::scale, kFinite, "X", "How strongly to steer; 0 is off"),
        sites_row("blocks", &Slg::blocks, "Transformer blocks to skip")};
    add_window(rows);
    return OptionTable<Slg>("Skip-layer guidance", rows);
  }();
  return table;
}

Guidance decide_slg(const Choices& choices, const std::string& /*site*/) {
  const auto slg = decide_windowed(slg_options(), choices);
  return {.name = "skip_layer_guidance",
          .title = "skip-layer guidance",
          .label = "SLG",
          .summary = fmt::format("SLG scale {:g}", slg.scale),
          .blocks = names_of(slg.blocks),
          .options = slg_options().report(slg),
          .apply = [slg](const sag::ModelPatcher& model) {
            return sag::apply_skip_layer_guidance(model, slg);
          }};
}

const OptionTable<Nag>& nag_options() {
  static const OptionTable<Nag> table = [] {
    std::vector<Row<Nag>> rows = {number("", "scale", &Nag::scale, kFinite, "X",
                                         "How far to steer away from the negative prompt"),
                                  number("", "tau", &Nag::tau, kPositive, "X",
                                         "Longest steered output, by the length of the plain one"),
                                  number("", "alpha", &Nag::alpha, kShare, "X",
                                         "How much of the steered output is taken, 0 ... 1")};
    add_window(rows);
    return OptionTable<Nag>("Normalized attention guidance", rows);
  }();
  return table;
}

Guidance decide_nag(const Choices& choices, const std::string& /*site*/) {
  const auto nag = decide_windowed(nag_options(), choices);
  return {.name = "normalized_attention_guidance",
          .title = "normalized attention guidance",
          .label = "NAG",
          .summary = fmt::format("NAG scale {:g}", nag.scale),
          .needs_cross_attention = true,
          .options = nag_options().report(nag),
          .apply = [nag](const sag::ModelPatcher& model) {
            return sag::apply_normalized_attention_guidance(model, nag);
          }};
}

}  // namespace

GuidanceKind pag_kind() {
  return {"pag",
          "Perturbed-attention guidance: 1 row more an image; arXiv 2403.17377, ComfyUI's "
          "PerturbedAttentionGuidance",
          &pag_options(),
          decide_pag,
          {"PerturbedAttentionGuidance", "perturbed_attention_guidance"}};
}

GuidanceKind seg_kind() {
  return {"seg",
          "Smoothed-energy guidance: 1 row more an image; arXiv 2408.00760",
          &seg_options(),
          decide_seg,
          {"SmoothedEnergyGuidance", "SmoothedEnergyGuidanceAdvanced", "smoothed_energy_guidance"}};
}

GuidanceKind tpg_kind() {
  return {"tpg",
          "Token perturbation guidance: 1 row more an image; arXiv 2506.10036, "
          "TokenPerturbationGuidance of a ComfyUI extension",
          &tpg_options(),
          decide_tpg,
          {"TokenPerturbationGuidance", "token_perturbation_guidance"}};
}

GuidanceKind slg_kind() {
  return {"slg",
          "Skip-layer guidance (STG): 1 row more an image; arXiv 2411.18664, ComfyUI's "
          "SkipLayerGuidanceDiT",
          &slg_options(),
          decide_slg,
          {"SkipLayerGuidanceDiT", "SkipLayerGuidance", "SkipLayerGuidanceSD3", "STG",
           "skip_layer_guidance"}};
}

GuidanceKind nag_kind() {
  return {"nag",
          "Normalized attention guidance, away from the negative prompt also at cfg 1: no row; "
          "arXiv 2505.21179, ComfyUI's NAGuidance",
          &nag_options(),
          decide_nag,
          {"NAGuidance", "NormalizedAttentionGuidance", "normalized_attention_guidance"}};
}

}  // namespace sag_sample

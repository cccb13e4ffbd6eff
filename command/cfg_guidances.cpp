#include "cfg_guidances.h"

#include <vector>

#include <fmt/format.h>

#include "guidance_rows.h"
#include "sag/adaptive_projected_guidance.h"
#include "sag/cfg_zero_star.h"
#include "sag/dynamic_thresholding.h"
#include "sag/momentum_guidance.h"
#include "sag/rescale_cfg.h"
#include "sag/self_guidance.h"

namespace sag_sample {
namespace {

using Apg = sag::AdaptiveProjectedGuidanceOptions;
using Zero = sag::CfgZeroStarOptions;
using Rescale = sag::RescaleCfgOptions;
using Threshold = sag::DynamicThresholdingOptions;
using Momentum = sag::MomentumGuidanceOptions;
using SelfGuidance = sag::SelfGuidanceOptions;

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
  const auto apg = decide_windowed(apg_options(), choices);
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
  const auto zero = decide_windowed(cfg_zero_options(), choices);
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
  const auto rescale = decide_windowed(rescale_options(), choices);
  return {.name = "rescale_cfg",
          .title = "CFG rescale",
          .label = "rescale",
          .summary = fmt::format("rescale {:g}", rescale.multiplier),
          .options = rescale_options().report(rescale),
          .apply = [rescale](const sag::ModelPatcher& model) {
            return sag::apply_rescale_cfg(model, rescale);
          }};
}

const OptionTable<Threshold>& dynamic_threshold_options() {
  static const OptionTable<Threshold> table = [] {
    std::vector<Row<Threshold>> rows = {
        number("", "mimic_scale", &Threshold::mimic_scale, kNotNegative, "X",
               "The CFG scale whose spread the result gets"),
        number("", "threshold_percentile", &Threshold::threshold_percentile, kShare, "X",
               "The share of a channel that is not clamped, 0 ... 1")};
    add_window(rows);
    return OptionTable<Threshold>("Dynamic thresholding", rows);
  }();
  return table;
}

Guidance decide_dynamic_threshold(const Choices& choices, const std::string& /*site*/) {
  const auto threshold = decide_windowed(dynamic_threshold_options(), choices);
  return {.name = "dynamic_thresholding",
          .title = "dynamic thresholding",
          .label = "dynamic threshold",
          .summary = fmt::format("dynamic threshold {:g}", threshold.mimic_scale),
          .needs_uncond = true,
          .options = dynamic_threshold_options().report(threshold),
          .apply = [threshold](const sag::ModelPatcher& model) {
            return sag::apply_dynamic_thresholding(model, threshold);
          }};
}

const OptionTable<Momentum>& momentum_options() {
  static const OptionTable<Momentum> table = [] {
    std::vector<Row<Momentum>> rows = {
        number("", "momentum", &Momentum::momentum, kFinite, "X",
               "How far to go on, away from the average of the steps before; 0 is off"),
        number("", "ema", &Momentum::ema, kShare, "X",
               "How much of the average stays at each step, 0 ... 1")};
    add_window(rows);
    return OptionTable<Momentum>("Momentum guidance", rows);
  }();
  return table;
}

Guidance decide_momentum(const Choices& choices, const std::string& /*site*/) {
  const auto momentum = decide_windowed(momentum_options(), choices);
  return {.name = "momentum_guidance",
          .title = "momentum guidance",
          .label = "momentum",
          .summary = fmt::format("momentum {:g}", momentum.momentum),
          .options = momentum_options().report(momentum),
          .apply = [momentum](const sag::ModelPatcher& model) {
            return sag::apply_momentum_guidance(model, momentum);
          }};
}

const OptionTable<SelfGuidance>& self_guidance_options() {
  static const OptionTable<SelfGuidance> table = [] {
    std::vector<Row<SelfGuidance>> rows = {
        number("", "scale", &SelfGuidance::scale, kFinite, "X", "How strongly to steer; 0 is off")};
    add_window(rows);
    return OptionTable<SelfGuidance>("Self-guidance", rows);
  }();
  return table;
}

Guidance decide_self_guidance(const Choices& choices, const std::string& /*site*/) {
  const auto self = decide_windowed(self_guidance_options(), choices);
  return {.name = "self_guidance",
          .title = "self-guidance",
          .label = "SG-prev",
          .summary = fmt::format("SG-prev scale {:g}", self.scale),
          .options = self_guidance_options().report(self),
          .apply = [self](const sag::ModelPatcher& model) {
            return sag::apply_self_guidance(model, self);
          }};
}

}  // namespace

GuidanceKind apg_kind() {
  return {"apg",
          "Adaptive projected guidance, a form of CFG: no row; arXiv 2410.02416, ComfyUI's APG",
          &apg_options(),
          decide_apg,
          {"AdaptiveProjectedGuidance", "adaptive_projected_guidance"}};
}

GuidanceKind cfg_zero_kind() {
  return {"cfg_zero",
          "CFG-Zero*, a form of CFG: no row; arXiv 2503.18886, ComfyUI's CFGZeroStar",
          &cfg_zero_options(),
          decide_cfg_zero,
          {"CFGZeroStar", "cfg_zero_star"}};
}

GuidanceKind rescale_kind() {
  return {"rescale",
          "CFG rescale, acts on the result so far: no row; arXiv 2305.08891, ComfyUI's RescaleCFG",
          &rescale_options(),
          decide_rescale,
          {"RescaleCFG", "rescale_cfg"}};
}

GuidanceKind dynamic_threshold_kind() {
  return {"dynamic_threshold",
          "Dynamic thresholding, bounds the result so far: no row; ComfyUI's "
          "DynamicThresholdingFull",
          &dynamic_threshold_options(),
          decide_dynamic_threshold,
          {"DynamicThresholdingFull", "DynamicThresholdingSimple", "DynamicThresholding",
           "dynamic_thresholding"}};
}

GuidanceKind momentum_kind() {
  return {"momentum",
          "Momentum guidance, away from the average of the steps before: no row; arXiv 2602.20360, "
          "ComfyUI's MomentumGuidance",
          &momentum_options(),
          decide_momentum,
          {"MomentumGuidance", "momentum_guidance"}};
}

GuidanceKind self_guidance_kind() {
  return {"self_guidance",
          "Self-guidance (SG-prev), away from the prediction of the step before: no row; arXiv "
          "2412.05827",
          &self_guidance_options(),
          decide_self_guidance,
          {"SG", "sg_prev", "SG-prev"}};
}

}  // namespace sag_sample

#include "sag/self_attention_guidance.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include <ATen/ATen.h>

#include "model/latent.h"
#include "sag/attention_map.h"
#include "sag/blur.h"
#include "token_checks.h"
#include "watched_tokens.h"
#include "window.h"

namespace sag {
namespace {

// ComfyUI: `SelfAttentionGuidance.patch`. In smaller latents the blur would be most of the picture.
bool too_small(std::int64_t height, std::int64_t width) {
  return std::min(height, width) <= 4;
}

void check_step(const torch::Tensor& denoised, const torch::Tensor& x,
                const torch::Tensor& uncond_denoised, const SelfAttentionGuidanceStep& step) {
  check_latent(x, "x", "self_attention_guidance");
  TORCH_CHECK_VALUE(
      denoised.sizes() == x.sizes() && uncond_denoised.sizes() == x.sizes(),
      "[self_attention_guidance] denoised and uncond_denoised must have the shape of x, ",
      x.sizes(), ", got ", denoised.sizes(), " and ", uncond_denoised.sizes(), ".");
  TORCH_CHECK_TYPE(
      x.is_floating_point() && denoised.is_floating_point() && uncond_denoised.is_floating_point(),
      "[self_attention_guidance] x, denoised and uncond_denoised must be floating, got ",
      x.scalar_type(), ", ", denoised.scalar_type(), " and ", uncond_denoised.scalar_type(), ".");
  TORCH_CHECK_VALUE(std::isfinite(step.scale) && std::isfinite(step.renoise_scale),
                    "[self_attention_guidance] scale and renoise_scale must be finite, got ",
                    step.scale, " and ", step.renoise_scale, ".");
}

}  // namespace

torch::Tensor self_attention_guidance(
    const torch::Tensor& denoised, const torch::Tensor& x, const torch::Tensor& uncond_denoised,
    const torch::Tensor& attn_map,
    const std::function<torch::Tensor(const torch::Tensor& x_again)>& predict_uncond,
    const SelfAttentionGuidanceStep& step) {
  check_step(denoised, x, uncond_denoised, step);
  TORCH_CHECK_VALUE(predict_uncond, "[self_attention_guidance] predict_uncond must not be empty.");
  if (step.scale == 0 || step.blur_sigma == 0 || too_small(x.size(2), x.size(3))) return denoised;
  const auto degraded = create_blur_map(uncond_denoised, attn_map,
                                        {.blur_sigma = step.blur_sigma,
                                         .threshold = step.threshold,
                                         .kernel_size = step.kernel_size});
  const auto x_again = x + step.renoise_scale * (degraded - uncond_denoised);
  const auto again = predict_uncond(x_again);
  check_returns_shape(again, x, "predict_uncond", "self_attention_guidance");
  return denoised + step.scale * (degraded - again);
}

namespace {

void check_options(const SelfAttentionGuidanceOptions& options) {
  constexpr auto* where = "[apply_self_attention_guidance] ";
  TORCH_CHECK_VALUE(std::isfinite(options.scale), where, "scale must be finite, got ",
                    options.scale, ".");
  TORCH_CHECK_VALUE(std::isfinite(options.blur_sigma) && options.blur_sigma >= 0, where,
                    "blur_sigma must be finite and at least 0, got ", options.blur_sigma, ".");
  TORCH_CHECK_VALUE(std::isfinite(options.threshold), where, "threshold must be finite, got ",
                    options.threshold, ".");
  TORCH_CHECK_VALUE(
      options.kernel_size == 0 || (options.kernel_size > 0 && options.kernel_size % 2 == 1), where,
      "kernel_size must be odd, or 0 to be as wide as blur_sigma needs, got ", options.kernel_size,
      ".");
  check_picture_tokens(options.tokens, "apply_self_attention_guidance");
  TORCH_CHECK_VALUE(options.interval >= 1, where, "interval must be at least 1, got ",
                    options.interval, ".");
}

// Turns a window in percent into one in sigma.
SelfAttentionGuidanceOptions with_sigmas(SelfAttentionGuidanceOptions options,
                                         const ModelSampling& sampling) {
  const auto window = in_sigmas(
      {options.sigma_start, options.sigma_end, options.start_percent, options.end_percent},
      sampling, "apply_self_attention_guidance");
  options.sigma_start = window.sigma_start;
  options.sigma_end = window.sigma_end;
  return options;
}

// Returns why SAG neither guides nor records at `sigma`; null if it may.
const char* idle_reason(const SelfAttentionGuidanceOptions& options, double sigma) {
  if (options.scale == 0) return "scale is 0";
  if (options.blur_sigma == 0) return "blur_sigma is 0";
  if (!contains({options.sigma_start, options.sigma_end}, sigma)) return kOutsideWindow;
  return nullptr;
}

bool guides_step(const SelfAttentionGuidanceOptions& options, const StepContext& step) {
  return step.step_index() % options.interval == 0;
}

// One-pass SAG also records in steps that it does not guide: the next step needs what they blur.
bool records_in(const SelfAttentionGuidanceOptions& options, const StepContext& step) {
  return !idle_reason(options, step.sigma()) && (options.one_pass || guides_step(options, step)) &&
         !too_small(step.height(), step.width());
}

// Returns what the queries and keys of the picture give to each other.
torch::Tensor map_of_picture(const torch::Tensor& map, const TokenRange& keys) {
  if (keys.count == map.size(1)) return map;
  const auto picture = map.narrow(1, keys.begin, keys.count);
  // The others' share is missing, so the mean is less than 1. In fp64, its last bits in fp32 do not
  // depend on the order of the sum.
  const auto mean = picture.mean(1, /*keepdim=*/true, torch::kDouble)
                        .clamp_min(std::numeric_limits<float>::min());
  return picture / mean.to(picture.scalar_type());
}

// Returns the map of some rows; undefined, with the reason in `fault`, if there is none.
torch::Tensor map_of(const AttentionCall& call, const Pass& pass, const RowGroup& rows,
                     const PictureTokens& where, std::string& fault) {
  const auto tokens = watched_tokens(call, pass, rows, where);
  fault = tokens.fault;
  if (!fault.empty()) return {};
  const bool unfused = call.probabilities.defined();
  const auto queries = pass.select(rows, unfused ? call.probabilities : call.q)
                           .narrow(2, tokens.queries.begin, tokens.queries.count);
  return map_of_picture(unfused ? attention_map(queries)
                                : attention_map(queries, pass.select(rows, call.k), call.scale),
                        tokens.keys);
}

void record_map(const Owner& owner, const AttentionCall& call, const Pass& pass,
                const PictureTokens& where) {
  if (pass.groups.empty()) {
    pass.step->skipped(owner, kUnknownRows);
    return;
  }
  if (call.attn_mask || call.is_causal) {
    pass.step->skipped(owner, "the attention of the site is masked");
    return;
  }
  for (const auto& rows : pass.rows(Branch::uncond)) {
    std::string fault;
    const auto map = map_of(call, pass, rows, where, fault);
    if (!map.defined()) {
      pass.step->skipped(owner, fault);
      return;
    }
    pass.step->record(owner, rows, map);
  }
}

// Brings every recorded map to its place in the latent and averages them per cell, with the weights
// of their predictions. Cells that no map covers stay 0.
torch::Tensor combine_maps(const std::vector<StepContext::Record>& records, const torch::Tensor& x,
                           std::int64_t reduction) {
  const auto& first = records.front();
  const bool plain = records.size() == 1 && !first.rows.area && !first.rows.weight.defined() &&
                     first.rows.count == x.size(0);
  if (plain) return upsample_attention_map(first.map, x.size(2), x.size(3), reduction);

  const auto options = first.map.options();
  auto sum = at::zeros({x.size(0), 1, x.size(2), x.size(3)}, options),
       weights = at::zeros_like(sum);
  for (const auto& [rows, map] : records) {
    const auto area = rows.area.value_or(Area{x.size(2), x.size(3), 0, 0});
    const auto part = [&, &rows = rows](const torch::Tensor& t) {
      return t.narrow(0, rows.image, rows.count)
          .narrow(2, area.y, area.height)
          .narrow(3, area.x, area.width);
    };
    const auto weight = rows.weight.defined() ? rows.weight.to(options) : at::ones({1}, options);
    part(sum).add_(upsample_attention_map(map, area.height, area.width, reduction) * weight);
    part(weights).add_(weight);
  }
  return at::where(weights != 0, sum / weights, 0.0);
}

// Returns what the latest earlier step blurred away; undefined if nothing fits.
torch::Tensor earlier_change(const Owner& owner, const RunContext& run, const StepContext& step,
                             const torch::Tensor& x) {
  const auto change = run.latest_before(owner, step.step_index());
  return change.defined() && change.sizes() == x.sizes() ? change : torch::Tensor();
}

// Returns one-pass SAG's own rows of the main call.
std::optional<EarlyRows> early_rows(const Owner& owner, const SelfAttentionGuidanceOptions& options,
                                    const EarlyArgs& args) {
  if (!records_in(options, args.step) || !guides_step(options, args.step)) return std::nullopt;
  const auto change = earlier_change(owner, args.run, args.step, args.x);
  if (!change.defined()) return std::nullopt;
  const auto x = args.x + args.model_sampling.renoise_scale(args.sigma) * change;
  return EarlyRows{Branch::uncond, owner, x};
}

// Returns the map of this evaluation, [images, 1, height, width]; undefined if there is none, and
// then `args.step` says why.
torch::Tensor recorded_map(const Owner& owner, const PostCfgArgs& args, std::int64_t reduction) {
  const auto records = args.step.records(owner);
  if (records.empty()) args.step.skipped(owner, kSiteDidNotRun);
  if (!args.step.skip_reason(owner).empty()) return {};
  return combine_maps(records, args.x, reduction);
}

torch::Tensor guide_exactly(const Owner& owner, const SelfAttentionGuidanceOptions& options,
                            const PostCfgArgs& args, const torch::Tensor& map) {
  args.step.guided(owner, map > options.threshold);
  return self_attention_guidance(
      args.denoised, args.x, args.uncond_denoised, map,
      [&](const torch::Tensor& x_again) { return args.predict(x_again, Branch::uncond, owner); },
      {.scale = options.scale,
       .blur_sigma = options.blur_sigma,
       .threshold = options.threshold,
       .kernel_size = options.kernel_size,
       .renoise_scale = args.model_sampling.renoise_scale(args.sigma)});
}

// Keeps what this step blurs for the next one, and guides with what an earlier one kept.
torch::Tensor guide_in_one_pass(const Owner& owner, const SelfAttentionGuidanceOptions& options,
                                const PostCfgArgs& args, const torch::Tensor& map) {
  const auto& uncond = args.uncond_denoised;
  const auto earlier = earlier_change(owner, args.run, args.step, args.x);
  const auto degraded = create_blur_map(uncond, map,
                                        {.blur_sigma = options.blur_sigma,
                                         .threshold = options.threshold,
                                         .kernel_size = options.kernel_size});
  args.run.keep(owner, args.step.step_index(), degraded - uncond);
  if (!guides_step(options, args.step)) {
    args.step.skipped(owner, "between guided steps");
    return args.denoised;
  }
  if (!args.early.defined()) return guide_exactly(owner, options, args, map);
  args.step.guided(owner, map > options.threshold);
  return args.denoised + options.scale * (uncond + earlier - args.early);
}

// Returns why SAG does not guide an evaluation, before looking at its map; null if it may.
const char* skip_reason(const SelfAttentionGuidanceOptions& options, const PostCfgArgs& args) {
  if (const auto* reason = idle_reason(options, args.sigma)) return reason;
  const bool guides = guides_step(options, args.step);
  if (!guides && (!options.one_pass || !args.uncond_denoised.defined()))
    return "between guided steps";
  if (!args.uncond_denoised.defined()) return "there is no unconditional prediction at this sigma";
  if (too_small(args.step.height(), args.step.width())) return "a side of the latent is 4 or less";
  return nullptr;
}

torch::Tensor guide(const Owner& owner, const SelfAttentionGuidanceOptions& options,
                    const PostCfgArgs& args) {
  if (const auto* reason = skip_reason(options, args)) {
    args.step.skipped(owner, reason);
    return args.denoised;
  }
  const auto map = recorded_map(owner, args, options.tokens.reduction);
  if (!map.defined()) return args.denoised;
  return options.one_pass ? guide_in_one_pass(owner, options, args, map)
                          : guide_exactly(owner, options, args, map);
}

}  // namespace

ModelPatcher apply_self_attention_guidance(const ModelPatcher& model,
                                           const SelfAttentionGuidanceOptions& given) {
  const auto options = with_sigmas(given, model.model_sampling());
  check_options(options);
  // Tells this SAG's records and rows apart from all others.
  const Owner owner("self_attention_guidance");
  const auto active = [options](const StepContext& step) { return records_in(options, step); };

  auto patched = model.clone();
  patched.set_attn1_replace(
      [owner, tokens = options.tokens](const AttentionCall& call, const Pass& pass,
                                       const NextAttention& next) {
        record_map(owner, call, pass, tokens);
        return next(call);
      },
      options.site, {.active = active, .capturable = true});
  PostCfgOptions post_cfg{.needs_uncond = [options](const StepContext& step) {
    return records_in(options, step) && guides_step(options, step);
  }};
  post_cfg.needs_steps = options.one_pass || options.interval > 1;
  if (options.one_pass)
    post_cfg.early = [owner, options](const EarlyArgs& args) {
      return early_rows(owner, options, args);
    };
  patched.set_post_cfg_function(
      [owner, options](const PostCfgArgs& args) { return guide(owner, options, args); },
      std::move(post_cfg));
  return patched;
}

}  // namespace sag

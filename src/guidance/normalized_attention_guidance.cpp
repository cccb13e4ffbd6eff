#include "sag/normalized_attention_guidance.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "model/conditioning_checks.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_normalized_attention_guidance";

using Options = NormalizedAttentionGuidanceOptions;

// Where a prompt's tokens begin in a context, and how many there are.
struct Part {
  std::int64_t begin = 0, count = 0;
};

bool has_both(const RowGroup& rows) {
  return rows.branch == Branch::cond && rows.context_parts.size() == 2;
}

std::int64_t tokens_of(const RowGroup& rows) {
  return std::accumulate(rows.context_parts.begin(), rows.context_parts.end(), std::int64_t{0});
}

// The part of the positive (0) or the negative (1) prompt; of rows without both, all there is.
Part part_of(const RowGroup& rows, std::size_t prompt) {
  if (!has_both(rows)) return {0, tokens_of(rows)};
  const auto& parts = rows.context_parts;
  return prompt == 0 ? Part{0, parts[0]} : Part{parts[0], parts[1]};
}

// Keys or values of one prompt for all rows, [.., `tokens`, head_dim] in the layout of t. Attention
// does not notice that they are repeated.
torch::Tensor of_prompt(const torch::Tensor& t, const Pass& pass, std::size_t prompt,
                        std::int64_t tokens) {
  auto shape = t.sizes().vec();
  shape[shape.size() - 2] = tokens;
  auto result = at::empty(shape, t.options());
  for (const auto& rows : pass.groups) {
    const auto [begin, count] = part_of(rows, prompt);
    const auto own = pass.select(rows, t).narrow(2, begin, count);
    pass.select(rows, result).copy_(own.repeat({1, 1, tokens / count, 1}));
  }
  return result;
}

AttentionCall with_prompt(const AttentionCall& call, const Pass& pass, std::size_t prompt) {
  std::int64_t tokens = 1;
  for (const auto& rows : pass.groups) tokens = std::lcm(tokens, part_of(rows, prompt).count);
  auto changed = call;
  changed.k = of_prompt(call.k, pass, prompt, tokens);
  changed.v = of_prompt(call.v, pass, prompt, tokens);
  return changed;
}

// Over heads and features, [rows, heads, tokens, head_dim] → [rows, 1, tokens, 1].
torch::Tensor l1_norm(const torch::Tensor& z) {
  return z.abs().sum({1, 3}, /*keepdim=*/true);
}

// min(1, τ·‖Z⁺‖₁ / ‖Z̃‖₁).
torch::Tensor shortened_by(const torch::Tensor& away, const torch::Tensor& positive, double tau) {
  const auto norm = l1_norm(away);
  return at::minimum(norm, tau * l1_norm(positive)) / norm.clamp_min(1e-30);
}

torch::Tensor steered(const torch::Tensor& positive, const torch::Tensor& negative,
                      const Options& options) {
  const auto away = positive + options.scale * (positive - negative);
  const auto normalized = away * shortened_by(away, positive, options.tau);
  return options.alpha * normalized + (1 - options.alpha) * positive;
}

torch::Tensor guide_fused(const Options& options, const AttentionCall& call, const Pass& pass,
                          const NextAttention& next) {
  const auto out = next(with_prompt(call, pass, 0)).clone();
  const auto negative = next(with_prompt(call, pass, 1));
  for (const auto& rows : pass.groups) {
    if (!has_both(rows)) continue;
    const auto z = pass.select(rows, out);
    const auto wide = c10::promoteTypes(z.scalar_type(), torch::kFloat);
    z.copy_(steered(z.to(wide), pass.select(rows, negative).to(wide), options));
  }
  return out;
}

// Softmax over both prompts, cut to one and scaled to a sum of 1 again, is softmax over that one.
torch::Tensor softmax_of_prompt(const torch::Tensor& both, const RowGroup& rows,
                                std::size_t prompt) {
  const auto [begin, count] = part_of(rows, prompt);
  auto one = at::zeros_like(both);
  const auto own = both.narrow(3, begin, count);
  one.narrow(3, begin, count).copy_(own / own.sum(3, /*keepdim=*/true).clamp_min(1e-30));
  return one;
}

// Z is linear in the probabilities but for the norms, so it is the product of v and other
// probabilities, in whatever layout the file makes of it.
torch::Tensor guide_unfused(const Options& options, const AttentionCall& call, const Pass& pass,
                            const NextAttention& next) {
  auto changed = call;
  changed.probabilities = call.probabilities.clone();
  for (const auto& rows : pass.groups) {
    if (!has_both(rows)) continue;
    const auto given = pass.select(rows, changed.probabilities);
    const auto wide = c10::promoteTypes(given.scalar_type(), torch::kFloat);
    const auto both = given.to(wide), v = pass.select(rows, call.v).to(wide);
    const auto plus = softmax_of_prompt(both, rows, 0), minus = softmax_of_prompt(both, rows, 1);
    const auto away = plus + options.scale * (plus - minus);
    const auto shortened = shortened_by(at::matmul(away, v), at::matmul(plus, v), options.tau);
    given.copy_(options.alpha * shortened * away + (1 - options.alpha) * plus);
  }
  return next(changed);
}

void check_unfused(const AttentionCall& call, const Pass& pass) {
  TORCH_CHECK(
      call.probabilities.scalar_type() != torch::kHalf,
      "[normalized_attention_guidance] probabilities of a file that computes attention step "
      "by step must not be in fp16, which loses those of one prompt beside another's: load "
      "it in fp32 or bf16.");
  const auto p = pass.select(pass.groups.front(), call.probabilities),
             v = pass.select(pass.groups.front(), call.v);
  TORCH_CHECK(
      v.size(1) == p.size(1) && v.size(2) == p.size(3) && v.size(3) != p.size(3),
      "[normalized_attention_guidance] the values of a file that computes attention step by "
      "step must be [rows, heads, keys, head_dim] as its probabilities, ",
      p.sizes(), ", got ", v.sizes(), ".");
}

void check_call(const AttentionCall& call, const Pass& pass) {
  TORCH_CHECK(!pass.groups.empty(),
              "[normalized_attention_guidance] calls of a cross-attention must be parts of the "
              "batch, got rows that belong to nobody known.");
  TORCH_CHECK(!call.attn_mask,
              "[normalized_attention_guidance] cross-attention must have no mask, got one.");
  const bool unfused = call.probabilities.defined();
  if (unfused) check_unfused(call, pass);
  const auto keys = unfused ? call.probabilities.size(-1) : call.k.size(-2);
  for (const auto& rows : pass.groups)
    TORCH_CHECK(!rows.context_parts.empty() && keys % tokens_of(rows) == 0,
                "[normalized_attention_guidance] the keys of a cross-attention must be the "
                "context's tokens, ",
                tokens_of(rows), ", got ", keys, ".");
}

torch::Tensor guide_attention(const Owner& at_site, const Options& options,
                              const AttentionCall& call, const Pass& pass,
                              const NextAttention& next) {
  const auto& groups = pass.groups;
  if (!groups.empty() && std::none_of(groups.begin(), groups.end(), has_both)) return next(call);
  check_call(call, pass);
  // Says that the site ran, also when a CUDA graph is replayed.
  for (const auto& rows : groups)
    if (has_both(rows) && rows.owner == Owner::main)
      pass.step->record(at_site, rows, call.v.new_empty({rows.count, 0}, torch::kFloat));
  return call.probabilities.defined() ? guide_unfused(options, call, pass, next)
                                      : guide_fused(options, call, pass, next);
}

// Returns the only negative that is active, or null and why.
const Conditioning* find_negative(const Options& options, const Conditionings& prompts,
                                  double sigma, const char*& reason) {
  std::vector<const Conditioning*> active;
  if (options.negative) active.push_back(&*options.negative);
  if (!options.negative)
    for (const auto& negative : prompts.negative)
      if (is_active(negative, sigma)) active.push_back(&negative);
  if (active.size() != 1) {
    reason = active.empty() ? "there is no negative prompt" : "there are several negative prompts";
    return nullptr;
  }
  const auto* negative = active.front();
  if (negative->area || negative->mask.defined())
    reason = "the negative prompt has an area or a mask";
  else if (!negative->context.defined())
    reason = "the negative prompt has no context";
  else
    return negative;
  return nullptr;
}

// Both contexts, one after the other, for as many images as either has.
void join(Conditioning& positive, const torch::Tensor& negative) {
  const auto& own = positive.context;
  TORCH_CHECK_VALUE(positive.context_parts.empty(),
                    "[normalized_attention_guidance] the prompts must not be joined already, by "
                    "applying it twice or by context_parts of their own.");
  TORCH_CHECK_VALUE(own.size(2) == negative.size(2),
                    "[normalized_attention_guidance] the negative prompt's context must have the "
                    "prompts' width, ",
                    own.size(2), ", got ", negative.size(2), ".");
  const auto images = std::max(own.size(0), negative.size(0));
  const auto has_rows = [images](const torch::Tensor& t) {
    return t.size(0) == 1 || t.size(0) == images;
  };
  TORCH_CHECK_VALUE(has_rows(own) && has_rows(negative),
                    "[normalized_attention_guidance] the negative prompt's context must have 1 row "
                    "or as many as the prompts', ",
                    own.size(0), ", got ", negative.size(0), ".");
  positive.context_parts = {own.size(1), negative.size(1)};
  positive.context = at::cat(
      {own.expand({images, -1, -1}), negative.to(own.options()).expand({images, -1, -1})}, 1);
}

// Returns why it does nothing at `sigma`; null if it may.
const char* idle_reason(const Options& options, double sigma) {
  if (!contains(options.window, sigma)) return kOutsideWindow;
  if (options.scale == 0) return "scale is 0";
  return options.alpha == 0 ? "alpha is 0" : nullptr;
}

Conditionings join_prompts(const Owner& owner, const Options& options, Conditionings prompts,
                           StepContext& step) {
  const char* reason = idle_reason(options, step.sigma());
  const bool conditional = std::any_of(
      prompts.positive.begin(), prompts.positive.end(),
      [&](const auto& cond) { return cond.context.defined() && is_active(cond, step.sigma()); });
  if (!reason && !conditional) reason = "there is no prompt";
  const auto* negative = reason ? nullptr : find_negative(options, prompts, step.sigma(), reason);
  if (!negative) {
    step.skipped(owner, reason);
    return prompts;
  }
  for (auto& positive : prompts.positive)
    if (positive.context.defined()) join(positive, negative->context);
  return prompts;
}

// Where a cross-attention did not tell the prompts apart, the prediction shows both.
void check_ran(const std::vector<Owner>& at_sites, const std::vector<std::string>& sites,
               const StepContext& step) {
  for (std::size_t i = 0; i < sites.size(); ++i) {
    const auto reason = step.skip_reason(at_sites[i]);
    TORCH_CHECK(!step.records(at_sites[i]).empty() && reason.empty(),
                "[normalized_attention_guidance] every cross-attention must run for the rows of "
                "the batch, but \"",
                sites[i],
                "\" did not: ", reason.empty() ? "the model does not reach its hooks" : reason,
                ".");
  }
}

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.scale), "[", kCaller, "] scale must be finite, got ",
                    options.scale, ".");
  TORCH_CHECK_VALUE(options.tau > 0, "[", kCaller, "] tau must be > 0, got ", options.tau, ".");
  TORCH_CHECK_VALUE(options.alpha >= 0 && options.alpha <= 1, "[", kCaller,
                    "] alpha must be in [0, 1], got ", options.alpha, ".");
  if (options.negative) check_conditioning_values(*options.negative, kCaller);
}

}  // namespace

ModelPatcher apply_normalized_attention_guidance(const ModelPatcher& model, const Options& given) {
  auto options = given;
  check_options(options);
  options.window = in_sigmas(options.window, model.model_sampling(), kCaller);
  if (options.negative)
    options.negative = to_device(std::move(*options.negative), model.unet().device());
  const auto infos = model.unet().cross_attention_sites();
  TORCH_CHECK_VALUE(!infos.empty(), "[", kCaller,
                    "] the UNet must list its cross-attentions (UNet::cross_attention_sites), got "
                    "none. ",
                    model.unet().note_on_sites());
  const Owner owner("normalized_attention_guidance");
  const AttentionHookOptions hook_options{
      .active = [options](const StepContext& step) { return !idle_reason(options, step.sigma()); },
      .capturable = true};
  auto patched = model.clone();
  std::vector<std::string> sites;
  std::vector<Owner> at_sites;
  for (const auto& info : infos) {
    sites.push_back(info.path);
    at_sites.emplace_back(owner.name());
    patched.set_attn2_replace(
        [at_site = at_sites.back(), options](const AttentionCall& call, const Pass& pass,
                                             const NextAttention& next) {
          return guide_attention(at_site, options, call, pass, next);
        },
        info.path, hook_options);
  }
  patched.set_conditioning_function([owner, options](Conditionings prompts, StepContext& step) {
    return join_prompts(owner, options, std::move(prompts), step);
  });
  patched.set_post_cfg_function([owner, at_sites, sites](const PostCfgArgs& args) {
    if (!args.step.skip_reason(owner).empty()) return args.denoised;
    check_ran(at_sites, sites, args.step);
    args.step.guided(owner);
    return args.denoised;
  });
  return patched;
}

}  // namespace sag

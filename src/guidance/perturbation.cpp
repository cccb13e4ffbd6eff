#include "perturbation.h"

#include <cmath>
#include <set>
#include <span>
#include <string>

#include <ATen/ops/new_empty.h>

#include "watched_tokens.h"
#include "window.h"

namespace sag {
namespace {

// Returns why it neither perturbs nor guides at `sigma`; null if it may.
const char* idle_reason(const Perturbation& perturbation, double sigma) {
  if (!contains(perturbation.window, sigma)) return kOutsideWindow;
  return perturbation.scale(sigma) == 0 ? "scale is 0" : nullptr;
}

std::vector<RowGroup> rows_of(const Pass& pass, const Owner& owner) {
  auto rows = pass.rows(Branch::cond, owner);
  const auto uncond = pass.rows(Branch::uncond, owner);
  rows.insert(rows.end(), uncond.begin(), uncond.end());
  return rows;
}

torch::Tensor perturb(const Perturbation& perturbation, std::size_t site, const Owner& at_site,
                      const AttentionCall& call, const Pass& pass, const NextAttention& next) {
  if (pass.groups.empty()) {
    pass.step->skipped(perturbation.owner, kUnknownRows);
    return next(call);
  }
  const auto rows = rows_of(pass, perturbation.owner);
  if (rows.empty()) return next(call);
  const bool has_own_rows = call.q.defined() && call.q.size(0) == pass.size();
  if (perturbation.what == Perturbed::blocks &&
      !(has_own_rows && call.q.sizes() == call.v.sizes())) {
    pass.step->skipped(perturbation.owner,
                       "the block does not return tokens of each row, as it is given");
    return next(call);
  }
  // Says that the site ran, also when a CUDA graph is replayed.
  for (const auto& group : rows)
    pass.step->record(at_site, group, call.v.new_empty({group.count, 0}, torch::kFloat));
  return perturbation.perturb({call, pass, rows, site}, next);
}

// Returns the prediction that was perturbed; undefined if there is none, and
// then `args.step` says why.
torch::Tensor perturbed_prediction(const Owner& owner, const std::vector<Owner>& at_sites,
                                   const PostCfgArgs& args) {
  const auto perturbed =
      args.cond_denoised.defined() ? args.early : args.predict(args.x, Branch::uncond, owner);
  for (const auto& at_site : at_sites)
    if (args.step.records(at_site).empty()) args.step.skipped(owner, kSiteDidNotRun);
  return args.step.skip_reason(owner).empty() ? perturbed : torch::Tensor();
}

torch::Tensor guide(const Perturbation& perturbation, const std::vector<Owner>& at_sites,
                    const PostCfgArgs& args) {
  const auto& owner = perturbation.owner;
  if (const auto* reason = idle_reason(perturbation, args.sigma)) {
    args.step.skipped(owner, reason);
    return args.denoised;
  }
  const auto perturbed = perturbed_prediction(owner, at_sites, args);
  if (!perturbed.defined()) return args.denoised;
  args.step.guided(owner);
  const auto& prediction = args.cond_denoised.defined() ? args.cond_denoised : args.uncond_denoised;
  return args.denoised + perturbation.scale(args.sigma) * (prediction - perturbed);
}

// Two names may mean one site.
void check_named_once(const ModelPatcher& patched, std::size_t before, const Owner& owner) {
  std::set<std::string> sites;
  for (const auto& hook : std::span(patched.attention_hooks()).subspan(before))
    TORCH_CHECK_VALUE(hook.site.empty() || sites.insert(hook.site).second, "[", owner.name(),
                      "] each site must be named once, but \"", hook.site, "\" is named twice.");
}

}  // namespace

ModelPatcher guide_by_perturbation(const ModelPatcher& model, const Perturbation& perturbation) {
  const auto active = [perturbation](const StepContext& step) {
    return !idle_reason(perturbation, step.sigma());
  };
  auto patched = model.clone();
  // Tell apart which sites ran: one owner keeps one record for the same rows.
  std::vector<Owner> at_sites;
  for (const auto& site : perturbation.sites) {
    const auto& owner = perturbation.owner;
    const auto index = at_sites.size();
    at_sites.push_back(at_sites.empty() ? owner : Owner(owner.name()));
    const auto hook = [perturbation, index, at_site = at_sites.back()](
                          const AttentionCall& call, const Pass& pass, const NextAttention& next) {
      return perturb(perturbation, index, at_site, call, pass, next);
    };
    const AttentionHookOptions options{.active = active, .capturable = perturbation.capturable};
    if (perturbation.what == Perturbed::blocks)
      patched.set_block_replace(hook, site, options);
    else
      patched.set_attn1_replace(hook, site, options);
  }
  check_named_once(patched, model.attention_hooks().size(), perturbation.owner);
  PostCfgOptions post_cfg;
  post_cfg.early = [perturbation](const EarlyArgs& args) -> std::optional<EarlyRows> {
    if (idle_reason(perturbation, args.sigma)) return std::nullopt;
    return EarlyRows{Branch::cond, perturbation.owner, args.x};
  };
  patched.set_post_cfg_function(
      [perturbation, at_sites](const PostCfgArgs& args) {
        return guide(perturbation, at_sites, args);
      },
      std::move(post_cfg));
  return patched;
}

void check_perturbation(double scale, const std::vector<AttentionSite>& sites, const char* caller) {
  TORCH_CHECK_VALUE(std::isfinite(scale), "[", caller, "] scale must be finite, got ", scale, ".");
  TORCH_CHECK_VALUE(!sites.empty(), "[", caller, "] sites must name at least one, got none.");
}

}  // namespace sag

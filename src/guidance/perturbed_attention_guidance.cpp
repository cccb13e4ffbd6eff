#include "sag/perturbed_attention_guidance.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/ATen.h>

#include "perturbation.h"
#include "token_checks.h"
#include "watched_tokens.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_perturbed_attention_guidance";

// Of a sequence of which nothing is said, all are the picture's, whether they are a grid or not.
WatchedTokens perturbed_tokens(const AttentionCall& call, const Pass& pass, const RowGroup& rows,
                               const PictureTokens& where) {
  if (where != PictureTokens()) return watched_tokens(call, pass, rows, where);
  const bool unfused = call.probabilities.defined();
  const auto q = pass.select(rows, unfused ? call.probabilities : call.q);
  const auto keys = unfused ? q.size(3) : pass.select(rows, call.k).size(2);
  if (q.size(2) != keys) return watched_tokens(call, pass, rows, where);
  return {{0, keys}, {0, keys}};
}

torch::Tensor part_of(const torch::Tensor& t, const TokenRange& range, std::int64_t dim = 2) {
  return t.narrow(dim, range.begin, range.count);
}

// Several heads of q may share one of v.
torch::Tensor for_heads(const torch::Tensor& v, std::int64_t heads) {
  return v.size(1) == heads ? v : v.repeat_interleave(heads / v.size(1), 1);
}

// Each token of the picture attends to itself alone.
torch::Tensor with_identity(const Owner& owner, const PictureTokens& where, const PerturbedRows& at,
                            const NextAttention& next) {
  const auto& [call, pass, groups, site] = at;
  std::vector<WatchedTokens> tokens;
  for (const auto& rows : groups) {
    tokens.push_back(perturbed_tokens(call, pass, rows, where));
    if (tokens.back().fault.empty()) continue;
    pass.step->skipped(owner, tokens.back().fault);
    return next(call);
  }
  // Unfused: the product with v comes after the hook, in whatever layout the file has.
  auto changed = call;
  const bool unfused = call.probabilities.defined();
  if (unfused) changed.probabilities = call.probabilities.clone();
  auto out = unfused ? torch::Tensor() : next(call).clone();
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const auto& [queries, keys, fault] = tokens[i];
    if (unfused) {
      const auto rows = part_of(pass.select(groups[i], changed.probabilities), queries);
      rows.zero_();
      part_of(rows, keys, 3).diagonal(0, 2, 3).fill_(1);
    } else {
      const auto rows = part_of(pass.select(groups[i], out), queries);
      rows.copy_(for_heads(part_of(pass.select(groups[i], call.v), keys), rows.size(1)));
    }
  }
  return unfused ? next(changed) : out;
}

double scale_at(const PerturbedAttentionGuidanceOptions& options, const ModelSampling& sampling,
                double sigma) {
  if (options.adaptive_scale == 0) return options.scale;
  const bool flow = sampling.prediction() == Prediction::flow;
  const auto steps = flow ? sampling.timestep(1.0) : static_cast<double>(sampling.sigmas().size());
  const auto t = 1000 * sampling.timestep(sigma) / steps;
  return std::max(0.0, options.scale - options.adaptive_scale * (1000 - t));
}

void check_options(const PerturbedAttentionGuidanceOptions& options,
                   const ModelSampling& sampling) {
  check_perturbation(options.scale, options.sites, kCaller);
  check_picture_tokens(options.tokens, kCaller);
  TORCH_CHECK_VALUE(std::isfinite(options.adaptive_scale) && options.adaptive_scale >= 0, "[",
                    kCaller, "] adaptive_scale must be finite and at least 0, got ",
                    options.adaptive_scale, ".");
  TORCH_CHECK_VALUE(options.adaptive_scale == 0 || sampling.prediction() != Prediction::edm, "[",
                    kCaller,
                    "] adaptive_scale must be 0 for EDM models, which have no timesteps, got ",
                    options.adaptive_scale, ".");
}

}  // namespace

ModelPatcher apply_perturbed_attention_guidance(const ModelPatcher& model,
                                                const PerturbedAttentionGuidanceOptions& options) {
  const auto& sampling = model.model_sampling();
  check_options(options, sampling);
  const Owner owner("perturbed_attention_guidance");
  return guide_by_perturbation(
      model,
      {.owner = owner,
       .sites = options.sites,
       .perturb = [owner, where = options.tokens](
                      const PerturbedRows& at,
                      const NextAttention& next) { return with_identity(owner, where, at, next); },
       .scale = [options, sampling](double sigma) { return scale_at(options, sampling, sigma); },
       .window = in_sigmas(options.window, sampling, kCaller)});
}

}  // namespace sag

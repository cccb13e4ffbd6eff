#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/guidance_window.h"
#include "sag/model_patcher.h"

namespace sag {

/// Rows of a call that are to be perturbed.
struct PerturbedRows {
  const AttentionCall& call;
  const Pass& pass;
  std::span<const RowGroup> rows;
  /// Which of the perturbation's sites.
  std::size_t site = 0;
};

/// Changes what an attention or a block returns for some rows of its pass. Returns the output of
/// all rows, or, where it cannot, `next(call)` after it has noted why with `pass.step->skipped`.
using PerturbRows =
    std::function<torch::Tensor(const PerturbedRows& at, const NextAttention& next)>;

/// What is perturbed.
enum class Perturbed { self_attentions, blocks };

/// A guidance that steers away from what the model predicts when a part of it is perturbed.
struct Perturbation {
  /// Of the perturbed rows.
  Owner owner;
  Perturbed what = Perturbed::self_attentions;
  /// Which; at least one.
  std::vector<AttentionSite> sites;
  PerturbRows perturb;
  /// How strongly to steer at a noise level; 0: not at all.
  std::function<double(double sigma)> scale;
  /// In sigmas.
  GuidanceWindow window;
  /// See AttentionHookOptions.
  bool capturable = true;
};

/// Returns a clone of `model` with
///
///     denoised + scale(σ) · (cond_denoised − the same, perturbed)
///
/// The perturbed rows are part of the main UNet call. Where nothing is conditional, the
/// unconditional prediction takes the conditional one's place, and its perturbed rows have a call
/// of their own.
ModelPatcher guide_by_perturbation(const ModelPatcher& model, const Perturbation& perturbation);

/// Throws ValueError, naming `caller`, on a scale that is not finite and where no site is given.
void check_perturbation(double scale, const std::vector<AttentionSite>& sites, const char* caller);

}  // namespace sag

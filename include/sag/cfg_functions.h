#pragma once

#include <functional>
#include <optional>
#include <vector>

#include <torch/types.h>

#include "sag/conditioning.h"
#include "sag/model_sampling.h"
#include "sag/pass.h"
#include "sag/run_context.h"
#include "sag/step_context.h"

namespace sag {

/// The prompts of an evaluation, also those that are not active at its sigma.
struct Conditionings {
  /// Of the conditional prediction.
  std::vector<Conditioning> positive;
  /// Of the unconditional one.
  std::vector<Conditioning> negative;
};
/// Returns the prompts of an evaluation, changed or not. What it cannot change it leaves, and notes
/// why in `step`. The guider moves what it returns to the UNet's device, and throws ValueError on
/// contexts or y of different widths and when nothing is active; values are not checked.
using ConditioningFunction = std::function<Conditionings(Conditionings, StepContext& step)>;

/// The predictions that go into the CFG formula, [images, channels, height, width] each.
/// An undefined tensor was not evaluated: no such conditioning, none active, or not needed.
struct CfgArgs {
  /// The conditional prediction.
  torch::Tensor cond_denoised;
  /// The unconditional prediction.
  torch::Tensor uncond_denoised;
  /// The scale of CFG.
  double cond_scale = 1.0;
  /// The noisy latent.
  torch::Tensor x;
  /// Its noise level.
  double sigma = 0.0;
  /// What belongs to this evaluation.
  StepContext& step;
};

/// The two predictions that a pre-CFG function returns.
struct CfgPredictions {
  /// The conditional prediction.
  torch::Tensor cond_denoised;
  /// The unconditional prediction.
  torch::Tensor uncond_denoised;
};
/// Returns both predictions, changed or not, before they enter the CFG formula.
using PreCfgFunction = std::function<CfgPredictions(const CfgArgs&)>;

/// Returns the denoised latent instead of uncond + (cond − uncond)·cond_scale. Called only if both
/// predictions exist. (ComfyUI's returns x − denoised; this one returns denoised.)
using CfgFunction = std::function<torch::Tensor(const CfgArgs&)>;

/// What a post-CFG function gets. The predictions are those that entered the CFG formula. Tensors
/// may share memory: make new ones instead of writing to these.
struct PostCfgArgs {
  /// The CFG result, or what the previous post-CFG function returned.
  torch::Tensor denoised;
  /// The conditional prediction; undefined: not evaluated.
  torch::Tensor cond_denoised;
  /// The unconditional prediction; undefined: not evaluated.
  torch::Tensor uncond_denoised;
  /// The scale of CFG.
  double cond_scale = 1.0;
  /// The noisy latent.
  torch::Tensor x;
  /// Its noise level.
  double sigma = 0.0;
  /// What the model predicts, and its noise levels.
  const ModelSampling& model_sampling;
  /// What belongs to this evaluation.
  StepContext& step;
  /// What is kept from step to step.
  RunContext& run;
  /// Evaluates a branch once more, at another x of the same shape, in a pass whose rows belong to
  /// `owner`, which must be named. Returns the branch's denoised prediction; undefined if it has no
  /// conditioning active at this sigma.
  std::function<torch::Tensor(const torch::Tensor& x, Branch branch, const Owner& owner)> predict;
  /// The prediction of the rows that `PostCfgOptions::early` asked for. Undefined if it asked for
  /// none or the branch has no conditioning active at this sigma.
  torch::Tensor early = {};
};
/// Returns the denoised latent that takes the place of `PostCfgArgs::denoised`.
using PostCfgFunction = std::function<torch::Tensor(const PostCfgArgs&)>;

/// What is known before the main call of an evaluation.
struct EarlyArgs {
  /// The noisy latent.
  torch::Tensor x;
  /// Its noise level.
  double sigma = 0.0;
  /// What the model predicts, and its noise levels.
  const ModelSampling& model_sampling;
  /// What belongs to this evaluation.
  const StepContext& step;
  /// What is kept from step to step.
  const RunContext& run;
};

/// Rows to evaluate together with the main ones: a branch at another x of the same shape.
struct EarlyRows {
  /// Which prompts.
  Branch branch = Branch::uncond;
  /// Must be named: the main pass already has its rows.
  Owner owner;
  /// Where to evaluate it.
  torch::Tensor x;
};

/// What a post-CFG function needs.
struct PostCfgOptions {
  /// Returns whether the function needs `uncond_denoised` in this evaluation, even at cond_scale 1.
  /// Its sigma, step and latent size are known; nothing is recorded yet. Empty: never. (ComfyUI:
  /// `disable_cfg1_optimization`, which cannot be switched off again.)
  std::function<bool(const StepContext& step)> needs_uncond = {};
  /// True if the function depends on the step: the guider then requires `begin_run`.
  bool needs_steps = false;
  /// Asks for rows in the main call, where they cost less than in a call of their own. Empty, or
  /// returning nullopt: none.
  std::function<std::optional<EarlyRows>(const EarlyArgs&)> early = {};
};

/// A post-CFG function and its options.
struct InstalledPostCfg {
  /// The function.
  PostCfgFunction function;
  /// What it needs.
  PostCfgOptions options;
};

}  // namespace sag

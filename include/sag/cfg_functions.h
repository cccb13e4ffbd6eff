#pragma once

#include <functional>
#include <optional>

#include <torch/types.h>

#include "sag/model_sampling.h"
#include "sag/pass.h"
#include "sag/run_context.h"
#include "sag/step_context.h"

namespace sag {

/// The predictions that go into the CFG formula, [images, channels, height, width] each.
/// An undefined tensor was not evaluated: no such conditioning, none active, or not needed.
struct CfgArgs {
  torch::Tensor cond_denoised, uncond_denoised;
  double cond_scale = 1.0;
  torch::Tensor x;
  double sigma = 0.0;
  StepContext& step;
};

/// The two predictions that a pre-CFG function returns.
struct CfgPredictions {
  torch::Tensor cond_denoised, uncond_denoised;
};
using PreCfgFunction = std::function<CfgPredictions(const CfgArgs&)>;

/// Returns the denoised latent instead of uncond + (cond − uncond)·cond_scale. Called only if both
/// predictions exist. (ComfyUI's returns x − denoised; this one returns denoised.)
using CfgFunction = std::function<torch::Tensor(const CfgArgs&)>;

/// What a post-CFG function gets. The predictions are those that entered the CFG formula. Tensors
/// may share memory: make new ones instead of writing to these.
struct PostCfgArgs {
  /// The CFG result, or what the previous post-CFG function returned.
  torch::Tensor denoised;
  /// Undefined: not evaluated.
  torch::Tensor cond_denoised, uncond_denoised;
  double cond_scale = 1.0;
  torch::Tensor x;
  double sigma = 0.0;
  const ModelSampling& model_sampling;
  StepContext& step;
  RunContext& run;
  /// Evaluates a branch once more, at another x of the same shape, in a pass whose rows belong to
  /// `owner`, which must be named. Returns the branch's denoised prediction; undefined if it has no
  /// conditioning active at this sigma.
  std::function<torch::Tensor(const torch::Tensor& x, Branch branch, const Owner& owner)> predict;
  /// The prediction of the rows that `PostCfgOptions::early` asked for. Undefined if it asked for
  /// none or the branch has no conditioning active at this sigma.
  torch::Tensor early = {};
};
using PostCfgFunction = std::function<torch::Tensor(const PostCfgArgs&)>;

/// What is known before the main call of an evaluation.
struct EarlyArgs {
  torch::Tensor x;
  double sigma = 0.0;
  const ModelSampling& model_sampling;
  const StepContext& step;
  const RunContext& run;
};

/// Rows to evaluate together with the main ones: a branch at another x of the same shape.
struct EarlyRows {
  Branch branch = Branch::uncond;
  /// Must be named: the main pass already has its rows.
  Owner owner;
  torch::Tensor x;
};

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
  PostCfgFunction function;
  PostCfgOptions options;
};

}  // namespace sag

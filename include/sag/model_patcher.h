#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include <torch/types.h>

#include "sag/attention.h"
#include "sag/denoiser.h"
#include "sag/export.h"
#include "sag/pass.h"
#include "sag/step_context.h"

namespace sag {

/// What guidances keep from step to step within one run (one `CfgGuider`). Keyed by step, not by
/// evaluation: Heun and others evaluate a step twice.
class SAG_API RunContext {
 public:
  /// Keeps `value` for the guidance `owner`, made in step `step_index`. It replaces
  /// what that step kept, and three steps stay: samplers look up to two ahead. What was kept of
  /// steps still further ahead goes, for then a new run has begun (of runs that begin later than
  /// the one before ended, that cannot be told: one context, one run).
  void keep(const Owner& owner, std::int64_t step_index, torch::Tensor value);
  /// Returns the value of the latest step before `step_index`; undefined if there is none.
  torch::Tensor latest_before(const Owner& owner, std::int64_t step_index) const;

 private:
  struct Kept {
    Owner owner;
    std::int64_t step_index;
    torch::Tensor value;
  };
  std::vector<Kept> kept_;
};

/// The predictions that go into the CFG formula, [images, channels, height, width] each.
/// An undefined tensor was not evaluated: no such conditioning, none active, or not needed.
struct CfgArgs {
  torch::Tensor cond_denoised, uncond_denoised;
  double cond_scale = 1.0;
  torch::Tensor x;
  double sigma = 0.0;
  StepContext& step;
};

/// The two predictions, as a pre-CFG function hands them on.
struct CfgPredictions {
  torch::Tensor cond_denoised, uncond_denoised;
};
using PreCfgFunction = std::function<CfgPredictions(const CfgArgs&)>;

/// Returns the denoised latent in place of uncond + (cond − uncond)·cond_scale. Called only with
/// both predictions. (ComfyUI's returns x − denoised; this one returns denoised.)
using CfgFunction = std::function<torch::Tensor(const CfgArgs&)>;

/// What a post-CFG function gets. The predictions are those that entered the CFG formula. Tensors
/// may share memory: make new ones instead of writing to these.
struct PostCfgArgs {
  /// The CFG result, or what the previous post-CFG function made of it.
  torch::Tensor denoised;
  torch::Tensor cond_denoised, uncond_denoised;  ///< undefined: not evaluated
  double cond_scale = 1.0;
  torch::Tensor x;
  double sigma = 0.0;
  const ModelSampling& model_sampling;
  StepContext& step;
  RunContext& run;
  /// Evaluates a branch once more, at another x of the same shape, in a pass whose rows belong to
  /// `owner`, which must be a named one. Returns the branch's denoised prediction; undefined if it
  /// has no conditioning active at this sigma.
  std::function<torch::Tensor(const torch::Tensor& x, Branch branch, const Owner& owner)> predict;
  /// The prediction of the rows that `PostCfgOptions::early` asked for; undefined: it did not, or
  /// the branch has no conditioning active at this sigma.
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
  Owner owner;  ///< must be named: the main pass has its rows already
  torch::Tensor x;
};

struct PostCfgOptions {
  /// Whether the function needs `uncond_denoised` in this evaluation (its sigma, step and latent
  /// size are known, nothing is recorded yet), also where cond_scale 1 does not. Empty: never.
  /// (ComfyUI: `disable_cfg1_optimization`, which cannot be switched off again.)
  std::function<bool(const StepContext& step)> needs_uncond = {};
  /// True if the function depends on the step: the guider then insists on the run's sigmas.
  bool needs_steps = false;
  /// Asks for rows in the main call, where they cost less than in a call of their own. Empty, or
  /// nothing returned: none.
  std::function<std::optional<EarlyRows>(const EarlyArgs&)> early = {};
};

/// A post-CFG function in its place.
struct InstalledPostCfg {
  PostCfgFunction function;
  PostCfgOptions options;
};

/// A model and what has been patched onto it. Copies share the weights and own their patches:
/// patching one never shows in another. A patched model is read-only while it is used, so one may
/// serve several threads. ComfyUI: `ModelPatcher`.
class SAG_API ModelPatcher {
 public:
  ModelPatcher(std::shared_ptr<const UNet> unet, ModelSampling sampling);

  /// Returns a copy with its own patches.
  ModelPatcher clone() const { return *this; }

  /// Appends `hook` to the chain of a self-attention; the first installed is outermost.
  /// Throws ValueError, with the list of sites, when the UNet has no such site. ComfyUI:
  /// `set_model_attn1_replace`, which holds one hook a site.
  ModelPatcher& set_attn1_replace(AttentionHook hook, const AttentionSite& site,
                                  AttentionHookOptions options = {});
  /// Appends a function that sees and may change both predictions before CFG.
  ModelPatcher& set_pre_cfg_function(PreCfgFunction function);
  /// Sets the CFG formula; the last one set counts.
  ModelPatcher& set_cfg_function(CfgFunction function);
  /// Appends a function that sees and may change the CFG result.
  ModelPatcher& set_post_cfg_function(PostCfgFunction function, PostCfgOptions options = {});

  const Denoiser& denoiser() const { return denoiser_; }
  const UNet& unet() const { return denoiser_.unet(); }
  const ModelSampling& model_sampling() const { return denoiser_.model_sampling(); }
  const std::vector<InstalledHook>& attention_hooks() const { return hooks_; }
  const std::vector<PreCfgFunction>& pre_cfg_functions() const { return pre_cfg_; }
  const CfgFunction& cfg_function() const { return cfg_; }
  const std::vector<InstalledPostCfg>& post_cfg_functions() const { return post_cfg_; }

 private:
  Denoiser denoiser_;
  std::vector<InstalledHook> hooks_;
  std::vector<PreCfgFunction> pre_cfg_;
  CfgFunction cfg_;
  std::vector<InstalledPostCfg> post_cfg_;
};

}  // namespace sag

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/attention_hook.h"
#include "sag/cfg_functions.h"
#include "sag/conditioning.h"
#include "sag/denoiser.h"
#include "sag/export.h"
#include "sag/unet.h"

namespace sag {

/// A model and what has been patched onto it. Copies share the weights and own their patches:
/// patching one never affects another. A patched model is read-only while it is used, so several
/// threads may share one. ComfyUI: `ModelPatcher`.
class SAG_API ModelPatcher {
 public:
  /// A model without patches. Throws ValueError when `unet` is null.
  ModelPatcher(std::shared_ptr<const UNet> unet, ModelSampling sampling);

  /// Returns a copy with its own patches.
  ModelPatcher clone() const { return *this; }

  /// Appends `hook` to the chain of a self-attention; the first installed is outermost. It does not
  /// replace other hooks, and it replaces the attention itself only if it does not call `next`.
  /// "middle" is found by names (`find_middle_attention`) or, where names do not decide, by
  /// `decide_sites`. Throws ValueError, with the list of sites, when the UNet has no such site.
  /// ComfyUI: `set_model_attn1_replace`, which holds one hook per site.
  ModelPatcher& set_attn1_replace(AttentionHook hook, const AttentionSite& site,
                                  AttentionHookOptions options = {});
  /// Appends `hook` to the chain of a cross-attention, by the same rules; its name is that of the
  /// self-attention beside it ("middle.0.0", of which "middle" is short), its path or "#ordinal".
  /// Throws ValueError, with the list of cross-attentions, when the UNet has no such site. ComfyUI:
  /// `set_model_attn2_replace`.
  ModelPatcher& set_attn2_replace(AttentionHook hook, const AttentionSite& site,
                                  AttentionHookOptions options = {});
  /// Appends `hook` to the chain of a transformer block (`AttentionCall` says what it gets), by the
  /// same rules; its name is that of its first self-attention ("middle.0.0", of which "middle" is
  /// short), or its path. Throws ValueError, with the list of blocks, when the UNet has no such
  /// block. ComfyUI: `set_model_patch_replace` with "dit", which UNets do not have.
  ModelPatcher& set_block_replace(AttentionHook hook, const AttentionSite& block,
                                  AttentionHookOptions options = {});
  /// Appends a function that sees and may change the prompts of an evaluation before the UNet runs.
  ModelPatcher& set_conditioning_function(ConditioningFunction function);
  /// Appends a function that sees and may change both predictions before CFG.
  ModelPatcher& set_pre_cfg_function(PreCfgFunction function);
  /// Sets the CFG formula; the last one set is used.
  ModelPatcher& set_cfg_function(CfgFunction function);
  /// Appends a function that sees and may change the CFG result.
  ModelPatcher& set_post_cfg_function(PostCfgFunction function, PostCfgOptions options = {});

  /// Decides the sites that names leave open, by running the UNet once on the first image of x
  /// (`probe_attention_sites`). Returns the number of UNet calls: 0 if nothing was open. A
  /// `CfgGuider` does it when an active hook first needs it. Throws ValueError when the probe does
  /// not decide either.
  std::int64_t decide_sites(const torch::Tensor& x, double sigma, const Conditioning& cond);
  /// Returns what was chosen for each hook on a self-attention, and why, in the order in which the
  /// hooks were set.
  const std::vector<SiteChoice>& site_choices() const { return choices_; }

  /// Returns the network with its sampling constants.
  const Denoiser& denoiser() const { return denoiser_; }
  /// Returns the network.
  const UNet& unet() const { return denoiser_.unet(); }
  /// Returns its sampling constants.
  const ModelSampling& model_sampling() const { return denoiser_.model_sampling(); }
  /// Returns the hooks of all sites, in the order in which they were set.
  const std::vector<InstalledHook>& attention_hooks() const { return hooks_; }
  /// Returns the functions that change prompts, in order.
  const std::vector<ConditioningFunction>& conditioning_functions() const { return conditioning_; }
  /// Returns the functions before CFG, in order.
  const std::vector<PreCfgFunction>& pre_cfg_functions() const { return pre_cfg_; }
  /// Returns the CFG formula; empty: the usual one.
  const CfgFunction& cfg_function() const { return cfg_; }
  /// Returns the functions after CFG, in order.
  const std::vector<InstalledPostCfg>& post_cfg_functions() const { return post_cfg_; }

 private:
  ModelPatcher& add_hook(std::string site, AttentionHook hook, AttentionHookOptions options,
                         const char* caller);

  Denoiser denoiser_;
  std::vector<InstalledHook> hooks_;
  std::vector<SiteChoice> choices_;
  std::vector<ConditioningFunction> conditioning_;
  std::vector<PreCfgFunction> pre_cfg_;
  CfgFunction cfg_;
  std::vector<InstalledPostCfg> post_cfg_;
};

}  // namespace sag

#include "sag/model_patcher.h"

#include <algorithm>
#include <utility>

namespace sag {

void RunContext::keep(const Owner& owner, std::int64_t step_index, torch::Tensor value) {
  const auto own = [&](const Kept& kept) { return kept.owner == owner; };
  // What lies further ahead than samplers look is of a run before this one.
  std::erase_if(kept_, [&](const Kept& kept) {
    return own(kept) && (kept.step_index == step_index || kept.step_index > step_index + 2);
  });
  kept_.push_back({owner, step_index, std::move(value)});
  if (std::count_if(kept_.begin(), kept_.end(), own) > 3)
    kept_.erase(std::min_element(kept_.begin(), kept_.end(), [&](const Kept& a, const Kept& b) {
      return own(a) && (!own(b) || a.step_index < b.step_index);
    }));
}

torch::Tensor RunContext::latest_before(const Owner& owner, std::int64_t step_index) const {
  const Kept* latest = nullptr;
  for (const auto& kept : kept_)
    if (kept.owner == owner && kept.step_index < step_index &&
        (!latest || kept.step_index > latest->step_index))
      latest = &kept;
  return latest ? latest->value : torch::Tensor();
}

ModelPatcher::ModelPatcher(std::shared_ptr<const UNet> unet, ModelSampling sampling)
    : denoiser_(std::move(unet), std::move(sampling)) {}

ModelPatcher& ModelPatcher::set_attn1_replace(AttentionHook hook, const AttentionSite& site,
                                              AttentionHookOptions options) {
  TORCH_CHECK_VALUE(hook, "[ModelPatcher::set_attn1_replace] hook must not be empty.");
  hooks_.push_back({resolve_attention_site(unet(), site), std::move(hook), std::move(options),
                    std::make_shared<const char>()});
  return *this;
}

ModelPatcher& ModelPatcher::set_pre_cfg_function(PreCfgFunction function) {
  TORCH_CHECK_VALUE(function, "[ModelPatcher::set_pre_cfg_function] function must not be empty.");
  pre_cfg_.push_back(std::move(function));
  return *this;
}

ModelPatcher& ModelPatcher::set_cfg_function(CfgFunction function) {
  TORCH_CHECK_VALUE(function, "[ModelPatcher::set_cfg_function] function must not be empty.");
  cfg_ = std::move(function);
  return *this;
}

ModelPatcher& ModelPatcher::set_post_cfg_function(PostCfgFunction function,
                                                  PostCfgOptions options) {
  TORCH_CHECK_VALUE(function, "[ModelPatcher::set_post_cfg_function] function must not be empty.");
  post_cfg_.push_back({std::move(function), std::move(options)});
  return *this;
}

}  // namespace sag

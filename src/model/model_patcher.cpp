#include "sag/model_patcher.h"

#include <algorithm>
#include <utility>

#include "latent.h"
#include "site_list.h"

namespace sag {

namespace {

// What the conditioning gives the UNet for the first image of a batch.
Conditioning of_first_image(const Conditioning& cond) {
  // What has no rows is left to the check of conditionings.
  const auto first = [](const torch::Tensor& t) {
    return t.defined() && t.dim() > 0 && t.size(0) > 0 ? t.narrow(0, 0, 1) : t;
  };
  Conditioning one{
      .context = first(cond.context), .y = first(cond.y), .concat = first(cond.concat)};
  for (const auto& [name, t] : cond.extra) one.extra[name] = first(t);
  return one;
}

}  // namespace

ModelPatcher::ModelPatcher(std::shared_ptr<const UNet> unet, ModelSampling sampling)
    : denoiser_(std::move(unet), std::move(sampling)) {}

ModelPatcher& ModelPatcher::add_hook(std::string site, AttentionHook hook,
                                     AttentionHookOptions options, const char* caller) {
  TORCH_CHECK_VALUE(hook, "[", caller, "] hook must not be empty.");
  hooks_.push_back(
      {std::move(site), std::move(hook), std::move(options), std::make_shared<const char>()});
  return *this;
}

ModelPatcher& ModelPatcher::set_attn1_replace(AttentionHook hook, const AttentionSite& site,
                                              AttentionHookOptions options) {
  auto choice = choose_site(unet(), site);
  add_hook(choice.site, std::move(hook), std::move(options), "ModelPatcher::set_attn1_replace");
  choices_.push_back(std::move(choice));
  return *this;
}

ModelPatcher& ModelPatcher::set_attn2_replace(AttentionHook hook, const AttentionSite& site,
                                              AttentionHookOptions options) {
  return add_hook(choose_cross_site(unet(), site), std::move(hook), std::move(options),
                  "ModelPatcher::set_attn2_replace");
}

ModelPatcher& ModelPatcher::set_block_replace(AttentionHook hook, const AttentionSite& block,
                                              AttentionHookOptions options) {
  return add_hook(choose_block(unet(), block), std::move(hook), std::move(options),
                  "ModelPatcher::set_block_replace");
}

ModelPatcher& ModelPatcher::set_conditioning_function(ConditioningFunction function) {
  TORCH_CHECK_VALUE(function,
                    "[ModelPatcher::set_conditioning_function] function must not be empty.");
  conditioning_.push_back(std::move(function));
  return *this;
}

std::int64_t ModelPatcher::decide_sites(const torch::Tensor& x, double sigma,
                                        const Conditioning& cond) {
  const auto is_open = [](const SiteChoice& choice) { return choice.site.empty(); };
  if (std::none_of(choices_.begin(), choices_.end(), is_open)) return 0;
  check_latent(x, "x", "ModelPatcher::decide_sites");
  const torch::NoGradGuard no_grad;
  const auto input = denoiser_.unet_input(x.narrow(0, 0, 1), sigma, of_first_image(cond));
  const auto choice = find_middle_attention(probe_attention_sites(unet(), input));
  std::replace_if(choices_.begin(), choices_.end(), is_open, choice);
  for (auto& hook : hooks_)
    if (hook.site.empty()) hook.site = choice.site;
  return 1;
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

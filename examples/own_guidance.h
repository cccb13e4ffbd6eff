#pragma once

#include <sag/sag.h>

// Steers away from what the model predicts where every token attends to all others alike.
inline sag::ModelPatcher apply_uniform_attention_guidance(const sag::ModelPatcher& model,
                                                          double scale) {
  const sag::Owner owner("uniform_attention_guidance");
  auto patched = model.clone();
  // In this guidance's rows, and in no others, attention returns the mean of v.
  patched.set_attn1_replace(
      [owner](const sag::AttentionCall& call, const sag::Pass& pass,
              const sag::NextAttention& next) {
        const auto out = next(call).clone();
        for (const auto& rows : pass.rows(sag::Branch::cond, owner)) {
          const auto mean = pass.select(rows, call.v).mean(2, /*keepdim=*/true);
          pass.select(rows, out).copy_(mean.expand_as(pass.select(rows, out)));
        }
        return out;
      },
      "middle", {.capturable = true});
  // The rows are part of the main UNet call; the result then moves away from their prediction.
  patched.set_post_cfg_function(
      [owner, scale](const sag::PostCfgArgs& args) {
        if (!args.early.defined()) {
          args.step.skipped(owner, "there is no conditional prediction");
          return args.denoised;
        }
        args.step.guided(owner);
        return args.denoised + scale * (args.cond_denoised - args.early);
      },
      {.early = [owner](const sag::EarlyArgs& args) -> std::optional<sag::EarlyRows> {
        return sag::EarlyRows{sag::Branch::cond, owner, args.x};
      }});
  return patched;
}

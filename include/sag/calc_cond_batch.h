#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <torch/types.h>

#include "sag/conditioning.h"
#include "sag/export.h"
#include "sag/model_patcher.h"
#include "sag/pass.h"
#include "sag/step_context.h"

namespace sag {

/// One prediction to make: a branch's conditionings at one x.
struct CondRequest {
  /// What its rows are labelled with.
  Branch branch = Branch::cond;
  /// Who asked for it.
  Owner owner = {};
  /// [images, channels, height, width]
  torch::Tensor x = {};
  /// What it is conditioned on. Empty: the prediction is undefined.
  std::vector<Conditioning> conds = {};
};

/// How predictions share UNet calls.
struct CalcCondBatchOptions {
  /// The most rows in one UNet call; 0: no limit but the UNet's own. The limit changes memory and
  /// speed, never the result (except for the rounding of another batch size).
  std::int64_t max_rows = 0;
};

/// What `calc_cond_batch` did.
struct CondBatch {
  /// One denoised latent per request, fp32 (fp64 for fp64 x); undefined where no conditioning is
  /// active at sigma.
  std::vector<torch::Tensor> denoised;
  /// How often the UNet was called.
  std::int64_t unet_calls = 0;
  /// How many rows it evaluated in all calls together.
  std::int64_t unet_rows = 0;
  /// How many of them only filled calls up (`UNet::evaluated_rows`).
  std::int64_t filler_rows = 0;
};

/// Evaluates several predictions in as few UNet calls as possible, under the model's attention
/// hooks. Rows can share a call if they have the same size, and tensors of the same shapes.
/// Contexts of different lengths are repeated to a common one where the sites have the names of
/// LDM's or diffusers' UNets, in which only cross-attention reads them; else each length takes a
/// call. Conditionings of one request are averaged per latent cell by strength and mask; areas have
/// a feathered edge of up to 8 cells. Rows keep the order of requests, conditionings and images.
///
/// Throws ValueError or TypeError when a conditioning does not fit x, and when the site of a hook
/// has not been decided; rethrows what a hook threw. ComfyUI: `calc_cond_batch`,
/// `get_area_and_mult`.
SAG_API CondBatch calc_cond_batch(const ModelPatcher& model, std::span<const CondRequest> requests,
                                  double sigma, StepContext& step,
                                  const CalcCondBatchOptions& options = {});

}  // namespace sag

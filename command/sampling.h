#pragma once

#include <functional>
#include <vector>

#include <torch/types.h>

#include "inputs.h"
#include "progress.h"
#include "report.h"
#include "sag/model_patcher.h"
#include "settings.h"

namespace sag_sample {

/// What came of a batch.
struct Sampled {
  torch::Tensor latents;  ///< [images, channels, height, width] fp32 on the CPU
  torch::Tensor
      heat;  ///< [images, 1, height, width], share of guided steps that masked; or undefined
  RunReport report = {};
};

/// How long one sampling of the batch takes, compared with others.
double work(const Inputs& inputs, const Batch& batch, bool guided);

/// Samples a batch. `guided`: whether `model` has self-attention guidance. Throws RunError when the
/// user interrupts it.
Sampled sample_batch(const sag::ModelPatcher& model, bool guided, const Settings& settings,
                     const Options& options, const Inputs& inputs, const Batch& batch,
                     Progress& progress);

}  // namespace sag_sample

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <torch/types.h>

#include "inputs.h"
#include "progress.h"
#include "report.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"
#include "sag/sample.h"

namespace sag_sample {

/// A model with what guides it.
struct GuidedModel {
  sag::ModelPatcher model;
  /// The guidances' names in the library's reports, in the order in which they were applied.
  std::vector<std::string> guidances = {};
};

/// How every batch is sampled.
struct SamplingPlan {
  /// Without the batch's own tensors and seeds.
  sag::SampleOptions options = {};
  std::int64_t max_rows = 0;
  sag::GuidanceWindow cfg_window = {};
  double latent_scale = 1.0;
  /// The noise levels of the run.
  std::vector<double> sigmas = {};

  std::size_t steps() const { return sigmas.size() - 1; }
};

/// What came of all batches.
struct Sampled {
  /// [images, channels, height, width] fp32 on the CPU, in the order of the pictures.
  torch::Tensor latents = {};
  /// By guidance: [images, 1, height, width], the share of guided steps that masked a place.
  std::map<std::string, torch::Tensor> masks = {};
  std::vector<RunReport> runs = {};
};

/// How long sampling these batches takes, compared with others.
double work(const GuidedModel& model, const std::vector<Batch>& batches);

/// Samples every batch. Throws RunError when the user interrupts it.
Sampled sample_batches(const GuidedModel& model, const std::vector<Batch>& batches,
                       const SamplingPlan& plan, Progress& progress);

}  // namespace sag_sample

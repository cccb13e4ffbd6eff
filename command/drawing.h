#pragma once

#include <string>

#include <torch/types.h>

#include "inputs.h"
#include "options.h"
#include "picture/image.h"
#include "settings.h"

namespace sag_sample {

/// Pictures as tensors [images, 1 or 3, height, width] in [−1, 1], in the order of the inputs.
struct Drawn {
  torch::Tensor guided;    ///< or unguided, if there is nothing to compare
  torch::Tensor unguided;  ///< only to compare
  torch::Tensor heat;  ///< [images, 1, height, width] of the latent; undefined: nothing was masked
};

/// Returns what --out shows: the picture if there is one, else a labelled sheet.
Image draw(const Drawn& drawn, const Options& options, const Settings& settings,
           const Inputs& inputs);

/// Returns the line below the sheet: how it was sampled.
std::string describe_run(const Options& options, const Settings& settings, const Inputs& inputs);

}  // namespace sag_sample

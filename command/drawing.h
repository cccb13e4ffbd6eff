#pragma once

#include <string>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "inputs.h"
#include "options.h"
#include "picture/image.h"

namespace sag_sample {

/// Pictures as tensors [images, 1 or 3, height, width] in [−1, 1], in the order of the inputs.
struct Drawn {
  /// Sampled with what the user asked for.
  torch::Tensor pictures = {};
  /// What stands to the left of them, header and pictures; empty: nothing to compare with.
  std::vector<std::pair<std::string, torch::Tensor>> compared = {};
  /// The header of their own column where others stand beside it.
  std::string guided_header = {};
  /// The columns of masks: header and [images, 1, height, width] of the latent; undefined: nothing
  /// was masked.
  std::vector<std::pair<std::string, torch::Tensor>> masks = {};
  /// Below the sheet.
  std::string footer = {};
};

/// Returns what --out shows: the picture if there is one, else a labelled sheet.
Image draw(const Drawn& drawn, const std::vector<Picture>& pictures, const OutputOptions& options);

}  // namespace sag_sample

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <torch/types.h>

#include "options.h"
#include "sag/conditioning.h"
#include "settings.h"

namespace sag_sample {

/// One picture to draw.
struct Picture {
  std::string prompt = {};  ///< empty: none, or tensors stand for it
  bool unconditional = false;
  std::uint64_t seed = 0;
  std::string label = {};
};

/// Pictures that are sampled together, as their conditioning has one form.
struct Batch {
  std::vector<std::size_t> pictures;  ///< indices
  std::vector<std::uint64_t> seeds;
  std::vector<sag::Conditioning> positive, negative;
  double cfg = 1.0;
  torch::Tensor noise;                        ///< undefined: from the seeds
  torch::Tensor latent, mask, inpaint_noise;  ///< undefined: none
};

/// All that goes into a run.
struct Inputs {
  std::vector<Picture> pictures;
  std::vector<Batch> batches;
  std::vector<double> sigmas;
  std::array<std::int64_t, 3> shape = {};  ///< of a latent
  std::vector<std::string> notes;          ///< what the user should know of them
};

/// Decides which pictures to draw, with which seeds and labels. Equal prompts get consecutive
/// seeds; a picture without a prompt and without a negative one is unconditional. `images` is how
/// many there are when tensors are given in place of texts.
std::vector<Picture> list_pictures(const Options& options, std::int64_t images);

/// Reads the tensors, encodes the picture and the prompts and sorts the pictures into batches.
/// Throws UsageError.
Inputs read_inputs(const Options& options, const Settings& settings);

}  // namespace sag_sample

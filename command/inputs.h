#pragma once

#include <cstddef>
#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/conditioning.h"
#include "sag/text_encoder.h"
#include "settings.h"

namespace sag_sample {

/// One picture to draw.
struct Picture {
  /// Empty: none, or tensors are given in its place.
  std::string prompt = {};
  bool unconditional = false;
  std::uint64_t seed = 0;
  std::string label = {};
};

/// Pictures that are sampled together, as their conditioning has one form.
struct Batch {
  /// Their indices.
  std::vector<std::size_t> pictures;
  std::vector<std::uint64_t> seeds;
  std::vector<sag::Conditioning> positive, negative;
  double cfg = 1.0;
  torch::Tensor noise;
  /// Undefined: none.
  torch::Tensor latent, mask, inpaint_noise;
};

/// All that goes into a run.
struct Inputs {
  std::vector<Picture> pictures;
  std::vector<Batch> batches;
  LatentSize size = {};
  /// What the user should know of them.
  std::vector<std::string> notes;
};

/// Decides which pictures to draw, with which seeds and labels. Equal prompts get consecutive
/// seeds; a picture without a prompt and without a negative one is unconditional. `images` is how
/// many there are when tensors are given in place of texts.
std::vector<Picture> list_pictures(const PictureOptions& options, std::int64_t images);

/// Throws UsageError when nothing says what to draw.
void check_is_asked_for_pictures(const Settings& settings);

/// What will be the model's text encoder, or nothing when it has none.
using ComingTextEncoder = std::future<std::optional<sag::TextEncoder>>;

/// Starts to load the text encoder beside whatever is done until it is needed, if there are texts
/// to encode.
ComingTextEncoder start_text_encoder(const Settings& settings);

/// Reads the tensors, encodes the picture and the prompts and sorts the pictures into batches, on
/// the device. Throws UsageError, and what loading the text encoder throws.
Inputs read_inputs(const Settings& settings, ComingTextEncoder encoder, torch::Device device);

}  // namespace sag_sample

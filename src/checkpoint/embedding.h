#pragma once

#include <map>
#include <string>

#include <torch/types.h>

namespace torch::jit {
struct Module;
}

namespace sag {

/// A textual inversion: a word that stands for vectors in the place of a token's.
struct TextEmbedding {
  /// The word that a prompt names it by.
  std::string name = {};
  /// "text_encoder", "text_encoder_2" → [vectors, width], fp32.
  std::map<std::string, torch::Tensor> vectors = {};
};

/// Reads a textual inversion out of a safetensors file, as A1111 ("emb_params"), diffusers (one
/// tensor of any name, [width] or [vectors, width]) and the trainers of SDXL ("clip_l" and
/// "clip_g"; "text_encoders_0" and "text_encoders_1") write it. A single tensor of width 1280 is
/// for the second text encoder, of any other width for the first. Throws ValueError when the file
/// holds anything else, or numbers that are not finite.
///
/// Source: Gal et al., An Image is Worth One Word, arXiv:2208.01618.
TextEmbedding read_embedding(const std::string& name, const std::string& path);

/// Makes a text encoder that sag-export wrote read `embedding.name` as its vectors, wherever it
/// stands in a text, in upper or lower case, also inside a word. The longest name wins.
///
/// Throws ValueError, and changes nothing, when the name is empty, has blanks in it, or is a token
/// already; when a text encoder of the model gets no vectors, or vectors of another width or more
/// of them than it reads tokens; and when the encoder is not such a one.
void add_embedding(torch::jit::Module& encoder, const TextEmbedding& embedding);

}  // namespace sag

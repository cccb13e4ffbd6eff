#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"

namespace torch::jit {
struct Module;
}

namespace sag {

/// A part of a prompt. No word goes from one piece into the next.
struct PromptPiece {
  /// Its words.
  std::string text = {};
  /// Of its tokens: 1 is as the text encoder gives them, 0 as they are in an empty text. ComfyUI:
  /// `(text:weight)`.
  double weight = 1.0;
};

/// What the UNet takes for a text, fp32 on the CPU.
struct EncodedText {
  /// [1, tokens, width].
  torch::Tensor context = {};
  /// [1, features], or undefined.
  torch::Tensor y = {};
  /// The part of the text that did not fit.
  std::string cut = {};
};

/// A scripted text encoder, with its tokenizer: `encode(str) -> Tensor context [1, tokens, width]`,
/// or, given the latent's height and width too, `encode(str, int, int) -> (Tensor context, Tensor y
/// [1, features])`. One that cannot read texts of any length has `cut(str) -> str`, the part that
/// does not fit.
///
/// One that weighs parts of a prompt and gives other layers has the same for pieces:
/// `encode_pieces(str[] pieces, float[] weights, int clip_skip[, int, int])`, with the layer
/// counted from the end (1: the last; 0: its own), `cut_pieces(str[]) -> str`, and
/// `clip_skip_range() -> (int, int)`, the lowest and the highest. Runs on the CPU in fp32.
class SAG_API TextEncoder {
 public:
  /// Loads an archive. Throws ValueError, in one sentence, when it cannot be read or has no such
  /// methods.
  static TextEncoder load(const std::string& path);
  /// Wraps a loaded module, which becomes fp32 on the CPU. `name` stands for it in messages. Throws
  /// ValueError when it has no such methods.
  static TextEncoder from_module(const torch::jit::Module& module, const std::string& name);

  /// Encodes a prompt for latents of this height and width. `clip_skip`: the layer, counted from
  /// the end. Throws ValueError when the encoder has no weights or layers to choose, or not this
  /// layer; c10::Error, with one sentence, when it fails or returns something else.
  EncodedText encode(const std::string& prompt, std::int64_t height, std::int64_t width,
                     std::optional<std::int64_t> clip_skip = {}) const;
  /// Encodes pieces of a prompt with their weights, likewise.
  EncodedText encode(const std::vector<PromptPiece>& prompt, std::int64_t height,
                     std::int64_t width, std::optional<std::int64_t> clip_skip = {}) const;

  /// Returns the lowest and the highest layer that can be chosen; nothing: it neither gives other
  /// layers nor weighs parts of a prompt.
  std::optional<std::pair<std::int64_t, std::int64_t>> clip_skip_range() const;

 private:
  struct State;
  explicit TextEncoder(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

}  // namespace sag

#pragma once

#include <string>

namespace sag_sample {

/// A part of a prompt. No word goes from one piece into the next.
struct PromptPiece {
  std::string text = {};
  /// Of its tokens: 1 is as the text encoder gives them, 0 as they are in an empty text.
  double weight = 1.0;
};

}  // namespace sag_sample

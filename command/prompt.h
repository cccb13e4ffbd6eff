#pragma once

#include <string_view>
#include <vector>

#include "sag/text_encoder.h"

namespace sag_sample {

/// Reads a prompt as ComfyUI does. `(red)` multiplies the weight by 1.1, `(red:1.3)` sets it, also
/// within other parentheses, and `\(` and `\)` are parentheses of the text. What is not a finite
/// number after the last colon belongs to the text, and so do parentheses without a partner.
/// Returns no piece for a prompt without text. Throws UsageError where it nests deeper than 100.
std::vector<sag::PromptPiece> parse_prompt(std::string_view prompt);

}  // namespace sag_sample

#pragma once

#include <cstdint>

#include "sag/export.h"

namespace sag {

/// Rows and columns of attention tokens, row-major over the picture.
struct TokenGrid {
  /// Number of rows.
  std::int64_t rows = 0;
  /// Number of columns.
  std::int64_t cols = 0;
  /// Compares all fields.
  bool operator==(const TokenGrid&) const = default;
};

/// Returns the grid in which `tokens` attention tokens cover a latent of `height` × `width`.
///
/// A UNet that halves its input k times, ⌈n/2⌉ each, has ⌈height/2ᵏ⌉ × ⌈width/2ᵏ⌉ tokens: the first
/// k that gives the right number wins, which is exact for every plain UNet. Otherwise (activations
/// resized by another factor) it is the two factors of `tokens` whose ratio is nearest to the
/// latent's.
///
/// Throws ValueError unless all three are positive and below 2^31.
/// ComfyUI: `create_blur_map`, whose search fails on primes and picks 18 × 8 for 16 × 9.
SAG_API TokenGrid token_grid(std::int64_t tokens, std::int64_t height, std::int64_t width);

}  // namespace sag

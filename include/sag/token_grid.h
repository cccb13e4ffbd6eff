#pragma once

#include <cstdint>
#include <optional>

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

/// Returns the grid in which `tokens` attention tokens cover a latent of `height` × `width`;
/// nullopt if they are no such grid, because some of them are not the picture's, for example.
///
/// A grid is one common reduction of height and width, by a whole factor f, to rounding:
///
///     rows = ⌊(height + c) / f⌋, cols = ⌊(width + c) / f⌋, f >= 1, 0 <= c < f
///
/// This is what any chain of layers gives whose strides multiply to f and that are padded by less
/// than their stride: c = 0 rounds down everywhere, c = f − 1 up everywhere, and what lies between
/// is a mixture. Patches and resizing by a whole factor are such layers too.
///
/// reduction: f, where it is known; 0: any. Of several grids with that many tokens, one of repeated
/// halving, ⌈n/2⌉ each, comes first (the fewest times halved), and then the one whose shape is
/// nearest to the latent's.
///
/// The number alone is no proof: 64 tokens of a 16 × 16 latent are also a window of 8 × 8.
///
/// Throws ValueError unless tokens, height and width are positive and below 2^31, and reduction is
/// at least 0.
/// ComfyUI: `create_blur_map`, whose search takes any number, fails on primes and picks 18 × 8 for
/// 16 × 9.
SAG_API std::optional<TokenGrid> token_grid(std::int64_t tokens, std::int64_t height,
                                            std::int64_t width, std::int64_t reduction = 0);

/// Where the picture's tokens are among those of an attention, when there are others: a class
/// token, registers, a text.
struct PictureTokens {
  /// For `before` or `after`: as many as the picture leaves.
  static constexpr std::int64_t kRest = -1;

  /// How many tokens come before the picture's. kRest, for a text whose length changes, needs
  /// `reduction`.
  std::int64_t before = 0;
  /// How many come after them; likewise.
  std::int64_t after = 0;
  /// Latent cells along a side of a token: a transformer's patch size, or what a UNet's strides
  /// before the attention multiply to. 0: whatever the number of tokens says.
  std::int64_t reduction = 0;
  /// Compares all fields.
  bool operator==(const PictureTokens&) const = default;
};

/// Some neighbouring tokens.
struct TokenRange {
  /// The first.
  std::int64_t begin = 0;
  /// Number of tokens.
  std::int64_t count = 0;
  /// Compares all fields.
  bool operator==(const TokenRange&) const = default;
};

/// Returns which of an attention's `tokens` are the picture's; nullopt if those are no grid of
/// `height` × `width`. With kRest the picture has height/reduction × width/reduction tokens, and
/// there is no answer where reduction does not divide both.
///
/// Throws ValueError on the arguments that `token_grid` refuses, when before or after is less than
/// kRest, both are kRest, or one is and reduction is 0.
SAG_API std::optional<TokenRange> find_picture_tokens(std::int64_t tokens, std::int64_t height,
                                                      std::int64_t width,
                                                      const PictureTokens& where);

}  // namespace sag

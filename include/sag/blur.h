#pragma once

#include <cstdint>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

/// Returns x blurred by a Gaussian: kernel_size taps, weights exp(−½ (t / sigma)²) normalised,
/// separable, each channel separately, edges reflected (the edge cell is not repeated).
///
/// x: [B, C, H, W], floating; the result has its dtype (half precision is summed in fp32).
/// kernel_size: odd, or 0 for as many taps as sigma needs (radius ⌈3·sigma⌉). The radius is clamped
/// to side − 1 along each side, as reflection requires. sigma: in cells, >= 0; 0 returns x. Note
/// that 9 taps are enough for a sigma of up to about 1.5: 2 acts as 1.85, 10 as 2.55.
///
/// Throws ValueError or TypeError on other arguments. ComfyUI: `gaussian_blur_2d`.
SAG_API torch::Tensor gaussian_blur_2d(const torch::Tensor& x, std::int64_t kernel_size,
                                       double sigma);

/// Returns attention maps as pictures: each on its token grid, resized to `height` × `width` by
/// nearest neighbour. attn_map: [B, tokens] floating → [B, 1, height, width]. reduction: how many
/// latent cells a token covers along a side, 0: whatever `token_grid` finds.
/// Throws ValueError or TypeError on other arguments, ValueError also when the tokens are no grid
/// of `height` × `width`. ComfyUI: `create_blur_map`.
SAG_API torch::Tensor upsample_attention_map(const torch::Tensor& attn_map, std::int64_t height,
                                             std::int64_t width, std::int64_t reduction = 0);

/// What is blurred, and how much.
struct BlurMapOptions {
  /// In latent cells; 0: no blur.
  double blur_sigma = 2.0;
  /// Cells that receive strictly more attention are blurred; 1 is the average.
  double threshold = 1.0;
  /// Odd; 0: as wide as blur_sigma needs.
  std::int64_t kernel_size = 9;
};

/// Returns x0 with the parts that the model attends to blurred; the rest is x0, bit for bit.
///
/// x0: [B, C, H, W] floating. attn_map: [B, tokens] as `attention_map` returns it, or [B, 1, H, W]
/// as `upsample_attention_map` does. The map is compared with the threshold in its own dtype, fp32.
/// Throws ValueError or TypeError on other arguments, and where `upsample_attention_map` does.
/// Source: Hong et al. 2023, section 4.2; ComfyUI: `create_blur_map`.
SAG_API torch::Tensor create_blur_map(const torch::Tensor& x0, const torch::Tensor& attn_map,
                                      const BlurMapOptions& options = {});

}  // namespace sag

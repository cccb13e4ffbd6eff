#pragma once

#include <vector>

#include <torch/types.h>

#include "picture/image.h"

namespace sag_sample {

/// Returns whether tensors with so many channels are pictures: 1 (grey) or 3 (red, green, blue).
bool is_picture(std::int64_t channels);

/// Returns tensors [images, 1 or 3, height, width] in [−1, 1] as pictures; what lies outside is
/// clamped. Throws RunError on other tensors.
std::vector<Image> to_images(const torch::Tensor& tensors);

/// Returns a picture as a tensor [1, 3, height, width] in [−1, 1].
torch::Tensor from_image(const Image& image);

/// Returns heat maps [images, 1, height, width] in 0 … 1 as values per pixel of pictures of this
/// size.
std::vector<std::vector<float>> to_heat(const torch::Tensor& heat, int width, int height);

}  // namespace sag_sample

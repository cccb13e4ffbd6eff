#include "sag/conditioning.h"

#include <cmath>

#include <ATen/ATen.h>

namespace sag {

torch::Tensor guidance_scale_embedding(double guidance_scale, std::int64_t size) {
  TORCH_CHECK_VALUE(std::isfinite(guidance_scale),
                    "[guidance_scale_embedding] guidance_scale must be finite, got ",
                    guidance_scale, ".");
  TORCH_CHECK_VALUE(size >= 4, "[guidance_scale_embedding] size must be at least 4, got ", size,
                    ".");
  // In fp32, as the network saw it in training: the angles are so large that digits count.
  const auto half = size / 2;
  const auto step = std::log(10000.0) / static_cast<double>(half - 1);
  const auto options = torch::TensorOptions(torch::kCPU).dtype(torch::kFloat);
  const auto frequencies = at::exp(at::arange(half, options) * -step);
  const auto angles = at::full({1, 1}, guidance_scale - 1, options) * 1000 * frequencies;
  return at::constant_pad_nd(at::cat({at::sin(angles), at::cos(angles)}, 1), {0, size % 2});
}

}  // namespace sag

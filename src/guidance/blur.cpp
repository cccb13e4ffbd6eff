#include "sag/blur.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/ATen.h>

#include "model/latent.h"
#include "sag/token_grid.h"

#ifdef SAG_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "blur_kernels.h"
#endif

namespace sag {
namespace {

// Weights of the taps at 0, 1, … radius; together with their mirror images they add up to 1.
std::vector<double> gaussian_weights(std::int64_t radius, double sigma) {
  std::vector<double> weights;
  double sum = 0;
  for (std::int64_t t = 0; t <= radius; ++t) {
    const auto distance = static_cast<double>(t) / sigma;
    weights.push_back(std::exp(-0.5 * distance * distance));
    sum += (t == 0 ? 1 : 2) * weights.back();
  }
  for (auto& weight : weights) weight /= sum;
  return weights;
}

#ifdef SAG_WITH_CUDA

// One launch; the sum below takes two for each tap.
torch::Tensor blur_axis_cuda(const torch::Tensor& given, std::int64_t dim,
                             const std::vector<double>& weights) {
  const auto x = given.contiguous();
  const c10::cuda::CUDAGuard device(x.device());
  BlurTaps taps{.radius = static_cast<int>(weights.size()) - 1};
  std::copy(weights.begin(), weights.end(), taps.weights);
  auto blurred = at::empty_like(x);
  C10_CUDA_CHECK(launch_blur_axis(x.const_data_ptr<float>(), blurred.mutable_data_ptr<float>(),
                                  x.numel(), {x.size(dim), x.stride(dim)}, taps,
                                  c10::cuda::getCurrentCUDAStream()));
  return blurred;
}

#endif

// Blurs [B, C, H, W] along H (dim 2) or W (dim 3). A sum of shifted pictures instead of a
// convolution: its weights are numbers on the host, so nothing is copied to the device, and cuDNN's
// TF32 settings do not affect it.
torch::Tensor blur_axis(const torch::Tensor& x, std::int64_t dim, std::int64_t radius,
                        double sigma) {
  const auto side = x.size(dim);
  // Reflection needs a neighbour for every tap.
  const auto reach = std::min(radius, side - 1);
  const auto weights = gaussian_weights(reach, sigma);
#ifdef SAG_WITH_CUDA
  const bool differentiable = x.requires_grad() && at::GradMode::is_enabled();
  if (x.is_cuda() && x.scalar_type() == torch::kFloat && reach <= kBlurMaxRadius && !differentiable)
    return blur_axis_cuda(x, dim, weights);
#endif
  const auto padded = dim == 2 ? at::reflection_pad2d(x, {0, 0, reach, reach})
                               : at::reflection_pad2d(x, {reach, reach, 0, 0});
  auto blurred = x * weights[0];
  for (std::int64_t t = 1; t <= reach; ++t) {
    blurred.add_(padded.narrow(dim, reach - t, side), weights[t]);
    blurred.add_(padded.narrow(dim, reach + t, side), weights[t]);
  }
  return blurred;
}

}  // namespace

torch::Tensor gaussian_blur_2d(const torch::Tensor& x, std::int64_t kernel_size, double sigma) {
  check_latent(x, "x", "gaussian_blur_2d");
  TORCH_CHECK_VALUE(
      kernel_size >= 0 && (kernel_size == 0 || kernel_size % 2 == 1),
      "[gaussian_blur_2d] kernel_size must be odd, or 0 to be as wide as sigma needs, got ",
      kernel_size, ".");
  TORCH_CHECK_VALUE(std::isfinite(sigma) && sigma >= 0,
                    "[gaussian_blur_2d] sigma must be finite and at least 0, got ", sigma, ".");
  if (sigma == 0) return x;
  // A larger radius would be clamped anyway.
  const auto longest = std::max(x.size(2), x.size(3));
  const auto radius =
      kernel_size > 0 ? kernel_size / 2
                      : static_cast<std::int64_t>(std::min<double>(std::ceil(3 * sigma), longest));
  const auto wide = at_least_fp32(x);
  return blur_axis(blur_axis(wide, 2, radius, sigma), 3, radius, sigma).to(x.scalar_type());
}

torch::Tensor upsample_attention_map(const torch::Tensor& attn_map, std::int64_t height,
                                     std::int64_t width, std::int64_t reduction) {
  TORCH_CHECK_VALUE(
      attn_map.dim() == 2 && attn_map.numel() > 0,
      "[upsample_attention_map] attn_map must have shape [B, tokens], none of them 0, got ",
      attn_map.sizes(), ".");
  TORCH_CHECK_TYPE(attn_map.is_floating_point(),
                   "[upsample_attention_map] attn_map must be floating, got ",
                   attn_map.scalar_type(), ".");
  const auto grid = token_grid(attn_map.size(1), height, width, reduction);
  TORCH_CHECK_VALUE(grid,
                    "[upsample_attention_map] the tokens of attn_map must be a grid of the picture "
                    "(token_grid), got ",
                    attn_map.size(1), " tokens for ", height, " x ", width, ".");
  return at::upsample_nearest2d(attn_map.reshape({-1, 1, grid->rows, grid->cols}), {height, width});
}

torch::Tensor create_blur_map(const torch::Tensor& x0, const torch::Tensor& attn_map,
                              const BlurMapOptions& options) {
  check_latent(x0, "x0", "create_blur_map");
  TORCH_CHECK_VALUE(std::isfinite(options.threshold),
                    "[create_blur_map] threshold must be finite, got ", options.threshold, ".");
  const auto height = x0.size(2), width = x0.size(3);
  const auto map = attn_map.dim() == 2 ? upsample_attention_map(attn_map, height, width) : attn_map;
  TORCH_CHECK_VALUE(map.dim() == 4 && map.size(0) == x0.size(0) && map.size(1) == 1 &&
                        map.size(2) == height && map.size(3) == width,
                    "[create_blur_map] attn_map must have shape [", x0.size(0), ", tokens] or [",
                    x0.size(0), ", 1, ", height, ", ", width, "] for x0 ", x0.sizes(), ", got ",
                    attn_map.sizes(), ".");
  TORCH_CHECK_VALUE(map.device() == x0.device(),
                    "[create_blur_map] attn_map must be on x0's device ", x0.device(), ", got ",
                    attn_map.device(), ".");
  const auto blurred = gaussian_blur_2d(x0, options.kernel_size, options.blur_sigma);
  return at::where(map > options.threshold, blurred, x0);
}

}  // namespace sag

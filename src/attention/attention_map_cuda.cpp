#include "attention_map_cuda.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "attention_map_kernels.h"

namespace sag {
namespace {

// Heads and images are the grid's y and z.
constexpr std::int64_t kMaxGridHeight = 65535;
// Of the kernels' loads, in bytes.
constexpr std::int64_t kAlignment = 16;

bool is_aligned(const torch::Tensor& x) {
  if (reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kAlignment != 0) return false;
  for (std::int64_t dim = 0; dim < 3; ++dim)
    if (x.size(dim) > 1 && x.stride(dim) * x.element_size() % kAlignment != 0) return false;
  return x.stride(3) == 1;
}

// Beyond 2³¹ − 2¹⁶ tokens the kernels' loop counters would overflow.
bool fits(const torch::Tensor& x) {
  return x.size(0) <= kMaxGridHeight && x.size(1) <= kMaxGridHeight &&
         x.size(2) <= std::numeric_limits<std::int32_t>::max() - (1 << 16);
}

float scale_log2(double scale) {
  return static_cast<float>(scale * std::numbers::log2e);
}

TokenVectors token_vectors(const torch::Tensor& x, std::int64_t query_heads) {
  return {.data = x.const_data_ptr(),
          .batch_stride = x.stride(0),
          .head_stride = x.stride(1),
          .token_stride = x.stride(2),
          .tokens = static_cast<int>(x.size(2)),
          .heads_per_vector = static_cast<int>(query_heads / x.size(1))};
}

}  // namespace

bool column_sums_cuda_takes(const torch::Tensor& q, const torch::Tensor& k, double scale) {
  const auto is_half = q.scalar_type() == torch::kHalf || q.scalar_type() == torch::kBFloat16;
  return q.is_cuda() && is_half && q.size(3) <= kColumnSumsMaxHeadDim &&
         q.size(3) % kColumnSumsHeadDimMultiple == 0 && fits(q) && fits(k) && is_aligned(q) &&
         is_aligned(k) && std::isnormal(scale_log2(scale)) && scale > 0 &&
         at::cuda::getDeviceProperties(q.get_device())->major >= 8;
}

torch::Tensor column_sums_cuda(const torch::Tensor& q, const torch::Tensor& k, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const auto batch = q.size(0), heads = q.size(1);
  const auto options = q.options().dtype(torch::kFloat);
  const auto statistics = at::empty({batch, heads, q.size(2), 2}, options);
  auto sums = at::empty({batch, heads, k.size(2)}, options);
  const ColumnSumsCall call = {.q = token_vectors(q, heads),
                               .k = token_vectors(k, heads),
                               .batch = static_cast<int>(batch),
                               .heads = static_cast<int>(heads),
                               .head_dim = static_cast<int>(q.size(3)),
                               .is_bfloat16 = q.scalar_type() == torch::kBFloat16,
                               .scale_log2 = scale_log2(scale),
                               .statistics = statistics.mutable_data_ptr<float>(),
                               .column_sums = sums.mutable_data_ptr<float>()};
  C10_CUDA_CHECK(launch_column_sums(call, at::cuda::getCurrentCUDAStream()));
  return sums;
}

}  // namespace sag

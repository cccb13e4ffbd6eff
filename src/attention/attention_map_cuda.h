#pragma once

#include <torch/types.h>

namespace sag {

/// Returns whether the tensor core kernels support these: fp16 or bf16, head_dim a multiple of 8 up
/// to 256, the innermost stride 1, every token's vector at a multiple of 16 bytes, scale above 0,
/// and a GPU of compute capability 8.0.
bool column_sums_cuda_takes(const torch::Tensor& q, const torch::Tensor& k, double scale);

/// Returns softmax(q kᵀ · scale), summed over queries: [B, heads, keys] fp32. Works on the current
/// stream without waiting for it, and can be captured in a CUDA graph.
torch::Tensor column_sums_cuda(const torch::Tensor& q, const torch::Tensor& k, double scale);

}  // namespace sag

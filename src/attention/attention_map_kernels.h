#pragma once

// How the CUDA kernels of attention_map are called. Plain C++17: nvcc reads this file, and neither
// LibTorch nor our own headers.

#include <cstdint>

#include <cuda_runtime_api.h>

namespace sag {

/// [B, heads, tokens, head_dim] in fp16 or bf16. Strides count elements; the innermost is 1, and
/// every token's vector begins at a multiple of 16 bytes.
struct TokenVectors {
  const void* data = nullptr;
  std::int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
  int tokens = 0;
  /// Query heads that share one head of this tensor.
  int heads_per_vector = 1;
};

/// softmax(q kᵀ · scale), summed over queries: column_sums, [B, heads, keys] fp32.
struct ColumnSumsCall {
  TokenVectors q, k;
  int batch = 0, heads = 0, head_dim = 0;
  bool is_bfloat16 = false;
  /// scale · log2(e), above 0: the kernels compute powers of 2, not of e.
  float scale_log2 = 0;
  /// Working memory: [B, heads, queries, 2] fp32.
  float* statistics = nullptr;
  float* column_sums = nullptr;
};

constexpr int kColumnSumsMaxHeadDim = 256;
constexpr int kColumnSumsHeadDimMultiple = 8;

/// Enqueues both kernels. They use tensor cores: compute capability 8.0 and newer.
cudaError_t launch_column_sums(const ColumnSumsCall& call, cudaStream_t stream);

}  // namespace sag

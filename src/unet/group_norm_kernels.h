#pragma once

// How the CUDA kernels of group_norm are called. Plain C++17: nvcc reads this file, and neither
// LibTorch nor our own headers.

#include <cuda_runtime_api.h>

namespace sag {

/// x and out: [images, pixels, channels] without gaps, in fp16 or bf16, as weight and bias are. All
/// begin at multiples of 16 bytes.
struct GroupNormCall {
  const void* x = nullptr;
  // weight and bias: [channels].
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* out = nullptr;
  bool is_bfloat16 = false;
  int images = 0, pixels = 0, channels = 0, groups = 0;
  float eps = 0;
  // Whether out is y · sigmoid(y) in place of y.
  bool silu = false;
  // Working memory: [images, group_norm_chunks(…), groups, 2].
  float* sums = nullptr;
};

// Channels must be a multiple of it.
constexpr int kGroupNormVector = 8;
constexpr int kGroupNormMaxChannels = 4096;

/// Returns in how many parts the pixels of an image are summed up.
int group_norm_chunks(const GroupNormCall& call);

/// Enqueues both kernels.
cudaError_t launch_group_norm(const GroupNormCall& call, cudaStream_t stream);

}  // namespace sag

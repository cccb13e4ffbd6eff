#pragma once

// How the CUDA kernel of gaussian_blur_2d is called. Plain C++17: nvcc reads this file, and neither
// LibTorch nor our own headers.

#include <cstdint>

#include <cuda_runtime_api.h>

namespace sag {

constexpr std::int64_t kBlurMaxRadius = 63;

/// Weights of a blur at distance 0, 1, … radius. They travel with the launch, so nothing is copied.
struct BlurTaps {
  int radius = 0;
  float weights[kBlurMaxRadius + 1] = {};
};

/// One axis of a contiguous fp32 tensor: `side` cells, `stride` elements apart.
struct BlurAxis {
  std::int64_t side = 0, stride = 0;
};

/// Enqueues out = x blurred along the axis, edges reflected; radius < side. `count` elements.
cudaError_t launch_blur_axis(const float* x, float* out, std::int64_t count, const BlurAxis& axis,
                             const BlurTaps& taps, cudaStream_t stream);

}  // namespace sag

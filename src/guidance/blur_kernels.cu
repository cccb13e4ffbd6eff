#include "blur_kernels.h"

namespace sag {
namespace {

constexpr int kThreads = 256;

// Index of a neighbour, mirrored at the edges; the edge cell is not repeated.
__device__ std::int64_t reflect(std::int64_t i, std::int64_t side) {
  if (i < 0) i = -i;
  return i < side ? i : 2 * (side - 1) - i;
}

// One element per thread: a picture is small, and its neighbours are in the cache.
__global__ void blur_axis(const float* x, float* out, std::int64_t count, BlurAxis axis,
                          BlurTaps taps) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const std::int64_t place = i / axis.stride % axis.side;
  const float* line = x + (i - place * axis.stride);
  float sum = taps.weights[0] * x[i];
  for (int t = 1; t <= taps.radius; ++t) {
    sum += taps.weights[t] * line[reflect(place - t, axis.side) * axis.stride];
    sum += taps.weights[t] * line[reflect(place + t, axis.side) * axis.stride];
  }
  out[i] = sum;
}

}  // namespace

cudaError_t launch_blur_axis(const float* x, float* out, std::int64_t count, const BlurAxis& axis,
                             const BlurTaps& taps, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  blur_axis<<<blocks, kThreads, 0, stream>>>(x, out, count, axis, taps);
  return cudaGetLastError();
}

}  // namespace sag

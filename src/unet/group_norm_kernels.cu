// Group norm of pictures with channels last, followed by SiLU if wanted.
//
//   sum_chunks   per part of a picture and group: Σ (x − shift) and Σ (x − shift)²
//   normalize    (x − mean) · weight / deviation + bias; each block adds up the sums of its picture
//
// In both a thread owns eight neighbouring channels and steps through pixels; threads of one y
// together hold a pixel. The shift, a group's first value, keeps the difference of the two sums
// exact where values lie far from zero. No atomics: the same bits in every run.

#include "group_norm_kernels.h"

#include <algorithm>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sag {
namespace {

constexpr int kVector = kGroupNormVector;
constexpr int kMaxThreads = 512;
// About as many as a large GPU keeps busy.
constexpr int kBlocks = 512;
// So that adding them up stays cheap.
constexpr int kMaxChunks = 64;

__device__ float to_float(__half value) {
  return __half2float(value);
}
__device__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ void assign(__half& to, float value) {
  to = __float2half_rn(value);
}
__device__ void assign(__nv_bfloat16& to, float value) {
  to = __float2bfloat16_rn(value);
}

// Eight values, moved at once.
template <typename T>
struct alignas(16) Vector {
  T values[kVector];
};

template <typename T>
__device__ Vector<T> load(const void* data, std::int64_t vector) {
  return static_cast<const Vector<T>*>(data)[vector];
}

// The vector that the thread holds of a pixel of the block's picture.
__device__ std::int64_t vector_of(const GroupNormCall& call, int pixel) {
  const auto row = static_cast<std::int64_t>(blockIdx.y) * call.pixels + pixel;
  return row * (call.channels / kVector) + threadIdx.x;
}

// A group's first value in the block's picture.
template <typename T>
__device__ float shift_of(const GroupNormCall& call, int group) {
  const auto picture = static_cast<std::int64_t>(blockIdx.y) * call.pixels * call.channels;
  return to_float(static_cast<const T*>(call.x)[picture + group * (call.channels / call.groups)]);
}

__device__ float2 add(float2 a, float2 b) {
  return {a.x + b.x, a.y + b.y};
}

__device__ float2 sum_of_warp(float2 value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value =
        add(value, {__shfl_xor_sync(~0u, value.x, lanes), __shfl_xor_sync(~0u, value.y, lanes)});
  }
  return value;
}

// Calls finish(group, sum) in one lane, with the sum of term(group, i) for i < count. Whole warps
// take turns; a last warp with fewer threads does nothing.
template <typename Term, typename Finish>
__device__ void for_each_group(int groups, int count, const Term& term, const Finish& finish) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warps = blockDim.x * blockDim.y / 32, warp = thread / 32, lane = thread % 32;
  if (warp >= warps) return;
  for (int group = warp; group < groups; group += warps) {
    float2 sum = {0, 0};
    for (int i = lane; i < count; i += 32) sum = add(sum, term(group, i));
    sum = sum_of_warp(sum);
    if (lane == 0) finish(group, sum);
  }
}

// Grid: chunks × pictures.
template <typename T>
__global__ void sum_chunks(GroupNormCall call) {
  extern __shared__ float2 channel_sums[];  // [y][channels]
  const int width = call.channels / call.groups, first_channel = threadIdx.x * kVector;
  float shift[kVector];
  for (int i = 0; i < kVector; ++i) shift[i] = shift_of<T>(call, (first_channel + i) / width);

  float2 sums[kVector] = {};
  const int step = gridDim.x * blockDim.y;
  for (int pixel = blockIdx.x * blockDim.y + threadIdx.y; pixel < call.pixels; pixel += step) {
    const auto x = load<T>(call.x, vector_of(call, pixel));
    for (int i = 0; i < kVector; ++i) {
      const float value = to_float(x.values[i]) - shift[i];
      sums[i] = add(sums[i], {value, value * value});
    }
  }
  for (int i = 0; i < kVector; ++i)
    channel_sums[threadIdx.y * call.channels + first_channel + i] = sums[i];
  __syncthreads();

  float2* out = reinterpret_cast<float2*>(call.sums) +
                (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * call.groups;
  for_each_group(
      call.groups, width * blockDim.y,
      [&](int group, int i) {
        return channel_sums[i / width * call.channels + group * width + i % width];
      },
      [&](int group, float2 sum) { out[group] = sum; });
}

// Grid: any number × pictures.
template <typename T>
__global__ void normalize(GroupNormCall call, int chunks) {
  extern __shared__ float2 statistics[];  // per group: mean and 1 / deviation
  const int width = call.channels / call.groups;
  const float2* sums = reinterpret_cast<const float2*>(call.sums) +
                       static_cast<std::int64_t>(blockIdx.y) * chunks * call.groups;
  for_each_group(
      call.groups, chunks, [&](int group, int i) { return sums[i * call.groups + group]; },
      [&](int group, float2 sum) {
        const float count = static_cast<float>(width) * static_cast<float>(call.pixels);
        const float mean = sum.x / count;
        const float variance = fmaxf(sum.y / count - mean * mean, 0.0f);
        statistics[group] = {shift_of<T>(call, group) + mean, rsqrtf(variance + call.eps)};
      });
  __syncthreads();

  const auto weight = load<T>(call.weight, threadIdx.x), bias = load<T>(call.bias, threadIdx.x);
  float mean[kVector], scale[kVector];
  for (int i = 0; i < kVector; ++i) {
    const float2 group = statistics[(threadIdx.x * kVector + i) / width];
    mean[i] = group.x;
    scale[i] = group.y * to_float(weight.values[i]);
  }
  const int step = gridDim.x * blockDim.y;
  for (int pixel = blockIdx.x * blockDim.y + threadIdx.y; pixel < call.pixels; pixel += step) {
    const auto vector = vector_of(call, pixel);
    auto x = load<T>(call.x, vector);
    for (int i = 0; i < kVector; ++i) {
      float y = (to_float(x.values[i]) - mean[i]) * scale[i] + to_float(bias.values[i]);
      if (call.silu) y /= 1.0f + __expf(-y);
      assign(x.values[i], y);
    }
    static_cast<Vector<T>*>(call.out)[vector] = x;
  }
}

dim3 block_of(const GroupNormCall& call) {
  const int vectors = call.channels / kVector;
  return {static_cast<unsigned>(vectors), static_cast<unsigned>(kMaxThreads / vectors)};
}

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

template <typename T>
cudaError_t launch(const GroupNormCall& call, cudaStream_t stream) {
  const dim3 block = block_of(call);
  const int rows = static_cast<int>(block.y), chunks = group_norm_chunks(call);
  const auto images = static_cast<unsigned>(call.images);
  const int blocks = std::min(divide_up(call.pixels, rows), divide_up(kBlocks, call.images));
  sum_chunks<T><<<{static_cast<unsigned>(chunks), images}, block,
                  sizeof(float2) * block.y * call.channels, stream>>>(call);
  normalize<T>
      <<<{static_cast<unsigned>(blocks), images}, block, sizeof(float2) * call.groups, stream>>>(
          call, chunks);
  return cudaGetLastError();
}

}  // namespace

int group_norm_chunks(const GroupNormCall& call) {
  const int rows = static_cast<int>(block_of(call).y);
  const int wanted = std::min(kMaxChunks, divide_up(kBlocks / 2, call.images));
  // At least four pixels a thread.
  return std::min(wanted, divide_up(call.pixels, 4 * rows));
}

cudaError_t launch_group_norm(const GroupNormCall& call, cudaStream_t stream) {
  return call.is_bfloat16 ? launch<__nv_bfloat16>(call, stream) : launch<__half>(call, stream);
}

}  // namespace sag

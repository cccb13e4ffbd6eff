#pragma once

// Times and memory of work on a device. Header only: each benchmark is one program.

#include <chrono>
#include <cstdint>
#include <functional>

#include <benchmark/benchmark.h>
#include <torch/torch.h>

#ifdef SAG_WITH_CUDA
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace sag::bench {

#ifdef SAG_WITH_CUDA
/// Calls, captured in a CUDA graph: replaying them measures the device and not the host's launches.
class CapturedCalls {
 public:
  CapturedCalls(int count, const std::function<void()>& call) : count_(count) {
    // Nothing can be given back during a capture, and other graphs have left their pools.
    c10::cuda::CUDACachingAllocator::emptyCache();
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
    call();  // on this stream, for what is set up once a stream
    graph_.capture_begin();
    for (int i = 0; i < count; ++i) call();
    graph_.capture_end();
  }

  double seconds_per_call() {
    at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
    begin.record();
    graph_.replay();
    end.record();
    end.synchronize();
    return begin.elapsed_time(end) * 1e-3 / count_;
  }

 private:
  int count_;
  at::cuda::CUDAGraph graph_;
};
#endif

inline double seconds_of_host(const std::function<void()>& call) {
  const auto begin = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// What a call allocates on the device, at its peak; nothing is known about the CPU.
inline double peak_mib([[maybe_unused]] torch::Device device, const std::function<void()>& call) {
#ifdef SAG_WITH_CUDA
  if (device.is_cuda()) {
    using namespace c10::cuda::CUDACachingAllocator;
    const auto index = c10::cuda::current_device();
    resetPeakStats(index);
    const auto before = getDeviceStats(index).allocated_bytes[0].current;
    call();
    return static_cast<double>(getDeviceStats(index).allocated_bytes[0].peak - before) / (1 << 20);
  }
#endif
  call();
  return 0;
}

/// Runs a call as a benchmark with manual time, with its peak memory as a counter.
inline void measure(benchmark::State& state, torch::Device device,
                    const std::function<void()>& call) {
  const torch::NoGradGuard no_grad;
  for (int i = 0; i < 2; ++i) call();  // handles, plans, the allocator's cache
  state.counters["MiB"] = peak_mib(device, call);
#ifdef SAG_WITH_CUDA
  if (device.is_cuda()) {
    CapturedCalls calls(10, call);
    calls.seconds_per_call();
    for (auto _ : state) state.SetIterationTime(calls.seconds_per_call());
    return;
  }
#endif
  TORCH_CHECK(device.is_cpu(), "this build measures no ", device);
  for (auto _ : state) state.SetIterationTime(seconds_of_host(call));
}

}  // namespace sag::bench

#pragma once

// Tests that run on every backend: instantiate with `backends()`; CUDA skips itself where there is
// none.

#include <gtest/gtest.h>
#include <torch/torch.h>

#define SAG_SKIP_WITHOUT_CUDA(device)                     \
  if ((device).is_cuda() && !torch::cuda::is_available()) \
  GTEST_SKIP() << "this machine has no CUDA device, or LibTorch no CUDA"

namespace sag::test {

/// A test fixture over devices.
class BackendTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { SAG_SKIP_WITHOUT_CUDA(device()); }
  torch::Device device() const { return torch::Device(GetParam()); }
};

inline auto backends() {
  return testing::Values("cpu", "cuda");
}
inline std::string backend_name(const testing::TestParamInfo<const char*>& info) {
  return info.param;
}

}  // namespace sag::test

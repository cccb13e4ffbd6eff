// attention_map on a GPU: the tensor core kernels, and when they are not used.

#include <ATen/autocast_mode.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "support/device.h"
#include "support/reference.h"

namespace sag {
namespace {

using test::max_diff;

constexpr std::int64_t kMiB = 1 << 20;
const torch::Device kCuda(torch::kCUDA);

class AttentionMapCuda : public testing::Test {
 protected:
  void SetUp() override {
    SAG_SKIP_WITHOUT_CUDA(kCuda);
    torch::manual_seed(0);
  }
};

torch::Tensor randn(at::IntArrayRef shape, torch::ScalarType dtype = torch::kHalf) {
  return torch::randn(shape, kCuda).to(dtype);
}

// The peak of what the allocator hands out during a call.
std::int64_t peak_bytes(const std::function<torch::Tensor()>& call) {
  using c10::CachingAllocator::StatType;
  const auto device = c10::cuda::current_device();
  const auto bytes = [device] {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device);
    return stats.allocated_bytes[static_cast<std::size_t>(StatType::AGGREGATE)];
  };
  c10::cuda::CUDACachingAllocator::resetPeakStats(device);
  const auto before = bytes().current;
  const auto map = call();
  return bytes().peak - before;
}

// The kernels keep 8 bytes per query and head and 4 per key and head; blocks of scores take far
// more. The allocator rounds up to 512 bytes.
bool takes_the_kernels(const torch::Tensor& q, const torch::Tensor& k,
                       std::optional<double> scale = {}) {
  const auto heads = q.size(0) * q.size(1);
  const auto expected = heads * (8 * q.size(2) + 4 * k.size(2)) + 4 * q.size(0) * k.size(2);
  return peak_bytes([&] { return attention_map(q, k, scale); }) <= expected + 3 * 512;
}

void expect_right(const torch::Tensor& q, const torch::Tensor& k, std::optional<double> scale = {},
                  double tolerance = 2e-5) {
  const auto map = attention_map(q, k, scale);
  const auto shared_k = k.repeat_interleave(q.size(1) / k.size(1), 1);
  const auto reference = test::reference_attention_map(
      q, shared_k, scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3)))));
  EXPECT_EQ(map.scalar_type(), torch::kFloat);
  EXPECT_LT(max_diff(map, reference), tolerance);
  EXPECT_LT(
      max_diff(map.mean(1) * k.size(2) / static_cast<double>(q.size(2)), torch::ones({q.size(0)})),
      1e-5);
}

TEST_F(AttentionMapCuda, MatchesTheNaiveFormAtEveryHeadDim) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat})
    for (const auto head_dim : {1, 8, 16, 20, 24, 32, 40, 48, 64, 72, 80, 96, 128, 160, 256, 264}) {
      SCOPED_TRACE(c10::str(dtype, ", head_dim ", head_dim));
      expect_right(randn({2, 3, 331, head_dim}, dtype), randn({2, 3, 331, head_dim}, dtype));
    }
}

TEST_F(AttentionMapCuda, MatchesTheNaiveFormAtEveryTokenCount) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat})
    for (const auto tokens : {1, 2, 7, 15, 16, 63, 64, 65, 127, 129, 997, 2053}) {
      SCOPED_TRACE(c10::str(dtype, ", tokens ", tokens));
      expect_right(randn({1, 2, tokens, 40}, dtype), randn({1, 2, tokens, 40}, dtype));
      expect_right(randn({1, 2, tokens, 40}, dtype), randn({1, 2, 77, 40}, dtype));
    }
}

TEST_F(AttentionMapCuda, TakesEveryAlignedLayout) {
  const auto contiguous = randn({2, 4, 301, 64});
  // [B, N, H, D], as UNets lay it out.
  const auto unet = randn({2, 301, 4, 64}).transpose(1, 2);
  const auto fused = randn({2, 301, 3 * 4 * 64})
                         .chunk(3, -1)[1]  // one of a fused q, k, v
                         .view({2, 301, 4, 64})
                         .transpose(1, 2);
  const auto every_other_token = randn({2, 4, 602, 64}).slice(2, 0, 602, 2);
  const auto some_heads = randn({2, 9, 301, 64}).narrow(1, 3, 4);
  const auto part_of_head_dim = randn({2, 4, 301, 80}).narrow(3, 16, 64);
  const auto same_for_all = randn({1, 4, 301, 64}).expand({2, 4, 301, 64});
  const auto last_rows = randn({5, 4, 301, 64}).narrow(0, 3, 2);
  const auto fewer_heads = randn({2, 2, 301, 64});
  for (const auto& k : {contiguous, unet, fused, every_other_token, some_heads, part_of_head_dim,
                        same_for_all, last_rows, fewer_heads})
    for (const auto& q : {contiguous, unet}) {
      SCOPED_TRACE(c10::str("strides ", q.strides(), " and ", k.strides()));
      expect_right(q, k);
      EXPECT_TRUE(takes_the_kernels(q, k));
    }
}

TEST_F(AttentionMapCuda, IsRightWhereTheKernelsCannotGo) {
  const auto aligned = randn({2, 4, 301, 64});
  const auto odd_offset = randn({2 * 4 * 301 * 64 + 1}).narrow(0, 1, 2 * 4 * 301 * 64);
  for (const auto& other : {odd_offset.view({2, 4, 301, 64}),
                            randn({2, 4, 301, 68}).narrow(3, 0, 64),  // rows at odd multiples of 8
                            randn({2, 4, 64, 301}).transpose(2, 3)}) {  // innermost stride 301
    expect_right(aligned, other);
    expect_right(other, aligned);
    EXPECT_FALSE(takes_the_kernels(aligned, other));
    EXPECT_FALSE(takes_the_kernels(other, aligned));
  }
}

TEST_F(AttentionMapCuda, TakesEveryScale) {
  const auto q = randn({1, 4, 130, 64}), k = randn({1, 4, 130, 64});
  for (const auto scale : {1.0, 0.3, 1e-3, 0.0, -0.3}) {
    SCOPED_TRACE(scale);
    expect_right(q, k, scale);
    EXPECT_EQ(takes_the_kernels(q, k, scale), scale > 0);
  }
}

// q·k up to 640000 > 65504, fp16's largest. A score s has an fp32 rounding error of about s · 2⁻²²
// (64 products, in any order). So does its weight, at most 1 of a map value of some units.
TEST_F(AttentionMapCuda, DoesNotOverflow) {
  const auto same = torch::full({1, 2, 200, 64}, 100.0, kCuda);
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    expect_right(same.to(dtype), same.to(dtype));
    const auto q = (randn({1, 2, 200, 64}) * 60).to(dtype),
               k = (randn({1, 2, 200, 64}) * 60).to(dtype);
    const auto largest = torch::matmul(q.to(torch::kDouble), k.to(torch::kDouble).transpose(2, 3))
                             .abs()
                             .max()
                             .item<double>();
    expect_right(q, k, {}, 10 * std::ldexp(largest / 8, -22));
  }
}

TEST_F(AttentionMapCuda, LetsNaNThrough) {
  auto q = randn({1, 2, 100, 64});
  q[0][1][70][3] = NAN;
  EXPECT_TRUE(attention_map(q, randn({1, 2, 100, 64})).isnan().all().item<bool>());
}

TEST_F(AttentionMapCuda, IsTheSameInEveryRun) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat}) {
    const auto q = randn({2, 20, 1024, 64}, dtype), k = randn({2, 20, 1024, 64}, dtype);
    const auto first = attention_map(q, k);
    for (int i = 0; i < 20; ++i) EXPECT_TRUE(torch::equal(attention_map(q, k), first));
  }
}

// Of an SDXL UNet's uncond row at 1024, 2048 and 4096 pixels.
TEST_F(AttentionMapCuda, NeedsLittleMemory) {
  for (const auto tokens : {1024, 4096, 16384}) {
    const auto q = randn({1, tokens, 20, 64}).transpose(1, 2);
    EXPECT_TRUE(takes_the_kernels(q, q));
    EXPECT_LE(peak_bytes([&] { return attention_map(q, q); }), 4 * kMiB) << tokens;
  }
}

// 16 MiB of scores, the same of weights, and cuBLAS's workspace (32 MiB on Hopper).
TEST_F(AttentionMapCuda, NeedsBoundedMemoryInBlocksToo) {
  // 1280 MiB of scores.
  const auto q = randn({1, 20, 4096, 64}, torch::kFloat);
  EXPECT_LE(peak_bytes([&] { return attention_map(q, q); }), 96 * kMiB);
}

// The same from 640 MiB of probabilities: the sums, and the workspace of a reduction.
TEST_F(AttentionMapCuda, CopiesNoProbabilities) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat}) {
    const auto p = torch::rand({1, 20, 4096, 4096}, kCuda).to(dtype);
    EXPECT_LE(peak_bytes([&] { return attention_map(p); }), 8 * kMiB) << dtype;
    EXPECT_LT(test::max_diff(attention_map(p), p.sum(2, false, torch::kDouble).mean(1)), 2e-2);
  }
}

TEST_F(AttentionMapCuda, CanBeCapturedInAGraph) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat}) {
    const auto q = randn({1, 8, 331, 160}, dtype), k = randn({1, 8, 331, 160}, dtype);
    // The first call of a process may set things up.
    const auto expected = attention_map(q, k);
    at::cuda::CUDAGraph graph;
    torch::Tensor map;
    {
      const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
      attention_map(q, k);
      graph.capture_begin();
      map = attention_map(q, k);
      graph.capture_end();
    }
    graph.replay();
    EXPECT_TRUE(torch::equal(map, expected)) << dtype;

    q.copy_(randn({1, 8, 331, 160}, dtype));
    graph.replay();
    EXPECT_TRUE(torch::equal(map, attention_map(q, k))) << dtype;
  }
}

TEST_F(AttentionMapCuda, IsExactWhateverTF32AndAutocastSay) {
  const auto q = randn({1, 4, 331, 64}, torch::kFloat), k = randn({1, 4, 331, 64}, torch::kFloat);
  const auto expected = attention_map(q, k);
  auto& context = at::globalContext();
  const auto allowed = context.allowTF32CuBLAS();
  context.setAllowTF32CuBLAS(true);
  at::autocast::set_autocast_enabled(torch::kCUDA, true);
  const auto map = attention_map(q, k);
  at::autocast::set_autocast_enabled(torch::kCUDA, false);
  at::autocast::clear_cache();
  context.setAllowTF32CuBLAS(allowed);
  EXPECT_TRUE(torch::equal(map, expected));
}

}  // namespace
}  // namespace sag

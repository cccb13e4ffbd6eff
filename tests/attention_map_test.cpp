#include "sag/attention_map.h"

#include <atomic>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/device.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::max_diff;

class AttentionMap : public test::BackendTest {};

// Golden toy.json, T2 (ComfyUI 0.3.64). Sums over keys instead of queries would all be 1.
TEST_P(AttentionMap, SumsOverQueriesLikeTheReference) {
  const auto q = test::split_heads(fill({2, 6, 8}, .5, .1, 2), 2).to(device());
  const auto k = test::split_heads(fill({2, 6, 8}, .3, .4, 2), 2).to(device());
  const auto expected = torch::tensor({{1.136692, .892459, .520658, 1.367039, 1.189422, .893730},
                                       {.538254, 1.097633, 1.330495, 1.405875, 1.023347, .604396}});
  EXPECT_LT(max_diff(attention_map(q, k), expected), 2e-5);
}

TEST_P(AttentionMap, MatchesTheNaiveFormAtAnySize) {
  torch::manual_seed(0);
  const std::vector<std::vector<std::int64_t>> shapes = {{1, 1, 1, 8},     {2, 3, 7, 5},
                                                         {3, 8, 64, 40},   {1, 5, 331, 32},
                                                         {2, 4, 1024, 16}, {1, 2, 4099, 8}};
  for (const auto& shape : shapes) {
    const auto q = torch::randn(shape, device()), k = torch::randn(shape, device());
    const auto map = attention_map(q, k, 0.3);
    EXPECT_EQ(map.scalar_type(), torch::kFloat);
    EXPECT_EQ(map.sizes().vec(), (std::vector<std::int64_t>{shape[0], shape[2]}));
    EXPECT_LT(max_diff(map, test::reference_attention_map(q, k, 0.3)), 2e-5) << shape;
    EXPECT_LT(max_diff(map.mean(1), torch::ones({shape[0]})), 1e-5)
        << "the average is 1 at " << shape;
  }
}

// Half-precision inputs are exact in fp32, and so are the sums: what differs is fp32 rounding.
TEST_P(AttentionMap, KeepsFp32ForHalfPrecisionInputs) {
  torch::manual_seed(1);
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    const auto q = torch::randn({2, 4, 100, 32}, device()).to(dtype),
               k = torch::randn({2, 4, 100, 32}, device()).to(dtype);
    const auto map = attention_map(q, k);
    EXPECT_EQ(map.scalar_type(), torch::kFloat);
    EXPECT_LT(max_diff(map, test::reference_attention_map(q, k, 1 / std::sqrt(32.0))), 2e-5)
        << dtype;
  }
}

TEST_P(AttentionMap, DoesNotOverflowInHalfPrecision) {
  const auto q =
      torch::full({1, 1, 8, 64}, 100.0, device()).to(torch::kHalf);  // q·k = 640000 > 65504
  const auto map = attention_map(q, q);
  EXPECT_LT(max_diff(map, torch::ones({1, 8})), 1e-5);
}

TEST_P(AttentionMap, TakesStridedViewsAndSharedKeyHeads) {
  torch::manual_seed(2);
  // As UNets lay it out.
  const auto q = torch::randn({2, 30, 8, 16}, device()).transpose(1, 2);
  const auto k = torch::randn({2, 30, 2, 16}, device()).transpose(1, 2);
  const auto expanded = k.repeat_interleave(4, 1);
  EXPECT_LT(max_diff(attention_map(q, k), test::reference_attention_map(q, expanded, 0.25)), 2e-5);
}

TEST_P(AttentionMap, IsTheSameInEveryRun) {
  torch::manual_seed(3);
  const auto q = torch::randn({2, 8, 700, 40}, device()),
             k = torch::randn({2, 8, 700, 40}, device());
  const auto first = attention_map(q, k);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(torch::equal(attention_map(q, k), first));
}

TEST_P(AttentionMap, IsTheSameFromProbabilities) {
  torch::manual_seed(6);
  const auto q = torch::randn({2, 3, 331, 16}, device()),
             k = torch::randn({2, 3, 331, 16}, device());
  const auto p = torch::matmul(q, k.transpose(2, 3)).mul(0.25).softmax(-1);
  const auto map = attention_map(p);
  EXPECT_EQ(map.scalar_type(), torch::kFloat);
  EXPECT_LT(max_diff(map, attention_map(q, k)), 1e-5);
  const auto strided = p.permute({1, 3, 0, 2}).contiguous().permute({2, 0, 3, 1});
  EXPECT_LT(max_diff(attention_map(strided), map), 1e-5);
  EXPECT_EQ(attention_map(p.to(torch::kDouble)).scalar_type(), torch::kDouble);
  EXPECT_EQ(attention_map(p.narrow(2, 0, 7)).sizes(), map.sizes());
}

// A sum in half precision would stop growing at 2048 of its smallest steps.
TEST_P(AttentionMap, AddsProbabilitiesInFp32) {
  torch::manual_seed(7);
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    const auto p = torch::rand({2, 3, 1500, 70}, device()).to(dtype);
    const auto map = attention_map(p);
    EXPECT_EQ(map.scalar_type(), torch::kFloat);
    EXPECT_LT(max_diff(map, p.to(torch::kDouble).sum(2).mean(1)), 750 * 1e-6) << dtype;
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(torch::equal(attention_map(p), map));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, AttentionMap, test::backends(), test::backend_name);

// Runs `body` on the given number of threads.
template <typename Body>
auto on_threads(int count, const Body& body) {
  const auto before = at::get_num_threads();
  at::set_num_threads(count);
  auto result = body();
  at::set_num_threads(before);
  return result;
}

TEST(AttentionMapCpu, IsTheSameOnAnyNumberOfThreads) {
  torch::manual_seed(4);
  for (const auto dtype : {torch::kFloat, torch::kBFloat16})
    for (const auto& shape : std::vector<std::vector<std::int64_t>>{
             {1, 8, 64, 160}, {1, 3, 1999, 40}, {3, 5, 331, 7}, {1, 1, 997, 64}}) {
      const auto q = torch::randn(shape).to(dtype), k = torch::randn(shape).to(dtype);
      const auto map = [&] { return attention_map(q, k); };
      const auto one = on_threads(1, map);
      const auto p = torch::matmul(q, k.transpose(2, 3)).softmax(-1);
      const auto sums = [&] { return attention_map(p); };
      const auto one_sum = on_threads(1, sums);
      for (const auto threads : {2, 3, 7}) {
        EXPECT_TRUE(torch::equal(on_threads(threads, map), one)) << shape << " on " << threads;
        EXPECT_TRUE(torch::equal(on_threads(threads, sums), one_sum)) << shape << " on " << threads;
      }
    }
}

TEST(AttentionMapCpu, LeavesAutocastAside) {
  torch::manual_seed(5);
  const auto q = torch::randn({1, 4, 331, 64}), k = torch::randn({1, 4, 331, 64});
  const auto expected = attention_map(q, k);
  at::autocast::set_autocast_enabled(torch::kCPU, true);
  const auto map = attention_map(q, k);
  at::autocast::set_autocast_enabled(torch::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_TRUE(torch::equal(map, expected));
}

// Where the processor can, PyTorch then makes fp32 products in bf16.
TEST(AttentionMapCpu, IsExactWhateverTheProcessSaysOfFp32Products) {
  torch::manual_seed(6);
  const auto q = 3 * torch::randn({1, 4, 331, 64}), k = torch::randn({1, 4, 331, 64});
  const auto expected = attention_map(q.to(torch::kDouble), k.to(torch::kDouble));
  const auto off = [&] { return max_diff(attention_map(q, k), expected); };
  EXPECT_LT(off(), 1e-4);
  auto& context = at::globalContext();
  const auto matmul = [](auto backend) { return std::pair(backend, at::Float32Op::MATMUL); };
  for (const auto& [backend, op] : {matmul(at::Float32Backend::MKLDNN),
                                    std::pair(at::Float32Backend::GENERIC, at::Float32Op::ALL)})
    for (const auto precision : {at::Float32Precision::BF16, at::Float32Precision::TF32}) {
      const auto before = context.float32Precision(backend, op);
      context.setFloat32Precision(backend, op, precision);
      EXPECT_LT(off(), 1e-4);
      EXPECT_EQ(attention_map(q, k).scalar_type(), torch::kFloat);
      context.setFloat32Precision(backend, op, before);
    }
}

// While it exists, counts the memory that tensors on the CPU take.
class CpuMemory final : public c10::Allocator {
 public:
  CpuMemory() { c10::SetCPUAllocator(this, 100); }
  ~CpuMemory() override { c10::SetCPUAllocator(allocator_, 100); }

  c10::DataPtr allocate(std::size_t bytes) override {
    auto block = std::make_unique<Block>(*this, bytes, allocator_->allocate(bytes));
    const auto now = bytes_ += bytes;
    for (auto peak = peak_.load(); now > peak && !peak_.compare_exchange_weak(peak, now);) {
    }
    auto* const data = block->data.get();
    return {data, block.release(), &free_block, torch::kCPU};
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
  std::size_t peak() const { return peak_; }

 private:
  struct Block {
    Block(CpuMemory& owner, std::size_t bytes, c10::DataPtr data)
        : owner(owner), bytes(bytes), data(std::move(data)) {}
    CpuMemory& owner;
    std::size_t bytes;
    c10::DataPtr data;
  };
  static void free_block(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    block->owner.bytes_ -= block->bytes;
  }

  c10::Allocator* allocator_ = c10::GetCPUAllocator();
  std::atomic<std::size_t> bytes_ = 0, peak_ = 0;
};

TEST(AttentionMapCpu, NeedsLittleMemory) {
  // 128 MiB of scores.
  const auto q = torch::randn({1, 2, 4096, 16});
  const auto peak = on_threads(2, [&q] {
    const CpuMemory memory;
    attention_map(q, q);
    return memory.peak();
  });
  // A block of scores, 4 MiB, and the same of weights; and single rows.
  EXPECT_LE(peak, std::size_t{9} << 20);
  EXPECT_GE(peak, std::size_t{8} << 20) << "is it counted?";
}

// 64 MiB of half-precision probabilities: a copy in fp32 would be 128.
TEST(AttentionMapCpu, CopiesNoProbabilities) {
  for (const auto dtype : {torch::kHalf, torch::kFloat}) {
    const auto p = torch::zeros({1, 2, 4096, 4096}, dtype);
    const auto peak = on_threads(2, [&p] {
      const CpuMemory memory;
      attention_map(p);
      return memory.peak();
    });
    EXPECT_LE(peak, std::size_t{5} << 20) << dtype;
  }
}

TEST(AttentionMapArguments, AreChecked) {
  const auto q = torch::zeros({2, 4, 6, 8});
  EXPECT_THROW(attention_map(torch::zeros({2, 6, 8}), q), c10::ValueError);
  EXPECT_THROW(attention_map(q, torch::zeros({2, 4, 6, 9})), c10::ValueError);
  EXPECT_THROW(attention_map(q, torch::zeros({1, 4, 6, 8})), c10::ValueError);
  EXPECT_THROW(attention_map(q, torch::zeros({2, 3, 6, 8})), c10::ValueError);
  EXPECT_THROW(attention_map(q, torch::zeros({2, 4, 0, 8})), c10::ValueError);
  EXPECT_THROW(attention_map(q, q.to(torch::kHalf)), c10::TypeError);
  EXPECT_THROW(attention_map(q.to(torch::kInt), q.to(torch::kInt)), c10::TypeError);
  EXPECT_THROW(attention_map(q, q, NAN), c10::ValueError);
  EXPECT_THROW(attention_map(torch::zeros({2, 6, 6})), c10::ValueError);
  EXPECT_THROW(attention_map(torch::zeros({2, 4, 0, 6})), c10::ValueError);
  EXPECT_THROW(attention_map(torch::zeros({2, 4, 6, 6}, torch::kInt)), c10::TypeError);
}

}  // namespace
}  // namespace sag

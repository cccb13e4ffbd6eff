#include "unet/group_norm.h"

#include <gtest/gtest.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/irparser.h>
#include <torch/torch.h>

#include "support/device.h"
#include "support/reference.h"

namespace sag {
namespace {

using test::max_diff;
using torch::jit::Graph;

const torch::Device kCuda(torch::kCUDA);

torch::Tensor channels_last(const torch::Tensor& x) {
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

// Group norm in fp64, of the same values.
torch::Tensor reference(const torch::Tensor& x, std::int64_t groups, const torch::Tensor& weight,
                        const torch::Tensor& bias, double eps, bool silu) {
  const auto wide = [](const torch::Tensor& t) { return t.cpu().to(torch::kDouble).contiguous(); };
  const auto y = at::group_norm(wide(x), groups, wide(weight), wide(bias), eps);
  return silu ? at::silu(y) : y;
}

struct Input {
  torch::Tensor x, weight, bias;
};

Input make_input(at::IntArrayRef shape, torch::Device device, torch::ScalarType dtype,
                 double offset = 0) {
  const auto normal = [&](at::IntArrayRef sizes) { return torch::randn(sizes); };
  const auto place = [&](const torch::Tensor& t) { return t.to(device, dtype); };
  return {channels_last(place(normal(shape) + offset)), place(1 + 0.3 * normal({shape[1]})),
          place(0.3 * normal({shape[1]}))};
}

TEST(GroupNorm, IsLibTorchsOnTheCpu) {
  torch::manual_seed(0);
  const auto [x, weight, bias] = make_input({2, 24, 7, 5}, torch::kCPU, torch::kFloat);
  const auto y = at::group_norm(x, 6, weight, bias, 1e-5);
  EXPECT_TRUE(torch::equal(fused_group_norm(x, 6, weight, bias, 1e-5, false), y));
  EXPECT_TRUE(torch::equal(fused_group_norm(x, 6, weight, bias, 1e-5, true), at::silu(y)));
  EXPECT_TRUE(torch::equal(fused_group_norm(x, 6, {}, {}, 1e-5, false),
                           at::group_norm(x, 6, {}, {}, 1e-5)));
}

class GroupNormCuda : public testing::Test {
 protected:
  void SetUp() override {
    SAG_SKIP_WITHOUT_CUDA(kCuda);
    torch::manual_seed(0);
  }
};

TEST_F(GroupNormCuda, MatchesTheReferenceAtEveryShape) {
  struct Case {
    std::vector<std::int64_t> shape;
    std::int64_t groups;
  };
  const std::vector<Case> cases = {
      {{2, 320, 64, 64}, 32}, {{1, 1280, 8, 8}, 32}, {{3, 2560, 16, 16}, 32},
      {{2, 8, 1, 1}, 1},      {{1, 24, 17, 9}, 4},   {{5, 40, 3, 331}, 8},
      {{1, 4096, 2, 3}, 32},  {{2, 64, 5, 7}, 64},   {{2, 64, 5, 7}, 1},
      {{1, 960, 33, 31}, 32}, {{33, 16, 2, 2}, 4},   {{1, 8, 512, 512}, 2}};
  for (const auto& [shape, groups] : cases)
    for (const auto dtype : {torch::kHalf, torch::kBFloat16})
      for (const bool silu : {false, true}) {
        SCOPED_TRACE(c10::str(shape, ", ", groups, " groups, ", dtype, silu ? ", SiLU" : ""));
        const auto [x, weight, bias] = make_input(shape, kCuda, dtype);
        const auto y = fused_group_norm(x, groups, weight, bias, 1e-5, silu);
        EXPECT_EQ(y.scalar_type(), dtype);
        EXPECT_TRUE(y.is_contiguous(at::MemoryFormat::ChannelsLast));
        const auto expected = reference(x, groups, weight, bias, 1e-5, silu);
        // A little more than half a unit in the last place of the largest value.
        const double rounding = dtype == torch::kHalf ? 0x1p-11 : 0x1p-8;
        EXPECT_LT(max_diff(y.cpu(), expected),
                  1.1 * rounding * (1 + expected.abs().max().item<double>()));
      }
}

TEST_F(GroupNormCuda, HoldsWhereValuesLieFarFromZero) {
  const auto [x, weight, bias] = make_input({2, 64, 32, 32}, kCuda, torch::kHalf, 1000.0);
  const auto y = fused_group_norm(x, 32, weight, bias, 1e-5, false);
  EXPECT_LT(max_diff(y.cpu(), reference(x, 32, weight, bias, 1e-5, false)), 5e-3);
}

TEST_F(GroupNormCuda, GivesTheSameBitsEveryTime) {
  const auto [x, weight, bias] = make_input({2, 320, 64, 64}, kCuda, torch::kHalf);
  const auto first = fused_group_norm(x, 32, weight, bias, 1e-5, true);
  for (int i = 0; i < 5; ++i)
    EXPECT_TRUE(torch::equal(fused_group_norm(x, 32, weight, bias, 1e-5, true), first));
}

TEST_F(GroupNormCuda, DoesNotDependOnTheOtherPictures) {
  const auto [x, weight, bias] = make_input({2, 64, 16, 16}, kCuda, torch::kHalf);
  const auto both = fused_group_norm(x, 32, weight, bias, 1e-5, true);
  const auto second = fused_group_norm(channels_last(x.slice(0, 1)), 32, weight, bias, 1e-5, true);
  EXPECT_LT(max_diff(both.slice(0, 1), second), 2e-3);
}

TEST_F(GroupNormCuda, IsLibTorchsWhereTheKernelDoesNotFit) {
  const auto [x, weight, bias] = make_input({2, 24, 8, 8}, kCuda, torch::kHalf);
  const auto expect_plain = [&](const torch::Tensor& x, const std::optional<torch::Tensor>& weight,
                                const std::optional<torch::Tensor>& bias) {
    EXPECT_TRUE(torch::equal(fused_group_norm(x, 4, weight, bias, 1e-5, true),
                             at::silu(at::group_norm(x, 4, weight, bias, 1e-5))));
  };
  const auto wide = [](const torch::Tensor& t) { return t.to(torch::kFloat); };
  // Another layout.
  expect_plain(x.contiguous(), weight, bias);
  expect_plain(wide(x), wide(weight), wide(bias));
  expect_plain(x, {}, {});
  expect_plain(channels_last(x.slice(1, 0, 20)), weight.slice(0, 0, 20), bias.slice(0, 0, 20));
  // With gaps.
  expect_plain(x.slice(1, 0, 16), weight.slice(0, 0, 16), bias.slice(0, 0, 16));
  // Empty.
  expect_plain(x.slice(0, 0, 0), weight, bias);
}

const char* const kNorms = R"IR(
  graph(%x : Tensor, %weight : Tensor, %bias : Tensor):
    %groups : int = prim::Constant[value=4]()
    %eps : float = prim::Constant[value=0.001]()
    %yes : bool = prim::Constant[value=1]()
    %a : Tensor = aten::group_norm(%x, %groups, %weight, %bias, %eps, %yes)
    %b : Tensor = aten::silu(%a)
    %c : Tensor = aten::group_norm(%b, %groups, %weight, %bias, %eps, %yes)
    %d : Tensor = aten::silu_(%c)
    %e : Tensor = aten::group_norm(%d, %groups, %weight, %bias, %eps, %yes)
    %f : Tensor = aten::silu(%e)
    %g : Tensor = aten::mul(%e, %f)
    return (%g))IR";

torch::Tensor run(const std::shared_ptr<Graph>& graph, const Input& input) {
  graph->lint();
  torch::jit::GraphFunction function(c10::QualifiedName("graph"), graph->copy(), nullptr,
                                     torch::jit::ExecutorExecutionMode::SIMPLE);
  std::vector<c10::IValue> stack = {input.x, input.weight, input.bias};
  function.run(stack);
  return stack.back().toTensor();
}

TEST(FuseGroupNorms, TakesTheSiluAlongUnlessTheNormIsUsedOtherwise) {
  auto graph = std::make_shared<Graph>();
  torch::jit::parseIR(kNorms, graph.get());
  const auto before = graph->copy();
  fuse_group_norms(*graph);
  std::map<std::string, int> count;
  for (const auto* node : graph->nodes()) ++count[node->kind().toQualString()];
  EXPECT_EQ(count["sag::fused_group_norm"], 3);
  EXPECT_EQ(count["aten::group_norm"], 0);
  EXPECT_EQ(count["aten::silu"] + count["aten::silu_"], 1);

  torch::manual_seed(0);
  const auto input = make_input({2, 8, 5, 3}, torch::kCPU, torch::kFloat);
  EXPECT_TRUE(torch::equal(run(graph, input), run(before, input)));
}

TEST_F(GroupNormCuda, RunsInAGraph) {
  auto graph = std::make_shared<Graph>();
  torch::jit::parseIR(kNorms, graph.get());
  const auto before = graph->copy();
  fuse_group_norms(*graph);
  const auto input = make_input({2, 8, 5, 3}, kCuda, torch::kHalf);
  const auto wide = [](const torch::Tensor& t) { return t.cpu().to(torch::kFloat); };
  const auto expected = run(before, {wide(input.x), wide(input.weight), wide(input.bias)});
  const auto largest = expected.abs().max().item<double>();
  EXPECT_LT(max_diff(run(graph, input).cpu(), expected), 5e-3 * largest);
}

}  // namespace
}  // namespace sag

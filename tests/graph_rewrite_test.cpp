#include "unet/graph_rewrite.h"

#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/irparser.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/attention_scope.h"
#include "sag/step_context.h"
#include "support/torchscript_fixture.h"
#include "unet/attention_nodes.h"
#include "unet/attention_sites.h"
#include "unet/flatten.h"

namespace sag {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using torch::jit::Graph;

std::shared_ptr<Graph> parse(const std::string& ir) {
  auto graph = std::make_shared<Graph>();
  torch::jit::parseIR(ir, graph.get(), /*parse_tensor_constants=*/true);
  return graph;
}

torch::Tensor run(const std::shared_ptr<Graph>& graph, std::vector<c10::IValue> stack) {
  graph->lint();
  torch::jit::GraphFunction function(c10::QualifiedName("graph"), graph->copy(), nullptr,
                                     torch::jit::ExecutorExecutionMode::SIMPLE);
  function.run(stack);
  return stack.back().toTensor();
}

// Adds a constant node at the front of the graph: parseIR cannot read tensors.
torch::jit::Value* add_constant(Graph& graph, const torch::Tensor& value) {
  torch::jit::WithInsertPoint front(graph.block()->nodes().front());
  return graph.insertConstant(value);
}

const char* const kAttention = R"IR(
  graph(%q : Tensor, %k : Tensor, %v : Tensor):
    %none : NoneType = prim::Constant()
    %p : float = prim::Constant[value=0.]()
    %no : bool = prim::Constant[value=0]()
    %scale : float = prim::Constant[value=0.25]()
    %out : Tensor = aten::scaled_dot_product_attention(%q, %k, %v, %none, %p, %no, %scale, %no)
    return (%out))IR";

// Only the condition that asks for a reason against the fast path is PyTorch's; others are the
// model's.
TEST(LeaveFastPaths, TakesNoOtherBranchForPyTorchs) {
  const auto graph_with = [](const std::string& question) {
    return parse(R"IR(
  graph(%x : Tensor, %mask : Tensor, %reason : str, %skip : bool):
    %zero : int = prim::Constant[value=0]()
    %yes : bool = prim::Constant[value=1]()
    %length : int = aten::len(%reason)
    %has_text : bool = aten::gt(%length, %zero)
    %go : bool = aten::__not__()IR" +
                 question + R"IR()
    %out : Tensor = prim::If(%go)
      block0():
        %nested : Tensor = aten::_nested_tensor_from_mask(%x, %mask, %yes)
        -> (%nested)
      block1():
        -> (%x)
    return (%out))IR");
  };
  const auto x = torch::ones({2, 3, 4});
  const auto mask = torch::ones({2, 3}, torch::kBool);
  for (const auto& [question, is_pytorchs] :
       {std::pair{"%has_text", true}, std::pair{"%skip", false}}) {
    const auto graph = graph_with(question);
    EXPECT_TRUE(run(graph, {x, mask, "", false}).is_nested());
    leave_fast_paths(*graph);
    EXPECT_EQ(run(graph, {x, mask, "", false}).is_nested(), !is_pytorchs) << question;
  }
}

TEST(LetViewsCopy, MergesChannelsAndPlacesOfAPictureWithChannelsLast) {
  const auto graph = parse(R"IR(
  graph(%x : Tensor, %sizes : int[], %like : Tensor):
    %a : Tensor = aten::view(%x, %sizes)
    %b : Tensor = aten::view_as(%x, %like)
    %c : Tensor = aten::mul(%a, %b)
    return (%c))IR");
  const auto x = torch::rand({2, 4, 3, 5}), like = torch::empty({2, 60});
  const auto last = x.contiguous(at::MemoryFormat::ChannelsLast);
  const c10::List<std::int64_t> sizes({2, -1});
  EXPECT_ANY_THROW(run(graph, {last, sizes, like}));
  let_views_copy(*graph);
  EXPECT_TRUE(torch::equal(run(graph, {last, sizes, like}), x.flatten(1) * x.flatten(1)));
}

TEST(Flatten, FindsThePathOfEveryAttentionThoughTheyShareAClass) {
  const auto module = test::make_torchscript_unet();
  const auto flat = flatten(module);
  EXPECT_THAT(flat.attention_paths, ElementsAre("input_blocks.1.1.transformer_blocks.0.attn1",
                                                "input_blocks.1.1.transformer_blocks.0.attn2",
                                                "middle_block.1.transformer_blocks.0.attn1"));
  EXPECT_THAT(flat.graph->toString(), Not(HasSubstr("CallMethod")));
  EXPECT_THAT(flat.graph->toString(), Not(HasSubstr("sag_path")));
}

TEST(Flatten, LeavesTheModuleAlone) {
  const auto module = test::make_torchscript_unet();
  const auto before = module.dump_to_str(true, false, false);
  const auto flat = flatten(module);
  hook_attention(attention_nodes(*flat.graph)[2], "middle.0.0");
  EXPECT_EQ(module.dump_to_str(true, false, false), before);
}

TEST(SelfAttentionSites, FollowQAndKToTheirProjectionsWhereThereIsNoPath) {
  const auto graph = parse(R"IR(
  graph(%self : Tensor, %x : Tensor, %context : Tensor, %w : Tensor, %w3 : Tensor):
    %none : NoneType = prim::Constant()
    %zero : float = prim::Constant[value=0.]()
    %no : bool = prim::Constant[value=0]()
    %one : int = prim::Constant[value=1]()
    %two : int = prim::Constant[value=2]()
    %three : int = prim::Constant[value=3]()
    %half : int = prim::Constant[value=5]()
    %x16 : Tensor = aten::to(%x, %half, %no, %no, %none)
    %q1 : Tensor = aten::linear(%x, %w, %none)
    %q : Tensor = aten::transpose(%q1, %one, %two)
    %k1 : Tensor = aten::linear(%x16, %w, %none)
    %k : Tensor = aten::transpose(%k1, %one, %two)
    %self_attention : Tensor = aten::scaled_dot_product_attention(%q, %k, %k, %none, %zero, %no, %none, %no)
    %c1 : Tensor = aten::linear(%context, %w, %none)
    %c : Tensor = aten::transpose(%c1, %one, %two)
    %cross : Tensor = aten::scaled_dot_product_attention(%q, %c, %c, %none, %zero, %no, %none, %no)
    %qkv : Tensor = aten::linear(%cross, %w3, %none)
    %chunks : Tensor[] = aten::chunk(%qkv, %three, %two)
    %a : Tensor, %b : Tensor, %d : Tensor = prim::ListUnpack(%chunks)
    %fused : Tensor = aten::scaled_dot_product_attention(%a, %b, %d, %none, %zero, %no, %none, %no)
    %sum : Tensor = aten::add(%self_attention, %fused, %one)
    return (%sum))IR");
  const auto sites = self_attention_sites({graph, {"", "", ""}});
  ASSERT_EQ(sites.size(), 2u);
  EXPECT_EQ(sites[0].name, "#0");
  EXPECT_EQ(sites[1].name, "#2");
  EXPECT_EQ(sites[1].ordinal, 2);
  EXPECT_EQ(sites[1].path, "");
}

TEST(HookAttention, KeepsEveryInputAndAddsTheSite) {
  ensure_ops_registered();
  const auto graph = parse(kAttention);
  const auto q = torch::randn({2, 3, 5, 4}), k = torch::randn({2, 3, 7, 4}),
             v = torch::randn({2, 3, 7, 4});
  const auto before = run(graph, {q, k, v});
  hook_attention(attention_nodes(*graph).at(0), "middle.0.0");
  EXPECT_TRUE(torch::equal(run(graph, {q, k, v}), before));
  EXPECT_TRUE(attention_nodes(*graph).empty());

  StepContext step(1.0, 0, 8, 8);
  Pass pass;
  pass.step = &step;
  AttentionCall seen;
  const AttentionHook hook = [&](const AttentionCall& call, const Pass&, const NextAttention&) {
    seen = call;
    return torch::zeros_like(call.q);
  };
  const AttentionScope scope({{"middle.0.0", hook, {}}}, pass);
  EXPECT_EQ(run(graph, {q, k, v}).abs().max().item<float>(), 0);
  EXPECT_TRUE(torch::equal(seen.k, k));
  EXPECT_EQ(seen.scale, 0.25);
  EXPECT_FALSE(seen.attn_mask.has_value());
}

TEST(UsePlainConvolutions, DropsTheRecordedSwitchesAndKeepsTheResult) {
  const auto graph = parse(R"IR(
  graph(%x : Tensor, %w : Tensor, %b : Tensor):
    %one : int = prim::Constant[value=1]()
    %two : int = prim::Constant[value=2]()
    %zero : int = prim::Constant[value=0]()
    %no : bool = prim::Constant[value=0]()
    %yes : bool = prim::Constant[value=1]()
    %ones : int[] = prim::ListConstruct(%one, %one)
    %twos : int[] = prim::ListConstruct(%two, %two)
    %zeros : int[] = prim::ListConstruct(%zero, %zero)
    %y : Tensor = aten::_convolution(%x, %w, %b, %twos, %ones, %ones, %no, %zeros, %one, %no, %no, %yes, %yes)
    %z : Tensor = aten::_convolution(%y, %w, %b, %twos, %ones, %ones, %yes, %ones, %one, %no, %no, %yes, %yes)
    return (%z))IR");
  const std::vector<c10::IValue> inputs = {torch::randn({1, 4, 9, 9}), torch::randn({4, 4, 3, 3}),
                                           torch::randn({4})};
  const auto before = run(graph, inputs);
  use_plain_convolutions(*graph);
  EXPECT_THAT(graph->toString(), HasSubstr("aten::conv2d"));
  EXPECT_THAT(graph->toString(), HasSubstr("aten::conv_transpose2d"));
  EXPECT_THAT(graph->toString(), Not(HasSubstr("_convolution")));
  EXPECT_TRUE(torch::equal(run(graph, inputs), before));
}

TEST(MoveConstants, MapsRecordedDevices) {
  const auto graph = parse(R"IR(
  graph(%n : int):
    %none : NoneType = prim::Constant()
    %device : Device = prim::Constant[value="cuda:3"]()
    %out : Tensor = aten::arange(%n, %none, %none, %device, %none)
    return (%out))IR");
  move_constants(*graph, torch::kCPU);
  EXPECT_EQ(run(graph, {3}).numel(), 3);
}

TEST(ConvertConstants, NarrowsWeightsButNotFrequencies) {
  const auto graph = parse(R"IR(
  graph(%t : Tensor, %frequencies : Tensor, %w : Tensor):
    %none : NoneType = prim::Constant()
    %angle : Tensor = aten::mul(%t, %frequencies)
    %wt : Tensor = aten::t(%w)
    %out : Tensor = aten::matmul(%angle, %wt)
    return (%out))IR");
  const auto frequencies = torch::rand({4}), w = torch::randn({3, 4});
  auto* kept = add_constant(*graph, frequencies);
  auto* weight = add_constant(*graph, w);
  graph->inputs()[1]->replaceAllUsesWith(kept);
  graph->inputs()[2]->replaceAllUsesWith(weight);
  EXPECT_EQ(constant_weights_dtype(*graph), torch::kFloat);

  convert_constants(*graph, torch::kHalf);
  follow_weights(*graph);
  const auto t = torch::full({2, 4}, 800.f);
  const auto out = run(graph, {t, torch::Tensor(), torch::Tensor()});
  EXPECT_EQ(out.scalar_type(), torch::kHalf);
  const auto expected = torch::matmul((t * frequencies).to(torch::kHalf), w.to(torch::kHalf).t());
  EXPECT_TRUE(torch::equal(out, expected));
  convert_constants(*graph, torch::kDouble);
  EXPECT_EQ(run(graph, {t, torch::Tensor(), torch::Tensor()}).scalar_type(), torch::kDouble);
}

TEST(ReplaceRecordedDtype, ChangesCastsToTheFilesDtypeOnly) {
  const auto graph = parse(R"IR(
  graph(%x : Tensor):
    %none : NoneType = prim::Constant()
    %no : bool = prim::Constant[value=0]()
    %five : int = prim::Constant[value=5]()
    %half : Tensor = aten::to(%x, %five, %no, %no, %none)
    %out : Tensor = aten::mul(%half, %five)
    return (%out))IR");
  replace_recorded_dtype(*graph, torch::kHalf, torch::kBFloat16);
  const auto out = run(graph, {torch::ones({2})});
  EXPECT_EQ(out.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(out[0].item<float>(), 5);
}

TEST(FollowWeights, CastsActivationsAndComputedBiases) {
  const auto graph = parse(R"IR(
  graph(%x : Tensor, %w : Tensor, %g : Tensor):
    %none : NoneType = prim::Constant()
    %two : int = prim::Constant[value=2]()
    %one : int = prim::Constant[value=1]()
    %eps : float = prim::Constant[value=0.001]()
    %no : bool = prim::Constant[value=0]()
    %y : Tensor = aten::group_norm(%x, %two, %g, %none, %eps, %no)
    %z : Tensor = aten::linear(%y, %w, %none)
    %out : Tensor = aten::addmm(%x, %z, %w, %one, %one)
    return (%out))IR");
  follow_weights(*graph);
  const auto w = torch::eye(4);
  const auto run_in = [&](torch::ScalarType x, torch::ScalarType weights) {
    return run(graph, {torch::ones({2, 4}, x), w.to(weights), torch::ones({4}, weights)})
        .scalar_type();
  };
  EXPECT_EQ(run_in(torch::kFloat, torch::kHalf), torch::kHalf);
  EXPECT_EQ(run_in(torch::kHalf, torch::kFloat), torch::kFloat);
}

// A cast to fp32 that something else reads stays, as does that of a norm without weights.
TEST(FollowWeights, DropsCastsOfAttentionThatTheNextLayerTakesBack) {
  const auto graph = parse(R"IR(
  graph(%q : Tensor, %weight : Tensor):
    %none : NoneType = prim::Constant()
    %no : bool = prim::Constant[value=0]()
    %one : int = prim::Constant[value=1]()
    %two : int = prim::Constant[value=2]()
    %zero : float = prim::Constant[value=0.]()
    %float : int = prim::Constant[value=6]()
    %a : Tensor = aten::scaled_dot_product_attention(%q, %q, %q, %none, %zero, %no, %none, %no)
    %b : Tensor = aten::transpose(%a, %one, %two)
    %dropped : Tensor = aten::to(%b, %float, %no, %no, %none)
    %c : Tensor = aten::linear(%dropped, %weight, %none)
    %of_another : Tensor = aten::to(%c, %float, %no, %no, %none)
    %d : Tensor = aten::linear(%of_another, %weight, %none)
    %read : Tensor = aten::to(%b, %float, %no, %no, %none)
    %e : Tensor = aten::linear(%read, %weight, %none)
    %f : Tensor = aten::add(%read, %e, %one)
    %normed : Tensor = aten::to(%b, %float, %no, %no, %none)
    %four : int = prim::Constant[value=4]()
    %sizes : int[] = prim::ListConstruct(%four)
    %g : Tensor = aten::layer_norm(%normed, %sizes, %none, %none, %zero, %no)
    %h : Tensor = aten::add(%d, %f, %one)
    %out : Tensor = aten::add(%h, %g, %one)
    return (%out))IR");
  torch::manual_seed(0);
  auto* weight = add_constant(*graph, torch::randn({4, 4}).to(torch::kBFloat16));
  graph->inputs()[1]->replaceAllUsesWith(weight);
  const auto count_casts = [&] {
    const auto nodes = graph->nodes();
    return std::count_if(nodes.begin(), nodes.end(), [](const torch::jit::Node* node) {
      return node->kind() == c10::aten::to;
    });
  };
  ASSERT_EQ(count_casts(), 4);
  follow_weights(*graph);
  EXPECT_EQ(count_casts(), 3);

  const auto q = torch::randn({1, 2, 3, 4}).to(torch::kBFloat16);
  const auto w = torch::jit::toIValue(weight)->toTensor();
  const auto b = torch::scaled_dot_product_attention(q, q, q).transpose(1, 2);
  const auto d = torch::linear(torch::linear(b, w), w);
  const auto normed = torch::layer_norm(b.to(torch::kFloat), {4}, {}, {}, 0);
  const auto expected = d + (b.to(torch::kFloat) + torch::linear(b, w)) + normed;
  EXPECT_TRUE(torch::equal(run(graph, {q, torch::Tensor()}), expected));
}

// Buffers are never narrowed, so statistics stay wide next to half weights.
TEST(FollowWeights, CastsStatistics) {
  const auto graph = parse(R"IR(
  graph(%x : Tensor, %w : Tensor, %mean : Tensor, %var : Tensor):
    %none : NoneType = prim::Constant()
    %eps : float = prim::Constant[value=0.001]()
    %no : bool = prim::Constant[value=0]()
    %slope : Tensor = aten::abs(%w)
    %a : Tensor = aten::batch_norm(%x, %w, %w, %mean, %var, %no, %eps, %eps, %no)
    %b : Tensor = aten::prelu(%a, %slope)
    %c : Tensor = aten::instance_norm(%b, %none, %none, %mean, %var, %no, %eps, %eps, %no)
    return (%c))IR");
  follow_weights(*graph);
  torch::manual_seed(0);
  const auto x = torch::randn({2, 4, 5, 3}), w = torch::randn({4}), mean = torch::randn({4}),
             var = torch::rand({4}) + 0.5;
  const auto wide = run(graph, {x, w, mean, var});
  const auto half = run(graph, {x, w.to(torch::kHalf), mean, var});
  EXPECT_EQ(half.scalar_type(), torch::kHalf);
  EXPECT_LT((half - wide).abs().max().item<double>(), 1e-2 * wide.abs().max().item<double>());
}

}  // namespace
}  // namespace sag

// Attention that files compute step by step, and in several calls: what hooks and SAG see of it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/passes/freeze_module.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "sag/attention_scope.h"
#include "sag/cfg_guider.h"
#include "sag/sample.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "sag/step_context.h"
#include "sag/torchscript_unet.h"
#include "support/files.h"
#include "support/reference.h"
#include "support/torchscript_fixture.h"

namespace sag {
namespace {

using test::make_torchscript_unet;
using test::max_diff;
using ::testing::HasSubstr;

const std::string kGolden = test::kGoldenDir + "attention/";

// ---- what a run with SAG gives

struct Run {
  torch::Tensor samples;
  GuiderReport report;
};

struct RunOptions {
  std::int64_t images = 2, context_width = test::kContextWidth, height = 7, width = 6;
  std::int64_t max_rows = 0;
  AttentionSite site = {"middle", 0, 0};
  bool one_pass = false;
};

Run run_sag(const std::shared_ptr<const UNet>& unet, const RunOptions& options = {}) {
  const ModelPatcher model(unet, ModelSampling::discrete(Prediction::eps));
  const auto guided = apply_self_attention_guidance(
      model, {.scale = 1.0, .one_pass = options.one_pass, .site = options.site});
  torch::manual_seed(4);
  const auto noise = torch::randn({options.images, 4, options.height, options.width});
  const Conditioning prompt{.context = torch::randn({1, 5, options.context_width})},
      negative{.context = torch::randn({1, 5, options.context_width})};
  const auto sigmas = get_sigmas("karras", model.model_sampling(), 4);
  CfgGuider guider(guided, {prompt}, {negative}, {.cond_scale = 3.0, .max_rows = options.max_rows});
  auto samples = sample(guider, noise, {.sigmas = sigmas});
  return {samples, guider.report()};
}

// Relative to the largest value.
double difference(const torch::Tensor& a, const torch::Tensor& b) {
  return max_diff(a, b) / b.abs().max().item<double>();
}

void expect_same_guided_run(const Run& run, const Run& expected) {
  EXPECT_EQ(run.report.guided(), 4);
  EXPECT_LT(difference(run.samples, expected.samples), 2e-5);
}

void expect_nothing_guided(const Run& run, const std::string& reason) {
  EXPECT_EQ(run.report.guided(), 0);
  const auto skipped = run.report.skipped();
  ASSERT_EQ(skipped.size(), 1u);
  EXPECT_THAT(skipped.begin()->first, HasSubstr(reason));
}

// ---- what a hook sees

struct Seen {
  torch::Tensor out;
  std::vector<AttentionCall> calls;
  std::vector<StepContext::Record> maps;
};

UNetInput input(std::int64_t rows = 2, std::int64_t context_width = test::kContextWidth) {
  torch::manual_seed(2);
  return {torch::randn({rows, 4, 6, 5}),
          torch::linspace(1, 900, rows),
          torch::randn({rows, 3, context_width}),
          {},
          {}};
}

// Runs the UNet with a hook that keeps its calls and the map of all rows.
Seen look(const UNet& unet, const UNetInput& in, const AttentionHook& replace = {},
          const std::string& site = "middle.0.0") {
  Seen seen;
  const Owner owner("test");
  const AttentionHook hook = [&](const AttentionCall& call, const Pass& pass,
                                 const NextAttention& next) {
    seen.calls.push_back(call);
    for (const auto& rows : pass.groups)
      pass.step->record(
          owner, rows,
          call.probabilities.defined()
              ? attention_map(pass.select(rows, call.probabilities))
              : attention_map(pass.select(rows, call.q), pass.select(rows, call.k), call.scale));
    return replace ? replace(call, pass, next) : next(call);
  };
  StepContext step(1.0, 0, in.x.size(2), in.x.size(3));
  seen.out =
      run_hooked({{site, hook, {}}},
                 {.height = 6, .width = 5, .groups = {{.count = in.x.size(0)}}, .step = &step},
                 [&] { return unet.forward(in); });
  seen.maps = step.records(owner);
  return seen;
}

AttentionHook identity_attention() {
  return [](const AttentionCall& call, const Pass&, const NextAttention&) { return call.v; };
}

// ---- the ways to write attention

const std::string kFold = R"(
def fold(self, t: Tensor) -> Tensor:
    return torch.reshape(t, [t.size(0) * 2, t.size(2), 4])
def unfold(self, t: Tensor) -> Tensor:
    return torch.reshape(t, [t.size(0) // 2, 2, t.size(1), 4])
def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
)";

// An attention that calls `attend`, with heads folded into rows.
test::TorchScriptFixture folded(const std::string& body) {
  return {.attention = "self.unfold(self.attend(self.fold(q), self.fold(k), self.fold(v)))",
          .methods = kFold + body};
}

struct Way {
  std::string name;
  test::TorchScriptFixture fixture;
  // Of the probabilities.
  std::int64_t dims = 3;
};

const std::vector<Way>& ways() {
  static const std::vector<Way> all = {
      {"matmul",
       {.attention = "torch.matmul(torch.softmax(torch.matmul(q, torch.transpose(k, 2, 3)) * 0.5, "
                     "-1), v)"},
       4},
      {"div_dropout_and_positive_dim",
       {.attention = "torch.matmul(torch.dropout(torch.softmax(torch.div(torch.matmul(q, "
                     "torch.transpose(k, -2, -1)), 2.0), 3), 0.0, False), v)"},
       4},
      {"scaled_before",
       {.attention = "torch.matmul(torch.softmax(torch.matmul(q * 0.5, torch.transpose(k, 2, 3)), "
                     "-1), v)"},
       4},
      // diffusers' AttnProcessor.
      {"baddbmm", folded(R"(
    scores = torch.baddbmm(torch.empty([q.size(0), q.size(1), k.size(1)], dtype=q.dtype), q,
                           torch.transpose(k, -1, -2), beta=0, alpha=0.5)
    p = torch.to(torch.softmax(scores, -1), q.dtype)
    return torch.bmm(p, v)
)")},
      // The same, scripted: its options stay branches.
      {"branches", folded(R"(
    if self.training:
        q = torch.to(q, 6)
        k = torch.to(k, 6)
    if self.training:
        scores = torch.baddbmm(torch.ones([1]), q, torch.transpose(k, 1, 2), beta=1, alpha=0.5)
    else:
        scores = torch.baddbmm(torch.zeros([1]), q, torch.transpose(k, 1, 2), beta=1, alpha=0.5)
    if not self.training:
        scores = torch.to(scores, 6)
    p = torch.softmax(scores, -1)
    if not self.training:
        p = torch.to(p, v.dtype)
    return torch.bmm(p, v)
)")},
      // torch.nn.functional.softmax, scripted.
      {"asks_for_its_dim", folded(R"(
    given: Optional[int] = -1
    scores = torch.bmm(q, torch.transpose(k, 1, 2)) * 0.5
    if given is None:
        dim = 0
    else:
        dim = given
    return torch.bmm(torch.softmax(scores, dim), v)
)")},
      {"upcast_and_mask", folded(R"(
    scores = torch.bmm(torch.to(q, 6), torch.transpose(torch.to(k, 6), 1, 2)) * 0.5
    scores = scores + torch.zeros([1, q.size(1), k.size(1)])
    p = torch.softmax(scores, 2)
    return torch.bmm(torch.to(p, v.dtype), v)
)")},
      // LDM's CrossAttention, '(b h) n d'.
      {"einsum", folded(R"(
    sim = torch.einsum("b i d, b j d -> b i j", [q, k]) * 0.5
    sim = torch.masked_fill(sim, sim != sim, -1.0)
    return torch.einsum("b i j, b j d -> b i d", [torch.softmax(sim, -1), v])
)")},
      {"einsum_with_heads",
       {.attention = "torch.einsum(\"bhij,bhjd->bhid\", [torch.softmax(torch.einsum("
                     "\"bhid,bhjd->bhij\", [q, k]) * 0.5, -1), v])"},
       4},
      // guided-diffusion's QKVAttention, channels before tokens.
      {"einsum_channels_first", folded(R"(
    q, k, v = torch.transpose(q, 1, 2), torch.transpose(k, 1, 2), torch.transpose(v, 1, 2)
    weight = torch.einsum("bct,bcs->bts", [q * 0.7071067811865476, k * 0.7071067811865476])
    weight = torch.type_as(torch.softmax(torch.to(weight, 6), -1), weight)
    return torch.transpose(torch.einsum("bts,bcs->bct", [weight, v]), 1, 2)
)")},
      // CompVis' AttnBlock: v · pᵀ.
      {"transposed", folded(R"(
    w = torch.bmm(q, torch.permute(k, [0, 2, 1])) * 0.5
    w = torch.permute(torch.softmax(w, 2), [0, 2, 1])
    return torch.transpose(torch.bmm(torch.transpose(v, 1, 2), w), 1, 2)
)")},
  };
  return all;
}

class Unfused : public ::testing::TestWithParam<Way> {};

TEST_P(Unfused, LooksToHooksAsTheFusedModelDoes) {
  const auto module = make_torchscript_unet(GetParam().fixture);
  const auto unet = TorchScriptUNet::from_module(module),
             fused = TorchScriptUNet::from_module(make_torchscript_unet());
  EXPECT_EQ(unet->attention_sites().size(), 2u);
  EXPECT_EQ(unet->attention_sites()[1].ordinal, 2);
  EXPECT_EQ(unet->attention_sites()[1].path, fused->attention_sites()[1].path);
  const auto in = input(3);
  const auto seen = look(*unet, in), expected = look(*fused, in);
  ASSERT_EQ(seen.calls.size(), 1u);
  const auto& call = seen.calls[0];
  EXPECT_FALSE(call.q.defined());
  EXPECT_EQ(call.probabilities.dim(), GetParam().dims);
  EXPECT_EQ(call.probabilities.numel(), 3 * 2 * 30 * 30);
  EXPECT_TRUE(torch::equal(seen.out, unet->forward(in))) << "to the bit";
  EXPECT_LT(difference(seen.out, expected.out), 2e-5);
  ASSERT_EQ(seen.maps.size(), 1u);
  EXPECT_LT(max_diff(seen.maps[0].map, expected.maps.at(0).map), 1e-5);

  const auto replaced = look(*unet, in, identity_attention()).out;
  EXPECT_LT(difference(replaced, look(*fused, in, identity_attention()).out), 2e-5);
  EXPECT_GT(difference(replaced, expected.out), 1e-3);
}

TEST_P(Unfused, IsGuidedAsTheFusedModelIs) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(GetParam().fixture)),
             fused = TorchScriptUNet::from_module(make_torchscript_unet());
  expect_same_guided_run(run_sag(unet), run_sag(fused));
}

TEST_P(Unfused, IsFoundInAFrozenFileAndInHalfPrecision) {
  const auto module = make_torchscript_unet(GetParam().fixture);
  const auto expected = look(*TorchScriptUNet::from_module(module), input());
  const auto frozen = TorchScriptUNet::from_module(torch::jit::freeze(module));
  ASSERT_EQ(frozen->attention_sites().size(), 2u);
  EXPECT_EQ(frozen->attention_sites()[1].name, "#2");
  EXPECT_LT(max_diff(look(*frozen, input(), {}, "#2").maps.at(0).map, expected.maps[0].map), 1e-5);

  const test::TemporaryFile file("half.ts");
  module.save(file.path());
  const auto half = TorchScriptUNet::load(file.path(), {.dtype = torch::kHalf});
  auto in = input();
  in.x = in.x.to(torch::kHalf);
  in.context = in.context.to(torch::kHalf);
  const auto seen = look(*half, in);
  EXPECT_EQ(seen.calls.at(0).v.scalar_type(), torch::kHalf);
  EXPECT_EQ(seen.calls.at(0).probabilities.scalar_type(), torch::kHalf);
  EXPECT_EQ(seen.maps.at(0).map.scalar_type(), torch::kFloat);
  EXPECT_LT(difference(seen.maps[0].map, expected.maps[0].map), 2e-2);
  EXPECT_LT(difference(seen.out, expected.out), 2e-2);
}

INSTANTIATE_TEST_SUITE_P(Ways, Unfused, ::testing::ValuesIn(ways()),
                         [](const auto& info) { return info.param.name; });

TEST(UnfusedAttention, IsToldFromCrossAttentionAndOtherSoftmax) {
  const auto matmul = ways()[0].fixture.attention;
  const auto unnamed = torch::jit::freeze(make_torchscript_unet({.attention = matmul}));
  const auto unet = TorchScriptUNet::from_module(unnamed);
  ASSERT_EQ(unet->attention_sites().size(), 2u);
  EXPECT_EQ(unet->attention_sites()[0].ordinal, 0);
  EXPECT_EQ(unet->attention_sites()[1].ordinal, 2);
  // Softmax over queries, softmax of something that is not a product, and a sum over queries.
  for (const auto& attention :
       {"torch.matmul(torch.softmax(torch.matmul(q, torch.transpose(k, 2, 3)), 2), v)",
        "torch.matmul(torch.softmax(q, -1), torch.matmul(torch.transpose(k, 2, 3), v))",
        "torch.einsum(\"bhij,bhid->bhjd\", [torch.softmax(torch.matmul(q, "
        "torch.transpose(k, 2, 3)), -1), v])"}) {
    const auto other =
        make_torchscript_unet({.body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n",
                               .attention = attention});
    EXPECT_THROW(TorchScriptUNet::from_module(other), c10::ValueError) << attention;
  }
}

// In a dtype that is not the file's, every product gets a cast whose second input is its other
// side.
TEST(UnfusedAttention, IsTheSameInEveryDtype) {
  const std::string over_queries =
      "    p = torch.softmax(torch.bmm(t, torch.transpose(t, 1, 2)), 2)\n"
      "    t = t + torch.transpose(torch.bmm(torch.transpose(t, 1, 2), p), 1, 2)\n";
  const auto module =
      make_torchscript_unet({.body = over_queries + test::TorchScriptFixture().body});
  const test::TemporaryFile file("dtype.ts");
  module.save(file.path());
  const auto unet = TorchScriptUNet::load(file.path(), {.dtype = torch::kDouble});
  auto in = input();
  in.x = in.x.to(torch::kDouble);
  in.context = in.context.to(torch::kDouble);
  const auto seen = look(*unet, in);
  ASSERT_EQ(seen.calls.size(), 1u);
  EXPECT_FALSE(seen.calls[0].probabilities.defined());
  const auto plain = TorchScriptUNet::from_module(module);
  EXPECT_LT(difference(seen.maps.at(0).map, look(*plain, input()).maps[0].map), 1e-5);
}

// Like scripted nn.MultiheadAttention. The result of the fast path here is never used.
TEST(UnfusedAttention, IsFoundBesideTheFastPath) {
  const std::string attend = R"(
def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    why_not_fast_path = ""
    if q.size(0) > 1000:
        why_not_fast_path = "large"
    if not len(why_not_fast_path) > 0:
        return torch._native_multi_head_attention(
            q[0], k[0], v[0], 4, 2, self.q, self.q, self.q, self.q, None, False, True, None)[0]
    return torch.matmul(torch.softmax(torch.matmul(q, torch.transpose(k, 2, 3)) * 0.5, -1), v)
)";
  const auto unet = TorchScriptUNet::from_module(
      make_torchscript_unet({.attention = "self.attend(q, k, v)", .methods = attend}));
  const auto slow = TorchScriptUNet::from_module(make_torchscript_unet(ways()[0].fixture));
  const auto seen = look(*unet, input());
  EXPECT_EQ(seen.calls.size(), 1u);
  EXPECT_TRUE(torch::equal(seen.out, slow->forward(input())));
  expect_same_guided_run(run_sag(unet), run_sag(slow));
}

TEST(UnfusedAttention, KeepsAHooksException) {
  struct Mine : std::logic_error {
    using std::logic_error::logic_error;
  };
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(ways()[3].fixture));
  const auto throwing = [](const AttentionCall&, const Pass&,
                           const NextAttention&) -> torch::Tensor { throw Mine("mine"); };
  EXPECT_THROW(look(*unet, input(), throwing), Mine);
  EXPECT_TRUE(torch::equal(look(*unet, input()).out, unet->forward(input())));
}

// ---- traced by diffusers

class Traced : public ::testing::TestWithParam<const char*> {
 protected:
  static std::shared_ptr<TorchScriptUNet> load(const std::string& name) {
    return TorchScriptUNet::load(kGolden + name + ".ts");
  }
};

TEST_P(Traced, IsGuidedAsTheFusedModelIs) {
  const auto fused = load("tiny_fused"), unet = load(GetParam());
  const auto seen = look(*unet, input(3, 32)), expected = look(*fused, input(3, 32));
  EXPECT_LT(max_diff(seen.maps.at(0).map, expected.maps.at(0).map), 1e-5);
  EXPECT_TRUE(torch::equal(seen.out, unet->forward(input(3, 32))));
  for (const auto& options :
       {RunOptions{.context_width = 32}, RunOptions{.context_width = 32, .max_rows = 3},
        RunOptions{.context_width = 32, .one_pass = true}})
    expect_same_guided_run(run_sag(unet, options), run_sag(fused, options));
}

TEST_P(Traced, IsGuidedWhenFrozen) {
  const auto module = torch::jit::load(kGolden + GetParam() + ".ts");
  const auto frozen = TorchScriptUNet::from_module(torch::jit::freeze(module));
  const RunOptions by_ordinal = {.context_width = 32, .site = AttentionSite("#0")};
  expect_same_guided_run(run_sag(frozen, by_ordinal),
                         run_sag(load("tiny_fused"), {.context_width = 32}));
}

INSTANTIATE_TEST_SUITE_P(Diffusers, Traced, ::testing::Values("tiny_unfused", "tiny_upcast"),
                         [](const auto& info) { return std::string(info.param); });

// Attention slicing computes each head of each row separately. The trace has a call for each that
// there was: here for 4 rows of 2 heads.
TEST(TracedSliced, RunsButIsNotGuided) {
  const auto unet = TorchScriptUNet::load(kGolden + "tiny_sliced.ts");
  EXPECT_EQ(unet->attention_sites().size(), 1u);
  const auto in = input(4, 32);
  const auto seen = look(*unet, in);
  EXPECT_EQ(seen.calls.size(), 8u);
  EXPECT_EQ(seen.calls[0].probabilities.size(0), 1);
  EXPECT_TRUE(seen.maps.empty());
  EXPECT_TRUE(torch::equal(seen.out, unet->forward(in)));
  // With more rows the trace leaves some out; with fewer some of its calls have no row.
  for (const std::int64_t images : {1, 2, 4, 5})
    expect_nothing_guided(run_sag(unet, {.images = images, .context_width = 32}), "is not known");
}

// ---- split batches

const std::string kSdpa = "torch.scaled_dot_product_attention(";

TEST(SplitBatches, AreGuidedAsWholeOnesAre) {
  const auto whole = TorchScriptUNet::from_module(make_torchscript_unet());
  const std::string in_parts = R"(
def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts: List[Tensor] = []
    for i in range(0, q.size(0), 3):
        parts.append(ATTENTION)
    return torch.cat(parts)
)";
  const std::vector<std::string> calls = {
      kSdpa + "q[i:i + 3], k[i:i + 3], v[i:i + 3])",
      "torch.matmul(torch.softmax(torch.matmul(q[i:i + 3], torch.transpose(k[i:i + 3], 2, 3)) * "
      "0.5, -1), v[i:i + 3])"};
  for (const auto& call : calls) {
    auto methods = in_parts;
    methods.replace(methods.find("ATTENTION"), 9, call);
    const auto unet = TorchScriptUNet::from_module(
        make_torchscript_unet({.attention = "self.attend(q, k, v)", .methods = methods}));
    const auto seen = look(*unet, input(7));
    ASSERT_EQ(seen.calls.size(), 3u);
    std::vector<torch::Tensor> maps;
    for (const auto& record : seen.maps) maps.push_back(record.map);
    EXPECT_LT(max_diff(torch::cat(maps), look(*whole, input(7)).maps[0].map), 1e-5);
    for (const std::int64_t images : {1, 2, 4, 5})
      for (const std::int64_t max_rows : {0, 5})
        expect_same_guided_run(run_sag(unet, {.images = images, .max_rows = max_rows}),
                               run_sag(whole, {.images = images, .max_rows = max_rows}));
  }
}

// As in a trace: one node for each part, with the sizes of the traced batch.
TEST(SplitBatches, AreGuidedInSeveralNodes) {
  const auto unet = TorchScriptUNet::from_module(
      make_torchscript_unet({.attention = "torch.cat([" + kSdpa + "q[:1], k[:1], v[:1]), " + kSdpa +
                                          "q[1:], k[1:], v[1:])])"}));
  EXPECT_EQ(unet->attention_sites().size(), 2u);
  const auto whole = TorchScriptUNet::from_module(make_torchscript_unet());
  expect_same_guided_run(run_sag(unet), run_sag(whole));
}

TEST(SplitBatches, WithTheirPartsInTheWrongPlaceAreNotGuided) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      // The heads in two calls.
      {"torch.cat([" + kSdpa + "q[:, :1], k[:, :1], v[:, :1]), " + kSdpa +
           "q[:, 1:], k[:, 1:], v[:, 1:])], 1)",
       "not parts of the batch"},
      // Some rows without attention.
      {"torch.cat([" + kSdpa + "q[:1], k[:1], v[:1]), v[1:]])", "ran for 1 of the pass's 4 rows"},
      // All rows twice.
      {"0.5 * " + kSdpa + "q, k, v) + 0.5 * " + kSdpa + "q, k, v)", "not parts of the batch"},
      // The queries in two calls.
      {"torch.cat([" + kSdpa + "q[:, :, :1], k, v), " + kSdpa + "q[:, :, 1:], k, v)], 2)",
       "not self-attention"},
  };
  for (const auto& [attention, reason] : cases) {
    SCOPED_TRACE(attention);
    const auto module =
        make_torchscript_unet({.body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n",
                               .attention = attention});
    expect_nothing_guided(run_sag(TorchScriptUNet::from_module(module)), reason);
  }
}

TEST(SplitBatches, MayHaveMorePartsThanTheBatch) {
  const auto unet = TorchScriptUNet::from_module(
      make_torchscript_unet({.attention = "torch.cat([" + kSdpa + "q[:4], k[:4], v[:4]), " + kSdpa +
                                          "q[4:], k[4:], v[4:])])"}));
  expect_same_guided_run(run_sag(unet),
                         run_sag(TorchScriptUNet::from_module(make_torchscript_unet())));
}

// ---- what the sites work on

TEST(ProbeAttentionSites, TellsSitesWithoutNamesApart) {
  const auto sites_of = [](const test::TorchScriptFixture& fixture) {
    const auto module = torch::jit::freeze(make_torchscript_unet(fixture));
    return probe_attention_sites(*TorchScriptUNet::from_module(module), input(3));
  };
  std::vector<test::TorchScriptFixture> fixtures = {{}};
  for (const auto& way : ways()) fixtures.push_back(way.fixture);
  for (const auto& fixture : fixtures) {
    const auto shapes = sites_of(fixture);
    ASSERT_EQ(shapes.size(), 2u) << fixture.attention;
    for (const auto& shape : shapes) {
      EXPECT_EQ(shape.heads, 2) << fixture.attention;
      EXPECT_EQ(shape.tokens, 30) << fixture.attention;
      EXPECT_EQ(shape.head_dim, 4) << fixture.attention;
    }
    EXPECT_EQ(shapes[1].site.name, "#2");
  }
  const auto sliced = TorchScriptUNet::load(kGolden + "tiny_sliced.ts");
  for (const std::int64_t rows : {1, 4}) {
    const auto shapes = probe_attention_sites(*sliced, input(rows, 32));
    ASSERT_EQ(shapes.size(), 1u);
    EXPECT_EQ(shapes[0].heads, 2);
    EXPECT_EQ(shapes[0].tokens, 30);
    EXPECT_EQ(shapes[0].head_dim, 8);
  }
}

// ---- on the GPU

TEST(UnfusedOnTheGpu, GivesTheMapsOfTheFusedModel) {
  if (!torch::cuda::is_available())
    GTEST_SKIP() << "this machine has no CUDA device, or LibTorch no CUDA";
  const auto device = torch::Device(torch::kCUDA, 0);
  const auto cpu = look(*TorchScriptUNet::load(kGolden + "tiny_fused.ts"), input(3, 32));
  for (const auto& [dtype, tolerance] :
       {std::pair{torch::kFloat, 5e-3}, std::pair{torch::kHalf, 3e-2}})
    for (const char* name : {"tiny_unfused", "tiny_upcast"}) {
      const auto unet =
          TorchScriptUNet::load(kGolden + name + ".ts", {.device = device, .dtype = dtype});
      auto in = input(3, 32);
      in.timesteps = in.timesteps.to(device);
      in.x = in.x.to(device, dtype);
      in.context = in.context.to(device, dtype);
      EXPECT_LT(difference(look(*unet, in).maps.at(0).map.cpu(), cpu.maps[0].map), tolerance);
    }
}

}  // namespace
}  // namespace sag

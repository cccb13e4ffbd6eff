#include "sag/torchscript_unet.h"

#include <functional>
#include <thread>

#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/passes/freeze_module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <torch/version.h>

#include "sag/attention_scope.h"
#include "sag/calc_cond_batch.h"
#include "sag/cfg_guider.h"
#include "sag/model_patcher.h"
#include "sag/step_context.h"
#include "support/error.h"
#include "support/files.h"
#include "support/torchscript_fixture.h"

namespace sag {
namespace {

using test::error_of;
using test::kGoldenDir;
using test::make_torchscript_unet;
using test::one_sentence;
using test::read_bytes;
using test::TemporaryFile;
using ::testing::AllOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using torch::jit::Module;

std::shared_ptr<TorchScriptUNet> save_and_load(const Module& module,
                                               const TorchScriptUNetOptions& options = {}) {
  const TemporaryFile file("unet.ts");
  module.save(file.path());
  return TorchScriptUNet::load(file.path(), options);
}

UNetInput fixture_input(std::int64_t rows = 2) {
  torch::manual_seed(2);
  return {torch::randn({rows, 4, 6, 5}),
          torch::linspace(1, 900, rows),
          torch::randn({rows, 3, test::kContextWidth}),
          {},
          {}};
}

torch::Tensor run_module(Module module, const UNetInput& input) {
  torch::NoGradGuard no_grad;
  return module.forward({input.x, input.timesteps, input.context}).toTensor();
}

std::vector<std::string> names(const UNet& unet) {
  std::vector<std::string> names;
  for (const auto& site : unet.attention_sites()) names.push_back(site.name);
  return names;
}

// Runs the UNet with a hook at a site.
struct Hooked {
  torch::Tensor out;
  std::vector<AttentionCall> calls;

  Hooked(const UNet& unet, const UNetInput& input, const std::vector<std::string>& sites,
         const std::function<torch::Tensor(const AttentionCall&, const NextAttention&)>& replace =
             {}) {
    StepContext step(1.0, 0, input.x.size(2), input.x.size(3));
    Pass pass;
    pass.step = &step;
    const AttentionHook hook = [&](const AttentionCall& call, const Pass&,
                                   const NextAttention& next) {
      calls.push_back(call);
      return replace ? replace(call, next) : next(call);
    };
    std::vector<InstalledHook> hooks;
    for (const auto& site : sites) hooks.push_back({site, hook, {}});
    out = run_hooked(hooks, pass, [&] { return unet.forward(input); });
  }
};

torch::Tensor zeros(const AttentionCall& call, const NextAttention&) {
  return torch::zeros_like(call.q);
}

double relative_error(const torch::Tensor& a, const torch::Tensor& b) {
  return ((a.to(torch::kDouble) - b.to(torch::kDouble)).norm() / b.to(torch::kDouble).norm())
      .item<double>();
}

// ---- the golden networks: traced by ComfyUI and diffusers

struct Golden {
  std::string net;
  std::string site, path;
  std::int64_t ordinal;
  std::size_t sites;
};

class GoldenUNet : public ::testing::TestWithParam<Golden> {
 protected:
  static const c10::Dict<c10::IValue, c10::IValue>& io() {
    static const auto* dict = [] {
      const auto bytes = read_bytes(kGoldenDir + "unet_io.pt");
      return new c10::Dict<c10::IValue, c10::IValue>(
          torch::pickle_load({bytes.begin(), bytes.end()}).toGenericDict());
    }();
    return *dict;
  }
  static torch::Tensor tensor(const std::string& call, const std::string& name) {
    const auto key = GetParam().net + "." + call + "." + name;
    return io().contains(key) ? io().at(key).toTensor() : torch::Tensor();
  }
  static UNetInput input(const std::string& call) {
    return {tensor(call, "x"),
            tensor(call, "timesteps"),
            tensor(call, "context"),
            tensor(call, "y"),
            {}};
  }
  static std::shared_ptr<TorchScriptUNet> load(TorchScriptUNetOptions options = {}) {
    return TorchScriptUNet::load(kGoldenDir + GetParam().net + ".ts", options);
  }
};

TEST_P(GoldenUNet, GivesTheRecordedOutputWithAndWithoutAHook) {
  const auto unet = load();
  for (const char* call : {"a", "b"}) {
    const auto in = input(call);
    const auto expected = tensor(call, "out");
    // Recorded on another CPU: kernels for AVX-512 were seen to differ by 1.02e-6. See
    // golden/README.md.
    EXPECT_LT(relative_error(unet->forward(in), expected), 2e-5);
    const Hooked hooked(*unet, in, {GetParam().site});
    EXPECT_TRUE(torch::equal(hooked.out, unet->forward(in)));
    ASSERT_EQ(hooked.calls.size(), 1u);
    EXPECT_EQ(hooked.calls[0].q.dim(), 4);
    EXPECT_EQ(hooked.calls[0].q.size(0), in.x.size(0));
    EXPECT_EQ(hooked.calls[0].q.sizes(), hooked.calls[0].k.sizes());
    EXPECT_EQ(hooked.calls[0].q.sizes(), hooked.calls[0].v.sizes());
  }
}

TEST_P(GoldenUNet, ListsItsSelfAttentions) {
  const auto unet = load();
  const auto sites = unet->attention_sites();
  ASSERT_EQ(sites.size(), GetParam().sites);
  const auto found = std::find_if(sites.begin(), sites.end(),
                                  [&](const auto& site) { return site.name == GetParam().site; });
  ASSERT_NE(found, sites.end());
  EXPECT_EQ(found->path, GetParam().path);
  EXPECT_EQ(found->ordinal, GetParam().ordinal);
}

TEST_P(GoldenUNet, AReplacedAttentionChangesTheOutput) {
  const auto unet = load();
  const auto in = input("a");
  EXPECT_GT(relative_error(Hooked(*unet, in, {GetParam().site}, zeros).out, unet->forward(in)),
            1e-3);
}

TEST_P(GoldenUNet, RunsInHalfPrecisionThoughFp32IsRecorded) {
  // fp16 has 11 bits, bfloat16 8: some 100 layers of that rounding.
  for (const auto& [dtype, tolerance] :
       {std::pair{torch::kHalf, 5e-3}, std::pair{torch::kBFloat16, 4e-2}}) {
    const auto unet = load({.dtype = dtype});
    auto in = input("a");
    for (auto* t : {&in.x, &in.context, &in.y}) *t = t->defined() ? t->to(dtype) : *t;
    const Hooked hooked(*unet, in, {GetParam().site});
    EXPECT_EQ(hooked.out.scalar_type(), dtype);
    EXPECT_EQ(hooked.calls.at(0).q.scalar_type(), dtype);
    EXPECT_LT(relative_error(hooked.out, tensor("a", "out")), tolerance);
  }
}

TEST_P(GoldenUNet, RunsOnTheGpuThoughTracedOnTheCpu) {
  if (!torch::cuda::is_available())
    GTEST_SKIP() << "this machine has no CUDA device, or LibTorch no CUDA";
  const auto device = torch::Device(torch::kCUDA, 0);
  // TensorFloat-32 convolutions have 11 bits, as fp16.
  for (const auto dtype : {torch::kFloat, torch::kHalf}) {
    const auto unet = load({.device = torch::kCUDA, .dtype = dtype});
    EXPECT_EQ(unet->device(), device);
    auto in = input("b");
    in.timesteps = in.timesteps.to(device);
    for (auto* t : {&in.x, &in.context, &in.y}) *t = t->defined() ? t->to(device, dtype) : *t;
    const Hooked hooked(*unet, in, {GetParam().site});
    EXPECT_EQ(hooked.calls.size(), 1u);
    EXPECT_LT(relative_error(hooked.out.cpu(), tensor("b", "out")), 5e-3);
  }
  EXPECT_EQ(load({.device = torch::kCUDA})->dtype(), torch::kFloat);
}

TEST_P(GoldenUNet, TakesChannelsLastOnTheGpuInHalfPrecisionOnly) {
  if (!torch::cuda::is_available())
    GTEST_SKIP() << "this machine has no CUDA device, or LibTorch no CUDA";
  for (const auto dtype : {torch::kFloat, torch::kHalf}) {
    auto in = input("a");
    in.timesteps = in.timesteps.to(torch::kCUDA);
    for (auto* t : {&in.x, &in.context, &in.y}) *t = t->defined() ? t->to(torch::kCUDA, dtype) : *t;
    const auto out = [&](std::optional<bool> channels_last) {
      return load({.device = torch::kCUDA, .dtype = dtype, .channels_last = channels_last})
          ->forward(in);
    };
    const bool half = dtype == torch::kHalf;
    EXPECT_TRUE(torch::equal(out({}), out(half)));
    EXPECT_FALSE(torch::equal(out({}), out(!half)));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Nets, GoldenUNet,
    ::testing::Values(Golden{"comfy_sd15_tiny", "middle.0.0",
                             "unet.middle_block.1.transformer_blocks.0.attn1", 6, 10},
                      Golden{"comfy_sdxl_tiny", "middle.0.0",
                             "unet.middle_block.1.transformer_blocks.0.attn1", 6, 11},
                      Golden{"diffusers_tiny", "middle.0.0",
                             "unet.mid_block.attentions.0.transformer_blocks.0.attn1", 6, 10}),
    [](const auto& info) { return info.param.net; });

// ---- scripted modules

TEST_P(GoldenUNet, GivesTheSameWithChannelsLast) {
  const auto unet = load({.channels_last = true});
  const auto in = input("a");
  const Hooked hooked(*unet, in, {GetParam().site});
  EXPECT_LT(relative_error(hooked.out, tensor("a", "out")), 2e-5);
  EXPECT_TRUE(hooked.out.is_contiguous());
}

TEST(TorchScriptUNet, RunsAScriptedModuleAndHooksExactlyOneOfItsSharedClasses) {
  const auto module = make_torchscript_unet();
  const auto unet = TorchScriptUNet::from_module(module);
  EXPECT_THAT(names(*unet), ::testing::ElementsAre("input.1.0", "middle.0.0"));
  const auto in = fixture_input();
  EXPECT_TRUE(torch::equal(unet->forward(in), run_module(module, in)));
  const Hooked hooked(*unet, in, {"middle.0.0"});
  ASSERT_EQ(hooked.calls.size(), 1u);
  EXPECT_EQ(hooked.calls[0].q.sizes(), (std::vector<std::int64_t>{2, 2, 30, 4}));
  EXPECT_TRUE(torch::equal(hooked.out, run_module(module, in)));
  EXPECT_EQ(Hooked(*unet, in, {"middle.0.0", "input.1.0"}).calls.size(), 2u);
}

TEST(TorchScriptUNet, NeverEditsTheCallersModule) {
  const auto module = make_torchscript_unet();
  const auto in = fixture_input();
  const auto before = module.dump_to_str(true, true, true);
  const auto out = run_module(module, in);
  const auto unet = TorchScriptUNet::from_module(module);
  const Hooked hooked(*unet, in, {"middle.0.0"}, zeros);
  EXPECT_EQ(module.dump_to_str(true, true, true), before);
  EXPECT_TRUE(torch::equal(run_module(module, in), out));
  EXPECT_FALSE(torch::equal(hooked.out, out));
}

TEST(TorchScriptUNet, SharesTheCallersWeights) {
  const auto module = make_torchscript_unet();
  const auto unet = TorchScriptUNet::from_module(module);
  torch::NoGradGuard no_grad;
  module.attr("conv_out").toTensor().zero_();
  EXPECT_EQ(unet->forward(fixture_input()).abs().max().item<float>(), 0);
}

TEST(TorchScriptUNet, FindsAttentionThatForwardReachesThroughAFunction) {
  auto module = make_torchscript_unet();
  auto unit = module._ivalue()->compilation_unit();
  unit->define(c10::QualifiedName("__torch__"),
               "def helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:\n"
               "    return torch.scaled_dot_product_attention(q, k, v)\n",
               torch::jit::nativeResolver(), nullptr);
  // Put a call of a function, as in scripted code with helpers, in place of the attention.
  auto attn = module.attr("middle_block")
                  .toModule()
                  .attr("1")
                  .toModule()
                  .attr("transformer_blocks")
                  .toModule()
                  .attr("0")
                  .toModule()
                  .attr("attn1")
                  .toModule();
  const auto graph = attn.get_method("forward").graph();
  for (auto* node : graph->nodes()) {
    if (node->kind() != c10::Symbol::fromQualString("aten::scaled_dot_product_attention")) continue;
    torch::jit::WithInsertPoint before(node);
    auto* function = graph->insertNode(graph->create(c10::prim::Constant));
    function->output()->setType(
        c10::FunctionType::create(&unit->get_function(c10::QualifiedName("__torch__.helper"))));
    function->s_(c10::attr::name, "helper");
    auto* call = graph->insertNode(
        graph->create(c10::prim::CallFunction,
                      {function->output(), node->input(0), node->input(1), node->input(2)}));
    node->output()->replaceAllUsesWith(call->output());
    node->destroy();
    break;
  }
  const auto unet = TorchScriptUNet::from_module(module);
  EXPECT_EQ(unet->attention_sites()[1].path, "middle_block.1.transformer_blocks.0.attn1");
  const auto in = fixture_input();
  EXPECT_EQ(Hooked(*unet, in, {"middle.0.0"}).calls.size(), 1u);
}

TEST(TorchScriptUNet, HooksAttentionInsideAFork) {
  const auto module = make_torchscript_unet(
      {.body = "    future = fork(block(self.middle_block).attn1.forward, t, t)\n"
               "    t = t + torch.wait(future)\n"});
  const auto unet = TorchScriptUNet::from_module(module);
  EXPECT_THAT(names(*unet), ::testing::ElementsAre("middle.0.0"));
  const auto in = fixture_input();
  const Hooked hooked(*unet, in, {"middle.0.0"});
  EXPECT_EQ(hooked.calls.size(), 1u);
  EXPECT_TRUE(torch::equal(hooked.out, run_module(module, in)));
}

TEST(TorchScriptUNet, HooksAttentionInsideControlFlow) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(
      {.body = "    for i in range(2):\n"
               "        if t.size(0) > 1:\n"
               "            t = t + block(self.middle_block).attn1.forward(t, t)\n"}));
  EXPECT_EQ(Hooked(*unet, fixture_input(2), {"middle.0.0"}).calls.size(), 2u);
  EXPECT_EQ(Hooked(*unet, fixture_input(1), {"middle.0.0"}).calls.size(), 0u);
}

TEST(TorchScriptUNet, KeepsTheTypeOfAHooksExceptionAndWorksAfterwards) {
  struct Mine : std::logic_error {
    using std::logic_error::logic_error;
  };
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet());
  const auto in = fixture_input();
  const auto failing = [](const AttentionCall&, const NextAttention&) -> torch::Tensor {
    throw Mine("mine");
  };
  EXPECT_THROW(Hooked(*unet, in, {"middle.0.0"}, failing), Mine);
  EXPECT_TRUE(torch::equal(Hooked(*unet, in, {"middle.0.0"}).out, unet->forward(in)));
}

TEST(TorchScriptUNet, RunsOnSeveralThreadsAtOnce) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet());
  const auto in = fixture_input();
  const auto expected = unet->forward(in);
  std::vector<std::thread> threads;
  std::vector<int> good(4, 0);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 10; ++n) {
        const Hooked hooked(*unet, in, {i % 2 ? "middle.0.0" : "input.1.0"});
        good[i] += hooked.calls.size() == 1 && torch::equal(hooked.out, expected);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(good, ::testing::Each(10));
}

TEST(TorchScriptUNet, ReturnsOrdinaryTensorsWithoutGradients) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet());
  const auto out = unet->forward(fixture_input());
  EXPECT_FALSE(out.requires_grad());
  EXPECT_FALSE(out.is_inference());
}

// ---- sites

TEST(TorchScriptUNet, SitesThatShareAShortNameGoByTheirPaths) {
  // Two networks side by side, as a UNet with a ControlNet in one file.
  auto both = Module("Both");
  both.register_module("unet", make_torchscript_unet());
  both.register_module("control", make_torchscript_unet());
  both.define(
      "def forward(self, x: Tensor, timesteps: Tensor, context: Tensor):\n"
      "    return self.unet.forward(x, timesteps, context) + self.control.forward(x, timesteps, "
      "context)\n");
  const auto unet = TorchScriptUNet::from_module(both);
  EXPECT_THAT(error_of<c10::ValueError>([&] {
                resolve_attention_site(*unet, {"middle", 0});
              }),
              AllOf(HasSubstr("unet.middle_block.1"), HasSubstr("control.middle_block.1")));
  const auto name = resolve_attention_site(
      *unet, AttentionSite("unet.middle_block.1.transformer_blocks.0.attn1"));
  EXPECT_EQ(Hooked(*unet, fixture_input(), {name}).calls.size(), 1u);
  EXPECT_EQ(resolve_attention_site(*unet, AttentionSite("#2")), name);
  EXPECT_THAT(error_of<c10::ValueError>([&] { Hooked(*unet, fixture_input(), {"middle.0.0"}); }),
              one_sentence());
}

TEST(TorchScriptUNet, HooksEveryAttentionUnderOnePath) {
  const auto unet = TorchScriptUNet::from_module(
      make_torchscript_unet({.attention = "torch.scaled_dot_product_attention(q, k, v) + "
                                          "torch.scaled_dot_product_attention(q, k, v)"}));
  const auto sites = unet->attention_sites();
  ASSERT_EQ(sites.size(), 2u);
  EXPECT_EQ(sites[0].ordinal, 0);
  EXPECT_EQ(sites[1].ordinal, 4);
  const auto in = fixture_input();
  const Hooked hooked(*unet, in, {"middle.0.0"});
  EXPECT_EQ(hooked.calls.size(), 2u);
  EXPECT_TRUE(torch::equal(hooked.out, unet->forward(in)));
}

// LibTorch would run them on other threads, in any order.
TEST(TorchScriptUNet, RunsForkedTasksInOrderOnTheCallersThread) {
  const std::string block = "block(self.middle_block).attn1";
  const std::vector<std::string> bodies = {
      "    a, b = fork(" + block + ".forward, t[:1], t[:1]), fork(" + block +
          ".forward, t[1:], t[1:])\n"
          "    t = t + torch.cat([torch.wait(b), torch.wait(a)])\n",
      "    futures = [fork(" + block +
          ".forward, t[:1], t[:1])]\n"
          "    for i in range(1, t.size(0)):\n"
          "        futures.append(fork(" +
          block +
          ".forward, t[i:i + 1], t[i:i + 1]))\n"
          "    t = t + torch.cat([torch.wait(futures[1]), torch.wait(futures[0])])\n"};
  for (const auto& body : bodies) {
    const auto module = make_torchscript_unet({.body = body});
    const auto unet = TorchScriptUNet::from_module(module);
    EXPECT_THAT(names(*unet), ::testing::ElementsAre("middle.0.0"));
    const auto in = fixture_input();
    std::vector<std::int64_t> images;
    const AttentionHook hook = [&, caller = std::this_thread::get_id()](const AttentionCall& call,
                                                                        const Pass& pass,
                                                                        const NextAttention& next) {
      EXPECT_EQ(std::this_thread::get_id(), caller);
      EXPECT_FALSE(torch::jit::getGraphExecutorOptimize()) << "or it would be profiled and fused";
      for (const auto& rows : pass.groups) images.push_back(rows.image);
      return next(call);
    };
    StepContext step(1.0, 0, in.x.size(2), in.x.size(3));
    const auto out =
        run_hooked({{"middle.0.0", hook, {}}}, {.groups = {{.count = in.x.size(0)}}, .step = &step},
                   [&] { return unet->forward(in); });
    EXPECT_TRUE(torch::equal(out, run_module(module, in)));
    EXPECT_THAT(images, ::testing::ElementsAre(0, 1));
    EXPECT_TRUE(torch::jit::getGraphExecutorOptimize());
  }
}

TEST(TorchScriptUNet, SaysWhatWentWrongInAForkedTask) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(
      {.body = "    future = fork(block(self.middle_block).attn1.forward, t[0], t)\n"
               "    t = t + torch.wait(future)\n"}));
  EXPECT_THAT(error_of<c10::Error>([&] { unet->forward(fixture_input()); }),
              AllOf(one_sentence(), HasSubstr("Dimension out of range")));
}

TEST(TorchScriptUNet, RefusesASiteThatItDoesNotHave) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet());
  EXPECT_THAT(error_of<c10::ValueError>([&] { Hooked(*unet, fixture_input(), {"middle.0.7"}); }),
              AllOf(one_sentence(), HasSubstr("middle.0.7"), HasSubstr("input.1.0")));
  EXPECT_THAT(
      error_of<c10::ValueError>([&] {
        Hooked(*unet, fixture_input(), {"middle.0.0", "middle_block.1.transformer_blocks.0.attn1"});
      }),
      AllOf(one_sentence(), HasSubstr("one name")));
}

// ---- files

TEST(TorchScriptUNetLoad, ReadsWhatASavedModuleGives) {
  const auto module = make_torchscript_unet();
  const auto unet = save_and_load(module);
  const auto in = fixture_input();
  EXPECT_TRUE(torch::equal(unet->forward(in), run_module(module, in)));
  EXPECT_THAT(names(*unet), ::testing::ElementsAre("input.1.0", "middle.0.0"));
  EXPECT_THAT(unet->argument_names(), ::testing::ElementsAre("x", "timesteps", "context"));
  EXPECT_EQ(unet->device(), torch::Device(torch::kCPU));
  EXPECT_EQ(unet->dtype(), torch::kFloat);
}

TEST(TorchScriptUNetLoad, TakesItsWeightsFromAFunction) {
  const TemporaryFile file("unet.ts");
  make_torchscript_unet().save(file.path());
  auto other = make_torchscript_unet();
  std::map<std::string, torch::Tensor> values;
  for (const auto& parameter : other.named_parameters()) {
    parameter.value.set_data(parameter.value * 1.5);
    values[parameter.name] = parameter.value;
  }
  other.eval();
  std::size_t calls = 0;
  const auto give = [&](const std::string& parameter) {
    ++calls;
    return values.at(parameter).to(torch::kDouble);
  };
  const auto unet = TorchScriptUNet::load(file.path(), {.weights = give});
  EXPECT_EQ(calls, values.size());
  EXPECT_TRUE(unet->forward(fixture_input())
                  .equal(TorchScriptUNet::from_module(other)->forward(fixture_input())));
  const auto refusal = [&](const torch::Tensor& value) {
    return error_of<c10::ValueError>([&] {
      TorchScriptUNet::load(file.path(), {.weights = [&](const std::string&) { return value; }});
    });
  };
  EXPECT_THAT(refusal({}), AllOf(one_sentence(), HasSubstr("got nothing")));
  EXPECT_THAT(refusal(torch::zeros({2})),
              HasSubstr("must return a floating tensor of shape [8, 8]"));
  EXPECT_THAT(refusal(torch::zeros({8, 8}, torch::kLong)), HasSubstr("of Long"));
}

TEST(TorchScriptUNetLoad, TellsSelfFromCrossAttentionInAFrozenFile) {
  const auto module = make_torchscript_unet();
  const auto frozen = torch::jit::freeze(module);
  const auto unet = save_and_load(frozen);
  EXPECT_THAT(names(*unet), ::testing::ElementsAre("#0", "#2"));
  EXPECT_EQ(unet->attention_sites()[1].path, "");
  const auto in = fixture_input();
  EXPECT_LT(relative_error(unet->forward(in), run_module(module, in)), 1e-6);
  const Hooked hooked(*unet, in, {"#2"});
  EXPECT_EQ(hooked.calls.size(), 1u);
  EXPECT_TRUE(torch::equal(hooked.out, unet->forward(in)));
}

TEST(TorchScriptUNetLoad, ConvertsAFrozenFile) {
  const auto module = make_torchscript_unet();
  auto in = fixture_input();
  const auto expected = run_module(module, in);
  const auto unet = save_and_load(torch::jit::freeze(module), {.dtype = torch::kHalf});
  EXPECT_EQ(unet->dtype(), torch::kHalf);
  in.x = in.x.to(torch::kHalf);
  in.context = in.context.to(torch::kHalf);
  const auto out = unet->forward(in);
  EXPECT_EQ(out.scalar_type(), torch::kHalf);
  EXPECT_LT(relative_error(out, expected), 5e-3);
}

TEST(TorchScriptUNetLoad, LaysAFrozenFileOutWithChannelsLast) {
  const auto module = make_torchscript_unet();
  const auto in = fixture_input();
  const auto unet = save_and_load(torch::jit::freeze(module), {.channels_last = true});
  EXPECT_LT(relative_error(unet->forward(in), run_module(module, in)), 1e-5);
}

TEST(TorchScriptUNetLoad, RunsAHalfPrecisionFileInFp32OnTheCpu) {
  // As exported in half precision: half weights, and a cast of activations to half.
  const std::string body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n";
  const auto expected = run_module(make_torchscript_unet({.body = body}), fixture_input());
  auto half = make_torchscript_unet({.body = "    t = torch.to(t, 5)\n" + body});
  half.to(torch::kHalf);
  const auto unet = save_and_load(half);
  EXPECT_EQ(unet->dtype(), torch::kFloat);
  const auto out = unet->forward(fixture_input());
  EXPECT_EQ(out.scalar_type(), torch::kFloat);
  EXPECT_LT(relative_error(out, expected), 5e-3);
}

TEST(TorchScriptUNetLoad, TakesFp32TimestepsInAHalfPrecisionModule) {
  auto module = make_torchscript_unet();
  module.to(torch::kHalf);
  const auto unet = TorchScriptUNet::from_module(module);
  EXPECT_EQ(unet->dtype(), torch::kHalf);
  auto in = fixture_input();
  in.x = in.x.to(torch::kHalf);
  in.context = in.context.to(torch::kHalf);
  EXPECT_EQ(unet->forward(in).scalar_type(), torch::kHalf);
}

TEST(TorchScriptUNetLoad, RefusesWhatIsNoArchive) {
  const TemporaryFile file("bad.ts");
  const auto load = [&] { TorchScriptUNet::load(file.path()); };
  const auto refusal = [&](const char* what) {
    return AllOf(one_sentence(), HasSubstr(file.path()), HasSubstr(what));
  };
  EXPECT_THAT(error_of<c10::ValueError>(load), refusal("does not exist"));
  file.write("");
  EXPECT_THAT(error_of<c10::ValueError>(load), refusal("is empty"));
  file.write(std::string("\x40\0\0\0PTMF\0\0\0\0", 12));
  EXPECT_THAT(error_of<c10::ValueError>(load), refusal("flatbuffer (.ff): save the module with"));
  file.write("\x89PNG\r\n\x1a\n and so on");
  EXPECT_THAT(error_of<c10::ValueError>(load), refusal("not a zip archive"));
  torch::save(torch::ones({2}), file.path());
  EXPECT_THAT(error_of<c10::ValueError>(load), one_sentence());
  file.write(read_bytes(kGoldenDir + "unet_io.pt"));
  EXPECT_THAT(error_of<c10::ValueError>(load), refusal("torch.save"));
  const auto archive = read_bytes(kGoldenDir + "comfy_sd15_tiny.ts");
  for (const double part : {0.001, 0.5, 0.999}) {
    file.write(archive.substr(0, static_cast<std::size_t>(part * archive.size())));
    EXPECT_THAT(error_of<c10::ValueError>(load), refusal("truncated"));
  }
  EXPECT_THAT(error_of<c10::ValueError>([] { TorchScriptUNet::load(::testing::TempDir()); }),
              HasSubstr("directory"));
}

TEST(TorchScriptUNetLoad, RefusesAFileWhoseBytesAreDamaged) {
  const TemporaryFile file("damaged.ts");
  auto archive = read_bytes(kGoldenDir + "comfy_sd15_tiny.ts");
  const auto code = archive.find("code/__torch__");
  ASSERT_NE(code, std::string::npos);
  for (std::size_t i = 0; i < 64; ++i) archive[code + 200 + i] ^= 0x55;
  file.write(archive);
  EXPECT_THAT(error_of<c10::ValueError>([&] { TorchScriptUNet::load(file.path()); }),
              one_sentence());
}

TEST(TorchScriptUNetLoad, ReadsAnArchiveOfTheLiteInterpreter) {
  const auto mobile = TorchScriptUNet::load(kGoldenDir + "attention/tiny_mobile.ptl");
  const auto usual = TorchScriptUNet::load(kGoldenDir + "attention/tiny_fused.ts");
  EXPECT_EQ(names(*mobile), names(*usual));
  torch::manual_seed(3);
  const UNetInput in = {
      torch::randn({2, 4, 7, 5}), torch::tensor({3.f, 800.f}), torch::randn({2, 7, 32}), {}, {}};
  const Hooked hooked(*mobile, in, {"middle.0.0"});
  EXPECT_EQ(hooked.calls.size(), 1u);
  EXPECT_TRUE(torch::equal(hooked.out, usual->forward(in)));
}

// Writes the archive again, with `from` replaced by `to` in its code.
void edit_code(const std::string& from_path, const std::string& to_path, const std::string& from,
               const std::string& to) {
  caffe2::serialize::PyTorchStreamReader reader(from_path);
  caffe2::serialize::PyTorchStreamWriter writer(to_path);
  for (const auto& name : reader.getAllRecords()) {
    if (name == "version" || name == "byteorder" || name == ".data/version" ||
        name == ".data/serialization_id" || name.ends_with(".debug_pkl"))
      continue;
    const auto [data, size] = reader.getRecord(name);
    std::string bytes(static_cast<const char*>(data.get()), size);
    for (auto at = bytes.find(from); name.starts_with("code/") && at != std::string::npos;
         at = bytes.find(from, at + to.size()))
      bytes.replace(at, from.size(), to);
    writer.writeRecord(name, bytes.data(), bytes.size());
  }
  writer.writeEndOfFile();
}

TEST(TorchScriptUNetLoad, NamesAnOpThatNobodyRegisteredAndTheWayOut) {
  const TemporaryFile file("foreign.ts");
  const auto refusal = [&](const std::string& op) {
    edit_code(kGoldenDir + "attention/tiny_fused.ts", file.path(),
              "torch.scaled_dot_product_attention(", "ops." + op + "(");
    return error_of<c10::ValueError>([&] { TorchScriptUNet::load(file.path()); });
  };
  EXPECT_THAT(refusal("xformers.efficient_attention_forward_cutlass"),
              AllOf(one_sentence(), HasSubstr(file.path()),
                    HasSubstr("uses xformers::efficient_attention_forward_cutlass, an op"),
                    HasSubstr("AttnProcessor2_0")));
  EXPECT_THAT(refusal("torchvision.nms"),
              AllOf(one_sentence(), HasSubstr("uses torchvision::nms, an op"),
                    HasSubstr("load the library"), Not(HasSubstr("AttnProcessor"))));
  EXPECT_THAT(refusal("aten.attention_of_tomorrow"),
              AllOf(one_sentence(), HasSubstr("uses aten::attention_of_tomorrow, an op"),
                    HasSubstr("PyTorch " TORCH_VERSION)));
}

TEST(TorchScriptUNetLoad, RefusesAModelWithoutSelfAttentionToHook) {
  const auto refusal = [](const test::TorchScriptFixture& fixture) {
    return error_of<c10::ValueError>([&] { save_and_load(make_torchscript_unet(fixture)); });
  };
  EXPECT_THAT(refusal({.body = ""}), AllOf(one_sentence(), HasSubstr("no attention at all")));
  EXPECT_THAT(refusal({.body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n",
                       .attention = "torch.softmax(q, -1) + torch.softmax(k, -1) + v"}),
              AllOf(one_sentence(), HasSubstr("scaled_dot_product_attention")));
  EXPECT_THAT(refusal({.body = "    t = t + block(self.input_blocks).attn2.forward(t, context)\n"}),
              AllOf(one_sentence(), HasSubstr("only cross-attention")));
}

TEST(TorchScriptUNetLoad, RefusesOptionsThatCannotBe) {
  const auto path = kGoldenDir + "comfy_sd15_tiny.ts";
  EXPECT_THAT(
      error_of<c10::TypeError>([&] { TorchScriptUNet::load(path, {.dtype = torch::kInt}); }),
      one_sentence());
  EXPECT_THAT(error_of<c10::ValueError>([&] {
                TorchScriptUNet::load(path, {.device = {torch::kCUDA, 99}});
              }),
              one_sentence());
}

TEST(TorchScriptUNet, WantsTheModuleInEvalMode) {
  auto module = make_torchscript_unet();
  module.train();
  EXPECT_THAT(error_of<c10::ValueError>([&] { TorchScriptUNet::from_module(module); }),
              AllOf(one_sentence(), HasSubstr("eval")));
  EXPECT_THAT(error_of<c10::ValueError>([&] { TorchScriptUNet::from_module(Module("Empty")); }),
              one_sentence());
}

// ---- arguments and results

TEST(TorchScriptUNetForward, PlacesYAndExtraInputsByName) {
  const auto module = make_torchscript_unet(
      {.arguments = "x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, "
                    "y: Tensor, strength: Optional[Tensor] = None, flag: bool = True",
       .body = "    context = encoder_hidden_states\n"
               "    t = t + block(self.middle_block).attn1.forward(t, t)\n",
       .result = "out * y[0, 0] * (strength if strength is not None else torch.ones([1]))"});
  const auto unet = TorchScriptUNet::from_module(module);
  auto in = fixture_input();
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("argument \"y\" must be given, got nothing"),
                    HasSubstr("encoder_hidden_states")));
  in.y = torch::full({2, 3}, 2.f);
  const auto doubled = unet->forward(in);
  in.extra["strength"] = torch::full({2, 1, 1, 1}, 3.f);
  EXPECT_LT(relative_error(unet->forward(in), doubled * 3), 1e-6);
  in.extra["unknown"] = torch::ones({2});
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("got \"unknown\".")));
  in.extra.erase("unknown");
  in.extra["flag"] = torch::ones({2});
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("got \"flag\".")));
}

TEST(TorchScriptUNetForward, KnowsTheContextByItsName) {
  const std::string body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n";
  for (const std::string name : {"context", "encoder_hidden_states"}) {
    const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(
        {.arguments = "x: Tensor, timesteps: Tensor, mask: Optional[Tensor] = None, " + name +
                      ": Optional[Tensor] = None",
         .body = body,
         .result = "torch.zeros_like(out) + (0 if mask is None else 1) + (" + name +
                   ".size(1) if " + name + " is not None else 0) * 10"}));
    auto in = fixture_input();
    const auto tokens = 10.0 * static_cast<double>(in.context.size(1));
    EXPECT_EQ(unet->forward(in).max().item<double>(), tokens) << name;
    in.extra["mask"] = torch::ones({2, 5});
    EXPECT_EQ(unet->forward(in).max().item<double>(), tokens + 1) << name;
  }
}

TEST(TorchScriptUNetForward, TakesAThirdThatMustBeGivenForTheContext) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(
      {.arguments = "x: Tensor, timesteps: Tensor, cond: Tensor, context: Optional[Tensor] = None",
       .body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n",
       .result = "torch.zeros_like(out) + cond.size(1) + (0 if context is None else 100)"}));
  const auto in = fixture_input();
  EXPECT_EQ(unet->forward(in).max().item<double>(), static_cast<double>(in.context.size(1)));
}

TEST(TorchScriptUNetForward, NeedsNoContextWhereTheFileTakesNone) {
  const std::string body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n";
  const auto plain = TorchScriptUNet::from_module(
      make_torchscript_unet({.arguments = "x: Tensor, timesteps: Tensor", .body = body}));
  auto in = fixture_input();
  EXPECT_THAT(error_of<c10::ValueError>([&] { plain->forward(in); }),
              AllOf(one_sentence(), HasSubstr("context")));
  in.context = torch::Tensor();
  EXPECT_NO_THROW(plain->forward(in));

  const auto with_y = TorchScriptUNet::from_module(
      make_torchscript_unet({.arguments = "x: Tensor, timesteps: Tensor, y: Tensor",
                             .body = body,
                             .result = "out * y[0, 0]"}));
  in.y = torch::ones({2, 3});
  EXPECT_NO_THROW(with_y->forward(in));

  const auto optional = TorchScriptUNet::from_module(make_torchscript_unet(
      {.arguments = "x: Tensor, timesteps: Tensor, context: Optional[Tensor]", .body = body}));
  in.y = torch::Tensor();
  EXPECT_NO_THROW(optional->forward(in));
}

TEST(TorchScriptUNetForward, FillsDictsListsAndTuplesFromTheirEntries) {
  const std::string body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n";
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(
      {.arguments = "x: Tensor, timesteps: Tensor, context: Tensor, "
                    "added_cond_kwargs: Dict[str, Tensor], down: List[Tensor], "
                    "pair: Optional[Tuple[Tensor, Tensor]] = None, "
                    "more: Optional[Dict[str, Tensor]] = None",
       .body = body,
       .result = "out * added_cond_kwargs[\"text_embeds\"][:, 0].reshape(-1, 1, 1, 1) "
                 "+ down[0] + 10 * down[10] + len(down) "
                 "+ (pair[0] - pair[1] if pair is not None else torch.zeros([1])) "
                 "+ (len(more) if more is not None else 0)"}));
  auto in = fixture_input();
  const auto plain =
      TorchScriptUNet::from_module(make_torchscript_unet({.body = body}))->forward(in);
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("\"added_cond_kwargs.key\"")));
  in.extra["added_cond_kwargs.text_embeds"] = torch::tensor({{2.f, 0.f}, {3.f, 0.f}});
  in.extra["added_cond_kwargs.time_ids"] = torch::ones({2, 6});
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("\"down.0\"")));
  const auto residual = [&](double value) { return torch::full_like(in.x, value); };
  for (int i = 0; i < 12; ++i) in.extra["down." + std::to_string(i)] = residual(i);
  const auto scaled = plain * torch::tensor({2.f, 3.f}).view({2, 1, 1, 1}) + 100 + 12;
  EXPECT_LT(relative_error(unet->forward(in), scaled), 1e-6);

  in.extra["pair.0"] = residual(5);
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("tuple \"pair\" must have 2 tensors")));
  in.extra["pair.1"] = residual(3);
  in.extra["more.one"] = residual(0);
  EXPECT_LT(relative_error(unet->forward(in), scaled + 3), 1e-6);

  in.extra.erase("down.4");
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("\"down.4\" is not given.")));
  in.extra["down.4"] = residual(4).narrow(0, 0, 1);
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("down.4 must have")));
  in.extra["down.4"] = residual(4);
  in.extra["context.0"] = residual(4);
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("must be a tensor argument of the file"),
                    HasSubstr("got \"context.0\".")));
}

// From a prompt to the network: repeated for all rows, in the order of the batch.
TEST(TorchScriptUNetForward, GetsTheEntriesOfConditionings) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(
      {.arguments = "x: Tensor, timesteps: Tensor, context: Tensor, "
                    "added_cond_kwargs: Dict[str, Tensor], residuals: Tuple[Tensor, Tensor]",
       .body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n",
       .result = "0 * out + added_cond_kwargs[\"time_ids\"][:, 1].reshape(-1, 1, 1, 1) "
                 "+ residuals[0] + residuals[1]"}));
  const ModelPatcher model(unet, ModelSampling::discrete(Prediction::x0));
  const auto prompt = [](double value) {
    return Conditioning{.context = torch::zeros({1, 3, test::kContextWidth}),
                        .extra = {{"added_cond_kwargs.time_ids", torch::full({1, 6}, value)},
                                  {"residuals.0", torch::full({1, 4, 6, 5}, 10 * value)},
                                  {"residuals.1", torch::full({2, 4, 1, 1}, 100 * value)}}};
  };
  const auto x = torch::zeros({2, 4, 6, 5});
  const std::vector<CondRequest> requests = {
      {.branch = Branch::uncond, .x = x, .conds = {prompt(2)}},
      {.branch = Branch::cond, .x = x, .conds = {prompt(1)}}};
  StepContext step(1.0, 0, 6, 5);
  const auto result = calc_cond_batch(model, requests, 1.0, step, {});
  EXPECT_EQ(result.unet_calls, 1);
  EXPECT_TRUE(torch::equal(result.denoised[0], torch::full_like(x, 222)));
  EXPECT_TRUE(torch::equal(result.denoised[1], torch::full_like(x, 111)));
}

TEST(TorchScriptUNetForward, UnpacksTuplesListsAndDicts) {
  const auto in = fixture_input();
  const auto expected = TorchScriptUNet::from_module(make_torchscript_unet())->forward(in);
  for (const char* result : {"(out, 1)", "(1, out)", "[out, x]", "{\"sample\": out, \"x\": x}",
                             "{\"out\": out, \"x\": x}", "{\"anything\": out}", "((out, x), 1)",
                             "(1, [out])", "{\"sample\": [out]}", "{\"a\": (1, out)}"}) {
    const auto unet = TorchScriptUNet::from_module(make_torchscript_unet({.result = result}));
    EXPECT_TRUE(torch::equal(unet->forward(in), expected)) << result;
  }
  for (const char* result : {"1", "{\"a\": out, \"b\": out}", "(1, 2)", "\"text\""}) {
    const auto unet = TorchScriptUNet::from_module(make_torchscript_unet({.result = result}));
    EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
                AllOf(one_sentence(), HasSubstr("middle.0.0")))
        << result;
  }
  const auto unet =
      TorchScriptUNet::from_module(make_torchscript_unet({.result = "out[:, :, :3]"}));
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("[2, 4, 3, 5]")));
}

TEST(TorchScriptUNetForward, RefusesInputsThatDoNotFit) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet());
  const auto with = [&](const std::function<void(UNetInput&)>& change) {
    return [&unet, change] {
      auto in = fixture_input();
      change(in);
      unet->forward(in);
    };
  };
  EXPECT_THAT(error_of<c10::ValueError>(with([](auto& in) { in.x = torch::Tensor(); })),
              HasSubstr("x must"));
  EXPECT_THAT(error_of<c10::ValueError>(with([](auto& in) { in.x = in.x[0]; })),
              HasSubstr("[4, 6, 5]"));
  EXPECT_THAT(error_of<c10::TypeError>(with([](auto& in) { in.x = in.x.to(torch::kHalf); })),
              HasSubstr("Half"));
  EXPECT_THAT(error_of<c10::TypeError>(
                  with([](auto& in) { in.timesteps = in.timesteps.to(torch::kLong); })),
              HasSubstr("timesteps"));
  EXPECT_THAT(error_of<c10::ValueError>(with([](auto& in) { in.timesteps = in.timesteps[0]; })),
              HasSubstr("timesteps"));
  EXPECT_THAT(
      error_of<c10::ValueError>(with([](auto& in) { in.context = in.context.slice(0, 0, 1); })),
      HasSubstr("context must have 3 dimensions and 2 rows"));
  EXPECT_THAT(error_of<c10::ValueError>(with([](auto& in) { in.context = torch::Tensor(); })),
              HasSubstr("argument \"context\" must be given"));
  EXPECT_THAT(error_of<c10::ValueError>(with([](auto& in) { in.x = in.x.to(torch::kMeta); })),
              HasSubstr("device"));
}

TEST(TorchScriptUNetForward, SaysInOneSentenceWhatFailedInsideTheNetwork) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet());
  auto in = fixture_input();
  in.context = torch::randn({2, 3, test::kContextWidth + 1});
  EXPECT_THAT(error_of([&] { unet->forward(in); }),
              AllOf(one_sentence(), HasSubstr("[2, 4, 6, 5], context of shape [2, 3, "),
                    HasSubstr("mat1")));
  const auto raising = TorchScriptUNet::from_module(make_torchscript_unet(
      {.body = "    t = t + block(self.middle_block).attn1.forward(t, t)\n"
               "    assert x.size(2) % 4 == 0, \"sides must be multiples of 4\"\n"}));
  EXPECT_THAT(error_of([&] { raising->forward(fixture_input()); }),
              AllOf(one_sentence(), HasSubstr("sides must be multiples of 4")));
}

}  // namespace
}  // namespace sag

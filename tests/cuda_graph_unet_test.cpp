#include "sag/cuda_graph_unet.h"

#include <stdexcept>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/model_patcher.h"
#include "sag/samplers.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/device.h"
#include "support/files.h"
#include "support/torchscript_fixture.h"
#include "support/toy_unet.h"

#ifdef SAG_WITH_CUDA
#include <ATen/autocast_mode.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace sag {
namespace {

using test::fill;
using test::toy_prompt;
using test::ToyUNet;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

UNetInput toy_input(std::int64_t rows, torch::Device device) {
  return {.x = fill({rows, 4, 16, 24}, 0.7, 0.3, 1.5).to(device),
          .timesteps = torch::full({rows}, 5.0, device),
          .context = torch::ones({rows, 1, 1}, device)};
}

TEST(CudaGraphUNet, IsTheUNetItself) {
  const auto toy = std::make_shared<ToyUNet>();
  const CudaGraphUNet unet(toy);
  EXPECT_EQ(unet.attention_sites().size(), 1u);
  EXPECT_EQ(unet.device(), torch::kCPU);
  EXPECT_EQ(unet.dtype(), torch::kFloat);
  const auto input = toy_input(2, torch::kCPU);
  EXPECT_TRUE(unet.forward(input).equal(toy->forward(input)));
  const auto report = unet.report();
  EXPECT_EQ(report.replays, 0);
  EXPECT_EQ(report.eager.at("the input is not on a CUDA device"), 1);
}

TEST(CudaGraphUNet, RefusesOptionsOutOfRange) {
  const auto toy = std::make_shared<ToyUNet>();
  EXPECT_THAT([] { CudaGraphUNet unet(nullptr); },
              ThrowsMessage<c10::ValueError>(HasSubstr("unet must not be null")));
  EXPECT_THROW(CudaGraphUNet(toy, {.max_graphs = 0}), c10::ValueError);
  EXPECT_THROW(CudaGraphUNet(toy, {.warmup_runs = 0}), c10::ValueError);
}

#ifdef SAG_WITH_CUDA

class CudaGraph : public ::testing::Test {
 protected:
  void SetUp() override { SAG_SKIP_WITHOUT_CUDA(torch::Device(torch::kCUDA)); }

  static torch::Device device() { return {torch::kCUDA, 0}; }

  // A guided run on the toy.
  static torch::Tensor sample_toy(const std::shared_ptr<const UNet>& unet, std::int64_t width = 24,
                                  const SelfAttentionGuidanceOptions& options = {.scale = 0.75}) {
    const auto model = apply_self_attention_guidance({unet, ModelSampling::discrete()}, options);
    return run(model, width);
  }
  static torch::Tensor run(const ModelPatcher& model, std::int64_t width = 24) {
    const std::vector<double> sigmas = {10, 4, 1.5, 0.5, 0};
    CfgGuider guider(model, {toy_prompt(1, device())}, {toy_prompt(-1, device())},
                     {.cond_scale = 7.0});
    guider.begin_run(sigmas);
    const auto x = fill({1, 4, 16, width}, 0.7, 0.3, 15.0).to(device());
    return sample_euler(std::ref(guider), x, sigmas);
  }
};

TEST_F(CudaGraph, GivesTheNumbersOfTheEagerUNet) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const auto eager = sample_toy(toy);
  const auto unet = std::make_shared<CudaGraphUNet>(toy);
  EXPECT_TRUE(sample_toy(unet).equal(eager));
  const auto report = unet->report();
  EXPECT_EQ(report.failure, "");
  // Both branches, and SAG's own row.
  EXPECT_EQ(report.captures, 2);
  EXPECT_EQ(report.replays, 8);
  EXPECT_EQ(report.graphs, 2);
  EXPECT_GT(report.bytes, 0);
  EXPECT_TRUE(report.eager.empty());
}

TEST_F(CudaGraph, TakesFurtherChannels) {
  const std::shared_ptr<const UNet> inpainting = std::make_shared<test::ConcatUNet>(device());
  const auto sample = [](const std::shared_ptr<const UNet>& unet) {
    const auto with = [](double prompt, double phase) {
      auto cond = toy_prompt(prompt, device());
      cond.concat = fill({1, 5, 16, 24}, 0.4, phase, 2.0).to(device());
      return cond;
    };
    const auto model =
        apply_self_attention_guidance({unet, ModelSampling::discrete()}, {.scale = 0.75});
    const std::vector<double> sigmas = {10, 4, 1.5, 0.5, 0};
    CfgGuider guider(model, {with(1, 0.1)}, {with(-1, 0.9)}, {.cond_scale = 7.0});
    guider.begin_run(sigmas);
    return sample_euler(std::ref(guider), fill({1, 4, 16, 24}, 0.7, 0.3, 15.0).to(device()),
                        sigmas);
  };
  const auto graphs = std::make_shared<CudaGraphUNet>(inpainting);
  EXPECT_TRUE(sample(graphs).equal(sample(inpainting)));
  EXPECT_EQ(graphs->report().captures, 2);
  EXPECT_EQ(graphs->report().replays, 8);
}

TEST_F(CudaGraph, GivesTheNumbersOfATorchScriptUNet) {
  for (const auto dtype : {torch::kFloat, torch::kHalf}) {
    const std::shared_ptr<const UNet> file = TorchScriptUNet::load(
        test::kGoldenDir + "comfy_sdxl_tiny.ts", {.device = device(), .dtype = dtype});
    const auto sample = [&](const std::shared_ptr<const UNet>& unet) {
      const auto prompt = [](double phase) {
        return Conditioning{.context = fill({1, 10, 32}, 0.3, phase, 1.0).to(device()),
                            .y = fill({1, 48}, 0.2, phase, 1.0).to(device())};
      };
      CfgGuider guider(apply_self_attention_guidance({unet, ModelSampling::discrete()}),
                       {prompt(0.1)}, {prompt(0.7)}, {.cond_scale = 5.0});
      const auto x = fill({1, 4, 24, 17}, 0.7, 0.3, 15.0).to(device());
      return sample_euler(std::ref(guider), x, std::vector<double>{10, 4, 1.5, 0.5, 0});
    };
    const auto unet = std::make_shared<CudaGraphUNet>(file);
    EXPECT_TRUE(sample(unet).equal(sample(file))) << dtype;
    EXPECT_EQ(unet->report().failure, "");
    EXPECT_EQ(unet->report().captures, 2);
  }
}

// The toy, evaluated row by row: one attention in several calls.
class RowByRowUNet final : public UNet {
 public:
  explicit RowByRowUNet(torch::Device device) : toy_(device) {}
  torch::Tensor forward(const UNetInput& input) const override {
    std::vector<torch::Tensor> rows;
    for (std::int64_t i = 0; i < input.x.size(0); ++i)
      rows.push_back(toy_.forward({.x = input.x.narrow(0, i, 1),
                                   .timesteps = input.timesteps.narrow(0, i, 1),
                                   .context = input.context.narrow(0, i, 1)}));
    return torch::cat(rows);
  }
  std::vector<AttentionSiteInfo> attention_sites() const override { return toy_.attention_sites(); }
  torch::Device device() const override { return toy_.device(); }
  torch::ScalarType dtype() const override { return toy_.dtype(); }

 private:
  ToyUNet toy_;
};

TEST_F(CudaGraph, RepeatsTheRecordsOfSplitBatches) {
  const auto guided_by = [](const std::shared_ptr<const UNet>& unet) {
    return apply_self_attention_guidance({unet, ModelSampling::discrete()});
  };
  const auto sample_two = [](const ModelPatcher& model) {
    CfgGuider guider(model, {toy_prompt(1, device())}, {toy_prompt(-1, device())},
                     {.cond_scale = 7.0});
    const auto x = fill({2, 4, 16, 24}, 0.7, 0.3, 15.0).to(device());
    const auto sample = sample_euler(std::ref(guider), x, std::vector<double>{10, 4, 1.5, 0.5, 0});
    EXPECT_EQ(guider.report().guided(), 4);
    return sample;
  };
  const auto split = std::make_shared<RowByRowUNet>(device());
  const auto unet = std::make_shared<CudaGraphUNet>(split);
  const auto eager = sample_two(guided_by(split));
  const auto graphed = guided_by(unet);
  EXPECT_TRUE(sample_two(graphed).equal(eager));
  EXPECT_TRUE(sample_two(graphed).equal(eager));
  EXPECT_EQ(unet->report().failure, "");
  EXPECT_EQ(unet->report().captures, 2);
  const auto whole = sample_two(guided_by(std::make_shared<ToyUNet>(device())));
  EXPECT_LT((eager - whole).abs().max().item<double>(), 1e-4 * whole.abs().max().item<double>());
}

TEST_F(CudaGraph, OutputsOutliveTheNextCall) {
  const CudaGraphUNet unet(std::make_shared<ToyUNet>(device()));
  const auto input = toy_input(1, device());
  const auto first = unet.forward(input);
  const auto before = first.clone();
  auto other = input;
  other.x = input.x * 3;
  const auto second = unet.forward(other);
  EXPECT_TRUE(first.equal(before));
  EXPECT_FALSE(second.equal(first));
}

TEST_F(CudaGraph, KeepsABoundedNumberOfGraphs) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const CudaGraphUNet unet(toy, {.max_graphs = 2});
  for (const std::int64_t rows : {1, 2, 3, 1, 3}) {
    const auto input = toy_input(rows, device());
    EXPECT_TRUE(unet.forward(input).equal(toy->forward(input))) << rows;
  }
  EXPECT_EQ(unet.report().graphs, 2);
  // The graph of 1 row was dropped for that of 3, and captured again.
  EXPECT_EQ(unet.report().captures, 4);
}

TEST_F(CudaGraph, HooksThatAreNotCapturableRunEagerly) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const auto unet = std::make_shared<CudaGraphUNet>(toy);
  int runs = 0;
  ModelPatcher model(unet, ModelSampling::discrete());
  model.set_attn1_replace(
      [&runs](const AttentionCall& call, const Pass&, const NextAttention& next) {
        ++runs;
        return next(call);
      },
      AttentionSite("middle.0.0"),
      {.active = [](const StepContext& step) { return step.sigma() > 2; }});
  run(model);
  // At 10 and 4.
  EXPECT_EQ(runs, 2);
  EXPECT_EQ(unet->report().eager.at("an active hook is not capturable"), 2);
  EXPECT_EQ(unet->report().replays, 2);
}

TEST_F(CudaGraph, HooksOfAnotherModelAreNotReplayed) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const auto unet = std::make_shared<CudaGraphUNet>(toy);
  EXPECT_TRUE(sample_toy(unet, 24, {.scale = 0.75}).equal(sample_toy(toy, 24, {.scale = 0.75})));
  EXPECT_TRUE(sample_toy(unet, 24, {.scale = 0.0}).equal(sample_toy(toy, 24, {.scale = 0.0})));
  EXPECT_TRUE(sample_toy(unet, 24, {.scale = -1.0}).equal(sample_toy(toy, 24, {.scale = -1.0})));
}

TEST_F(CudaGraph, WhatAHookThrowsArrives) {
  struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  const auto unet = std::make_shared<CudaGraphUNet>(std::make_shared<ToyUNet>(device()));
  ModelPatcher model(unet, ModelSampling::discrete());
  model.set_attn1_replace([](const AttentionCall&, const Pass&,
                             const NextAttention&) -> torch::Tensor { throw Refused("no"); },
                          AttentionSite("middle.0.0"), {.capturable = true});
  EXPECT_THROW(run(model), Refused);
  EXPECT_EQ(unet->report().failure, "");
  EXPECT_TRUE(sample_toy(unet).isfinite().all().item<bool>());
}

// The toy, with a change of its output.
class ChangedToy final : public UNet {
 public:
  using Change = std::function<torch::Tensor(const UNetInput&, const torch::Tensor& out)>;
  ChangedToy(torch::Device device, Change change) : toy_(device), change_(std::move(change)) {}
  torch::Tensor forward(const UNetInput& input) const override {
    return change_(input, toy_.forward(input));
  }
  std::vector<AttentionSiteInfo> attention_sites() const override { return toy_.attention_sites(); }
  torch::Device device() const override { return toy_.device(); }
  torch::ScalarType dtype() const override { return toy_.dtype(); }

 private:
  ToyUNet toy_;
  Change change_;
};

TEST_F(CudaGraph, FallsBackWhenItCannotCapture) {
  // Reads from the device.
  const ChangedToy::Change synchronizing = [](const UNetInput& input, const torch::Tensor& out) {
    return out * input.timesteps[0].item<double>();
  };
  // Leaves work on another stream: the capture fails at its end.
  const ChangedToy::Change unjoined = [](const UNetInput&, const torch::Tensor& out) {
    at::cuda::CUDAEvent ready;
    ready.record();
    const auto other = c10::cuda::getStreamFromPool();
    ready.block(other);
    const c10::cuda::CUDAStreamGuard guard(other);
    out.add(1);
    return out;
  };
  for (const auto& change : {synchronizing, unjoined}) {
    const auto changed = std::make_shared<ChangedToy>(device(), change);
    const CudaGraphUNet unet(changed);
    const auto input = toy_input(2, device());
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(unet.forward(input).equal(changed->forward(input)));
    const auto report = unet.report();
    EXPECT_NE(report.failure, "");
    EXPECT_EQ(report.eager.at("a capture failed"), 3);
    EXPECT_EQ(report.replays, 0);
    // The process can still capture.
    const CudaGraphUNet healthy(std::make_shared<ToyUNet>(device()));
    healthy.forward(input);
    EXPECT_EQ(healthy.report().failure, "");
    EXPECT_EQ(healthy.report().replays, 1);
    EXPECT_NO_THROW(c10::cuda::CUDACachingAllocator::emptyCache());
  }
}

TEST_F(CudaGraph, IsEagerInsideACaptureOfTheCallers) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const CudaGraphUNet unet(toy);
  auto input = toy_input(2, device());
  const auto stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  // Captures its graph.
  unet.forward(input);
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  const auto out = unet.forward(input);
  graph.capture_end();
  EXPECT_EQ(unet.report().eager.at("the caller captures a graph itself"), 1);
  input.x.mul_(0.5);
  graph.replay();
  EXPECT_TRUE(out.equal(toy->forward(input)));
}

// Autocast keeps half weights for as long as its region lasts; a graph would read them afterwards.
TEST_F(CudaGraph, IsEagerUnderAutocast) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const CudaGraphUNet unet(toy);
  const auto input = toy_input(2, device());
  at::autocast::set_autocast_enabled(torch::kCUDA, true);
  const auto out = unet.forward(input), expected = toy->forward(input);
  at::autocast::set_autocast_enabled(torch::kCUDA, false);
  at::autocast::clear_cache();
  EXPECT_TRUE(out.equal(expected));
  EXPECT_EQ(unet.report().eager.at("autocast is on"), 1);
}

// LibTorch would run forked tasks on the streams of other threads, which no capture sees.
TEST_F(CudaGraph, HoldsWhatAFileForks) {
  auto module = test::make_torchscript_unet(
      {.body = "    future = fork(block(self.middle_block).attn1.forward, t, t)\n"
               "    t = t + torch.wait(future)\n"});
  module.to(device());
  const auto file = TorchScriptUNet::from_module(module);
  const CudaGraphUNet unet(file);
  for (const double factor : {1.0, 0.5, 2.0}) {
    UNetInput input{.x = fill({2, 4, 6, 5}, 0.7, 0.3, factor).to(device()),
                    .timesteps = torch::full({2}, 5.0, device()),
                    .context = torch::ones({2, 3, test::kContextWidth}, device())};
    EXPECT_TRUE(unet.forward(input).equal(file->forward(input))) << factor;
  }
  EXPECT_EQ(unet.report().replays, 3);
}

// Long and thin products are summed in a workspace of the library.
TEST_F(CudaGraph, StreamsShareNoWorkspace) {
  const auto weight = torch::randn({1 << 16, 16}, device()) * 0.01;
  const auto changed = std::make_shared<ChangedToy>(
      device(), [weight](const UNetInput& input, const torch::Tensor& out) {
        const auto wide = input.x.flatten(1).repeat({1, (1 << 16) / (4 * 16 * 24) + 1});
        return out + wide.narrow(1, 0, 1 << 16).matmul(weight).mean();
      });
  const CudaGraphUNet unet(changed);
  const std::vector<c10::cuda::CUDAStream> streams = {c10::cuda::getStreamFromPool(),
                                                      c10::cuda::getStreamFromPool()};
  std::vector<UNetInput> inputs(2, toy_input(2, device()));
  inputs[1].x = inputs[1].x * -3;
  std::vector<torch::Tensor> expected, got;
  for (const auto& input : inputs) expected.push_back(changed->forward(input));
  torch::cuda::synchronize();
  for (int repeat = 0; repeat < 100; ++repeat) {
    for (std::size_t i = 0; i < 2; ++i) {
      const c10::cuda::CUDAStreamGuard guard(streams[i]);
      got.push_back(unet.forward(inputs[i]));
    }
  }
  torch::cuda::synchronize();
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i].equal(expected[i % 2])) << i;
  EXPECT_EQ(unet.report().captures, 2);
}

TEST_F(CudaGraph, OutlivesTheInferenceModeItWasCapturedIn) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const CudaGraphUNet unet(toy);
  const auto input = toy_input(2, device());
  {
    const c10::InferenceMode inference;
    unet.forward(input);
  }
  EXPECT_TRUE(unet.forward(input).equal(toy->forward(input)));
  EXPECT_FALSE(unet.forward(input).is_inference());
}

TEST_F(CudaGraph, InsideAnotherIsEager) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const auto inner = std::make_shared<CudaGraphUNet>(toy);
  const CudaGraphUNet outer(inner);
  const auto input = toy_input(2, device());
  EXPECT_TRUE(outer.forward(input).equal(toy->forward(input)));
  EXPECT_GT(inner->report().eager.at("another capture is under way"), 0);
  EXPECT_EQ(outer.report().replays, 1);
}

TEST_F(CudaGraph, ServesGuidersOnThreadsAndStreamsOfTheirOwn) {
  const auto toy = std::make_shared<ToyUNet>(device());
  const std::vector<std::int64_t> widths = {24, 32, 24, 40};
  std::vector<torch::Tensor> expected, got(widths.size());
  for (const auto width : widths) expected.push_back(sample_toy(toy, width));
  const auto unet = std::make_shared<CudaGraphUNet>(toy);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < widths.size(); ++i) {
    threads.emplace_back([&, i] {
      const auto stream = c10::cuda::getStreamFromPool();
      const c10::cuda::CUDAStreamGuard guard(stream);
      for (int repeat = 0; repeat < 3; ++repeat) got[i] = sample_toy(unet, widths[i]);
      stream.synchronize();
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < widths.size(); ++i) EXPECT_TRUE(got[i].equal(expected[i])) << i;
  EXPECT_EQ(unet->report().failure, "");
}

std::int64_t allocated() {
  return c10::cuda::CUDACachingAllocator::getDeviceStats(0).allocated_bytes[0].current;
}

TEST_F(CudaGraph, NothingStaysAllocatedAfterSamplingButTheGraphs) {
  const auto toy = std::make_shared<ToyUNet>(device());
  sample_toy(toy);
  // Libraries keep workspaces after their first use.
  const auto before = allocated();
  sample_toy(toy);
  sample_toy(toy, 24, {.one_pass = true});
  EXPECT_EQ(allocated(), before);
  const auto unet = std::make_shared<CudaGraphUNet>(toy);
  sample_toy(unet);
  unet->release();
  const auto after_graphs = allocated();
  sample_toy(unet);
  EXPECT_EQ(unet->report().captures, 4);
  unet->release();
  EXPECT_EQ(allocated(), after_graphs);
}

// In no step may the host wait for the device: it would lose its lead.
TEST_F(CudaGraph, NoStepWaitsForTheDevice) {
  const std::shared_ptr<const UNet> file =
      TorchScriptUNet::load(test::kGoldenDir + "comfy_sd15_tiny.ts", {.device = device()});
  const std::vector<std::shared_ptr<const UNet>> unets = {file,
                                                          std::make_shared<CudaGraphUNet>(file)};
  const std::vector<double> sigmas = {10, 4, 1.5, 0.5, 0};
  const auto prompt = [](double phase) {
    return Conditioning{.context = fill({1, 10, 32}, 0.3, phase, 1.0)};
  };
  for (const auto& unet : unets) {
    for (const bool one_pass : {false, true}) {
      const auto model =
          apply_self_attention_guidance({unet, ModelSampling::discrete()}, {.one_pass = one_pass});
      for (const auto name : {"euler", "dpmpp_2m_sde", "uni_pc"}) {
        const auto x = fill({2, 4, 24, 17}, 0.7, 0.3, 15.0).to(device());
        const auto run = [&](CfgGuider& guider) {
          guider.begin_run(sigmas);
          return get_sampler(name)(std::ref(guider), x, sigmas, {});
        };
        const CfgGuiderOptions options{.cond_scale = 5.0};
        CfgGuider first(model, {prompt(0.1)}, {prompt(0.7)}, options);
        // Captures wait.
        run(first);
        CfgGuider guider(model, {prompt(0.1)}, {prompt(0.7)}, options);
        c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
        EXPECT_THROW(x.sum().item<float>(), c10::Error) << "the mode is in force";
        EXPECT_NO_THROW(run(guider)) << name << " " << one_pass;
        c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
      }
    }
  }
}

TEST_F(CudaGraph, ReleaseGivesTheMemoryBack) {
  const auto toy = std::make_shared<ToyUNet>(device());
  CudaGraphUNet unet(toy);
  unet.forward(toy_input(1, device()));
  unet.release();
  // Libraries keep workspaces after their first use.
  const auto before = allocated();
  unet.forward(toy_input(2, device()));
  unet.forward(toy_input(3, device()));
  EXPECT_EQ(unet.report().failure, "");
  EXPECT_EQ(unet.report().graphs, 2);
  EXPECT_GT(allocated(), before);
  unet.release();
  EXPECT_EQ(unet.report().graphs, 0);
  EXPECT_EQ(allocated(), before);
}

#endif

}  // namespace
}  // namespace sag

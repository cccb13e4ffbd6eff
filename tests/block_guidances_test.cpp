// Hooks on transformer blocks, and the guidances that need them: SLG and TPG.

#include <cmath>
#include <memory>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/attention_scope.h"
#include "sag/cfg_guider.h"
#include "sag/cuda_graph_unet.h"
#include "sag/skip_layer_guidance.h"
#include "sag/token_perturbation_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/device.h"
#include "support/error.h"
#include "support/files.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::error_of;
using test::max_diff;
using test::toy_prompt;
using testing::HasSubstr;

constexpr double kSigma = 4;

// Three blocks over tokens of 4 × 4 cells, t + attention(t) + tanh(t), in any order of the tokens.
// `skipped` return what they are given; `shuffles` give the order of what each is given.
class BlockUNet final : public UNet {
 public:
  explicit BlockUNet(torch::Device device = torch::kCPU, torch::ScalarType dtype = torch::kFloat)
      : device_(device), dtype_(dtype) {}

  torch::Tensor forward(const UNetInput& input) const override {
    const auto pooled = torch::avg_pool2d(input.x, 4, {}, 0, true);
    auto tokens = pooled.flatten(2).transpose(1, 2);
    for (std::int64_t i = 0; i < 3; ++i) {
      const auto name = "blocks." + std::to_string(i);
      const auto block = [&](const torch::Tensor& t) { return after(t, i, name); };
      if (!skipped.contains(i)) tokens = transformer_block(tokens, block, name);
    }
    const auto picture = tokens.transpose(1, 2).reshape(pooled.sizes());
    const auto up = picture.repeat_interleave(4, 2).repeat_interleave(4, 3);
    return 0.5 * input.x + 0.3 * up.narrow(2, 0, input.x.size(2)).narrow(3, 0, input.x.size(3)) +
           0.1 * input.context.mean({1, 2}).view({-1, 1, 1, 1});
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    return {{.name = "blocks.0"}, {.name = "blocks.1"}, {.name = "blocks.2"}};
  }
  std::vector<AttentionSiteInfo> block_sites() const override {
    return {{.name = "middle.0.0", .path = "blocks.0"},
            {.name = "blocks.1", .path = "blocks.1"},
            {.name = "blocks.2", .path = "blocks.2"},
            {.name = "never", .path = "never"}};
  }
  torch::Device device() const override { return device_; }
  torch::ScalarType dtype() const override { return dtype_; }

  std::set<std::int64_t> skipped;

 private:
  static torch::Tensor after(const torch::Tensor& t, std::int64_t i, const std::string& name) {
    const auto q = test::split_heads(static_cast<double>(i + 1) * t, 2),
               v = test::split_heads(t, 2);
    const auto out = attention(q, q, v, {.site = name}).transpose(1, 2).flatten(2);
    return t + 0.5 * out + 0.2 * torch::tanh(3 * t);
  }

  torch::Device device_;
  torch::ScalarType dtype_;
};

torch::Tensor latent(torch::Device device = torch::kCPU) {
  return test::fill({2, 4, 12, 19}, .262, .3, 6).to(device);
}

class BlockGuidancesOn : public test::BackendTest {
 protected:
  ModelPatcher without(std::set<std::int64_t> blocks) const {
    const auto unet = std::make_shared<BlockUNet>(device(), torch::kDouble);
    unet->skipped = std::move(blocks);
    return {unet, ModelSampling::discrete()};
  }
  torch::Tensor run(const ModelPatcher& model, double cond_scale = 1) const {
    return CfgGuider(model, {toy_prompt(1, device())}, {toy_prompt(-1, device())},
                     {.cond_scale = cond_scale})(latent(device()), kSigma);
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, BlockGuidancesOn, test::backends());

TEST_P(BlockGuidancesOn, SlgIsItsFormula) {
  const auto model = without({});
  for (const double cond_scale : {1.0, 5.0}) {
    const auto expected = run(model, cond_scale) + 3 * (run(model) - run(without({0, 2})));
    const auto guided =
        apply_skip_layer_guidance(model, {.blocks = {"middle", "blocks.2"}, .window = {}});
    EXPECT_LT(max_diff(run(guided, cond_scale), expected), 1e-9);
    EXPECT_GT(max_diff(run(guided, cond_scale), run(model, cond_scale)), 0.1);
  }
}

TEST_P(BlockGuidancesOn, TpgIsItsFormula) {
  const auto model = without({});
  const auto guided =
      apply_token_perturbation_guidance(model, {.scale = 2, .blocks = {"middle", "blocks.1"}});
  // The order that each block drew, from what a hook inside of TPG's returns and one outside gets.
  auto watched = model.clone();
  std::vector<torch::Tensor> before(2), shuffled(2);
  const auto at = [&](std::size_t i, std::vector<torch::Tensor>& seen) {
    return [&seen, i](const AttentionCall& call, const Pass&, const NextAttention& next) {
      seen[i] = next(call);
      return seen[i];
    };
  };
  watched.set_block_replace(at(0, shuffled), "middle")
      .set_block_replace(at(1, shuffled), "blocks.1");
  watched =
      apply_token_perturbation_guidance(watched, {.scale = 2, .blocks = {"middle", "blocks.1"}});
  watched.set_block_replace(at(0, before), "middle").set_block_replace(at(1, before), "blocks.1");
  const auto got = run(watched);
  EXPECT_EQ(max_diff(got, run(guided)), 0);
  // Rows 0 and 1 are conditional, 2 and 3 those of TPG.
  auto given = model.clone();
  for (std::size_t i = 0; i < 2; ++i) {
    const auto from = before[i].narrow(0, 2, 2), to = shuffled[i].narrow(0, 2, 2);
    EXPECT_TRUE(torch::equal(before[i].narrow(0, 0, 2), shuffled[i].narrow(0, 0, 2)));
    const auto same = (to.unsqueeze(2) == from.unsqueeze(1)).all(3);
    const auto order = same[0].to(torch::kLong).argmax(1);
    EXPECT_EQ(std::get<0>(order.sort())
                  .eq(torch::arange(order.size(0), order.options()))
                  .all()
                  .item<bool>(),
              true);
    EXPECT_TRUE(torch::equal(from.index_select(1, order), to));
    EXPECT_FALSE(torch::equal(from, to));
    // The paper's form: the block gets the tokens in this order.
    given.set_attn1_replace(
        [order](const AttentionCall& call, const Pass&, const NextAttention& next) {
          auto changed = call;
          for (auto* t : {&changed.q, &changed.k, &changed.v}) *t = t->index_select(2, order);
          return next(changed).index_select(2, order.argsort());
        },
        "blocks." + std::to_string(i));
    given.set_block_replace([order](const AttentionCall& call, const Pass&,
                                    const NextAttention&) { return call.v.index_select(1, order); },
                            "blocks." + std::to_string(i));
  }
  EXPECT_LT(max_diff(got, run(model) + 2 * (run(model) - run(given))), 1e-9);
}

TEST_P(BlockGuidancesOn, TpgDrawsNewOrdersThatRepeat) {
  const auto model = without({});
  const auto at = [&](std::uint64_t seed, double sigma) {
    const auto guided = apply_token_perturbation_guidance(model, {.seed = seed});
    return CfgGuider(guided, {toy_prompt(1, device())}, {})(latent(device()), sigma) -
           CfgGuider(model, {toy_prompt(1, device())}, {})(latent(device()), sigma);
  };
  EXPECT_EQ(max_diff(at(1, 4), at(1, 4)), 0);
  EXPECT_GT(max_diff(at(1, 4), at(2, 4)), 1e-3);
  EXPECT_GT(max_diff(at(1, 4), at(1, 4.0001)), 1e-3);
}

TEST(BlockGuidances, ShareTheMainCall) {
  const ModelPatcher model(std::make_shared<BlockUNet>(), ModelSampling::discrete());
  const auto both =
      apply_token_perturbation_guidance(apply_skip_layer_guidance(model, {.window = {}}));
  CfgGuider guider(both, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 3});
  guider(latent(), kSigma);
  EXPECT_EQ(guider.report().unet_calls(), 1);
  EXPECT_EQ(guider.report().unet_rows(), 8);
  // Without a prompt: the unconditional prediction, in calls of their own.
  CfgGuider unconditional(both, {}, {toy_prompt(-1)});
  unconditional(latent(), kSigma);
  EXPECT_EQ(unconditional.report().unet_rows(), 6);
  EXPECT_EQ(unconditional.report().guided(), 1);
}

TEST(BlockGuidances, SayWhyTheyDoNothing) {
  const ModelPatcher model(std::make_shared<BlockUNet>(), ModelSampling::discrete());
  const auto plain = CfgGuider(model, {toy_prompt(1)}, {})(latent(), kSigma);
  for (const auto& [patched, reason] :
       {std::pair(apply_skip_layer_guidance(model, {.blocks = {"never"}, .window = {}}),
                  "the site did not run"),
        std::pair(apply_skip_layer_guidance(model, {.scale = 0, .window = {}}), "scale is 0"),
        std::pair(apply_token_perturbation_guidance(model, {.window = {.sigma_end = 5}}),
                  "sigma is outside the window")}) {
    CfgGuider guider(patched, {toy_prompt(1)}, {});
    EXPECT_LT(max_diff(guider(latent(), kSigma), plain), 1e-6);
    ASSERT_EQ(guider.report().skipped().size(), 1);
    EXPECT_THAT(guider.report().skipped().begin()->first, HasSubstr(reason));
  }
}

TEST(BlockGuidances, RefuseBlocksThatAreNotThere) {
  const ModelPatcher model(std::make_shared<BlockUNet>(), ModelSampling::discrete());
  EXPECT_THAT(error_of<c10::ValueError>(
                  [&] { apply_skip_layer_guidance(model, {.blocks = {"blocks.9"}}); }),
              HasSubstr("Its transformer blocks are middle.0.0 (blocks.0), blocks.1"));
  const ModelPatcher toy(std::make_shared<test::ToyUNet>(), ModelSampling::discrete());
  EXPECT_THAT(error_of<c10::ValueError>([&] { apply_token_perturbation_guidance(toy); }),
              HasSubstr("must list its transformer blocks, got none"));
  EXPECT_THROW(apply_skip_layer_guidance(model, {.scale = NAN}), c10::ValueError);
  EXPECT_THROW(apply_skip_layer_guidance(model, {.blocks = {}}), c10::ValueError);
  EXPECT_THAT(error_of<c10::ValueError>([&] {
                apply_skip_layer_guidance(model, {.blocks = {"middle", "blocks.0"}});
              }),
              HasSubstr("each site must be named once"));
}

TEST(Blocks, AreNoAttentionsOfTheSameName) {
  const ModelPatcher model(std::make_shared<BlockUNet>(), ModelSampling::discrete());
  auto hooked = model.clone();
  std::int64_t runs = 0;
  hooked.set_block_replace(
      [&runs](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
        ++runs;
        EXPECT_EQ(call.q.dim(), 3);
        EXPECT_FALSE(call.k.defined());
        EXPECT_EQ(pass.size(), call.q.size(0));
        return next(call);
      },
      "blocks.1");
  EXPECT_EQ(max_diff(CfgGuider(hooked, {toy_prompt(1)}, {})(latent(), kSigma),
                     CfgGuider(model, {toy_prompt(1)}, {})(latent(), kSigma)),
            0);
  EXPECT_EQ(runs, 1);
}

// A block of a file is found by its name, and what it is given by its residual additions.
TEST(Blocks, AreFoundInFiles) {
  for (const auto* file : {"comfy_sd15_tiny.ts", "comfy_sdxl_tiny.ts", "diffusers_tiny.ts"}) {
    const auto unet = TorchScriptUNet::load(test::kGoldenDir + file);
    const auto blocks = unet->block_sites(), attentions = unet->attention_sites();
    ASSERT_EQ(blocks.size(), attentions.size()) << file;
    for (std::size_t i = 0; i < blocks.size(); ++i)
      EXPECT_EQ(blocks[i].path + ".attn1", attentions[i].path);
  }
}

// Of two blocks, one after the other, the second is given what the first returned.
TEST(Blocks, OfFilesAreGivenWhatTheBlockBeforeReturned) {
  const auto unet = TorchScriptUNet::load(test::kGoldenDir + "comfy_sdxl_tiny.ts");
  std::vector<torch::Tensor> given, returned;
  auto hooked = ModelPatcher(unet, ModelSampling::discrete());
  for (const auto* name : {"middle.0.0", "middle.0.1"})
    hooked.set_block_replace(
        [&](const AttentionCall& call, const Pass&, const NextAttention& next) {
          given.push_back(call.q.clone());
          returned.push_back(call.v.clone());
          return next(call);
        },
        name);
  const Conditioning prompt{.context = test::fill({1, 77, 32}, 2.1, 1, 1),
                            .y = test::fill({1, 48}, 1.3, 2, 1)};
  CfgGuider(hooked, {prompt}, {})(test::fill({1, 4, 8, 16}, .262, .3, 6), kSigma);
  ASSERT_EQ(given.size(), 2u);
  EXPECT_TRUE(torch::equal(given[1], returned[0]));
  EXPECT_FALSE(torch::equal(given[0], returned[0]));
}

// A module with one block, whose parts are given as TorchScript.
torch::jit::Module file_with_block(const std::string& block) {
  torch::jit::Module part("Block");
  part.register_parameter("w", test::fill({4, 4}, 1.7, .3, 1), false);
  part.define(R"(
def attend(self, x):
    q = torch.matmul(x, self.w).unsqueeze(1)
    out = torch.scaled_dot_product_attention(q, torch.matmul(x, self.w).unsqueeze(1), q)
    return out.squeeze(1)
)" + block);
  torch::jit::Module list("List");
  list.register_module("0", part);
  torch::jit::Module unet("UNet");
  unet.register_module("transformer_blocks", list);
  unet.define(R"(
def forward(self, x, timesteps):
    t = x.flatten(2).transpose(1, 2).clone()
    t = getattr(self.transformer_blocks, "0").forward(t)
    return t.transpose(1, 2).reshape(x.shape)
)");
  unet.eval();
  return unet;
}

// What a block of a file is given is known before the block writes into it, and a part of the block
// that adds to its own input is not the block.
TEST(Blocks, OfFilesAreKnownByTheirSums) {
  const auto x = test::fill({1, 4, 6, 5}, .262, .3, 6);
  const UNetInput input{.x = x, .timesteps = torch::ones({1})};
  const auto skipped = [&](const std::string& block) {
    const auto unet = TorchScriptUNet::from_module(file_with_block(block));
    EXPECT_EQ(unet->block_sites().size(), 1u) << block;
    auto skips = ModelPatcher(unet, ModelSampling::discrete());
    skips.set_block_replace(
        [](const AttentionCall& call, const Pass&, const NextAttention&) { return call.q; },
        unet->block_sites().at(0).path);
    StepContext step(1, 0, 6, 5);
    EXPECT_GT(max_diff(unet->forward(input), x), 1e-3);
    return run_hooked(skips.attention_hooks(), {.groups = {{.count = 1}}, .step = &step},
                      [&] { return unet->forward(input); });
  };
  for (const auto* block :
       {"def forward(self, x):\n    return x + self.attend(x)\n",
        "def forward(self, x):\n    x += self.attend(x)\n    x += self.attend(x)\n    return x\n",
        "def forward(self, x):\n    v = x.view(x.shape)\n    v.add_(self.attend(v))\n"
        "    return x + self.attend(x)\n",
        "def first(self, x):\n    return x + self.attend(x)\n"
        "def forward(self, x):\n    h = self.first(x)\n    return h + 2.0 * self.attend(h)\n"})
    EXPECT_EQ(max_diff(skipped(block), x), 0) << block;
  const auto unknown = file_with_block("def forward(self, x):\n    return 2.0 * self.attend(x)\n");
  EXPECT_TRUE(TorchScriptUNet::from_module(unknown)->block_sites().empty());
}

TEST(Blocks, OfWindowsAreNotGuided) {
  class WindowedUNet final : public UNet {
   public:
    torch::Tensor forward(const UNetInput& input) const override {
      const auto windows = input.x.flatten(2).transpose(1, 2).reshape({-1, 8, 4});
      const auto out = transformer_block(
          windows, [](const torch::Tensor& t) { return t + torch::tanh(t); }, "blocks.0");
      return out.reshape({input.x.size(0), -1, 4}).transpose(1, 2).reshape_as(input.x);
    }
    std::vector<AttentionSiteInfo> attention_sites() const override { return {}; }
    std::vector<AttentionSiteInfo> block_sites() const override {
      return {{.name = "middle.0.0", .path = "blocks.0"}};
    }
    torch::Device device() const override { return torch::kCPU; }
    torch::ScalarType dtype() const override { return torch::kFloat; }
  };
  const ModelPatcher model(std::make_shared<WindowedUNet>(), ModelSampling::discrete());
  const auto x = test::fill({2, 4, 8, 4}, .262, .3, 6);
  const auto plain = CfgGuider(model, {toy_prompt(1)}, {})(x, kSigma);
  for (const auto& patched : {apply_skip_layer_guidance(model, {.window = {}}),
                              apply_token_perturbation_guidance(model)}) {
    CfgGuider guider(patched, {toy_prompt(1)}, {});
    EXPECT_EQ(max_diff(guider(x, kSigma), plain), 0);
    EXPECT_EQ(guider.report().skipped().begin()->first,
              "the block does not return tokens of each row, as it is given");
  }
}

TEST(Blocks, OfFilesCanBeSkipped) {
  const auto unet = TorchScriptUNet::load(test::kGoldenDir + "comfy_sd15_tiny.ts");
  const ModelPatcher model(unet, ModelSampling::discrete());
  const Conditioning prompt{.context = test::fill({1, 77, 32}, 2.1, 1, 1)};
  const auto x = test::fill({1, 4, 8, 16}, .262, .3, 6);
  const auto plain = CfgGuider(model, {prompt}, {})(x, kSigma);
  auto by_hand = model.clone();
  by_hand.set_block_replace(
      [](const AttentionCall& call, const Pass&, const NextAttention&) { return call.q; },
      "middle");
  const auto skipped = CfgGuider(by_hand, {prompt}, {})(x, kSigma);
  EXPECT_GT(max_diff(skipped, plain), 1e-4);
  CfgGuider guider(apply_skip_layer_guidance(model, {.scale = 2, .window = {}}), {prompt}, {});
  EXPECT_LT(max_diff(guider(x, kSigma), plain + 2 * (plain - skipped)), 1e-4);
  EXPECT_EQ(guider.report().guided(), 1);
}

TEST(BlockGuidancesCuda, SlgIsTheSameInAGraph) {
  SAG_SKIP_WITHOUT_CUDA(torch::Device("cuda"));
  const torch::Device device("cuda");
  const auto unet =
      TorchScriptUNet::load(test::kGoldenDir + "comfy_sd15_tiny.ts", {.device = device});
  const auto graphs = std::make_shared<CudaGraphUNet>(unet);
  const Conditioning prompt{.context = test::fill({1, 77, 32}, 2.1, 1, 1).to(device)};
  const auto x = test::fill({1, 4, 8, 16}, .262, .3, 6).to(device);
  const auto run = [&](const std::shared_ptr<const UNet>& network) {
    CfgGuider guider(
        apply_skip_layer_guidance({network, ModelSampling::discrete()}, {.window = {}}), {prompt},
        {});
    guider(x, kSigma);
    const auto second = guider(0.5 * x, kSigma);
    EXPECT_EQ(guider.report().guided(), 2);
    return second;
  };
  EXPECT_LT(max_diff(run(graphs), run(unet)), 1e-5);
  EXPECT_GE(graphs->report().replays, 1);
}

}  // namespace
}  // namespace sag

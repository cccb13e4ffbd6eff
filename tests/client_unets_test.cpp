// The UNets of client_unets.h do what their users need.
#include "support/client_unets.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/torch.h>

#include "sag/attention_hook.h"
#include "sag/blur.h"
#include "sag/cfg_guider.h"
#include "sag/model_patcher.h"
#include "sag/sample.h"
#include "sag/samplers.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"

namespace sag {
namespace {

using ::testing::ElementsAre;

std::vector<std::string> names(const UNet& unet) {
  std::vector<std::string> names;
  for (const auto& site : unet.attention_sites()) names.push_back(site.name);
  return names;
}

std::vector<std::int64_t> tokens(const UNet& unet, const UNetInput& input) {
  std::vector<std::int64_t> tokens;
  for (const auto& shape : probe_attention_sites(unet, input)) tokens.push_back(shape.tokens);
  return tokens;
}

struct Run {
  torch::Tensor latent;
  std::int64_t guided = 0;
  // Shapes of q at the site.
  std::vector<std::vector<std::int64_t>> seen;
};

// A guided run, with a hook of its own at the same site.
Run run(ModelPatcher model, const Conditioning& prompt, const std::string& site,
        const torch::Tensor& x, const std::vector<double>& sigmas, double scale) {
  Run run;
  model.set_attn1_replace(
      [&run](const AttentionCall& call, const Pass&, const NextAttention& next) {
        run.seen.push_back(call.q.sizes().vec());
        return next(call);
      },
      AttentionSite(site));
  const auto guided =
      apply_self_attention_guidance(model, {.scale = scale, .site = AttentionSite(site)});
  CfgGuider guider(guided, {prompt}, {prompt}, {.cond_scale = 1.0});
  run.latent = sample_euler(std::ref(guider), x, sigmas);
  run.guided = guider.report().guided();
  return run;
}

void expect_guided_at(const ModelPatcher& model, const Conditioning& prompt,
                      const std::string& site, const torch::Tensor& x,
                      const std::vector<double>& sigmas, std::vector<std::int64_t> q_of_a_row) {
  const auto guided = run(model, prompt, site, x, sigmas, 1.0);
  EXPECT_EQ(guided.guided, 3);
  ASSERT_FALSE(guided.seen.empty());
  auto q = guided.seen.front();
  EXPECT_GE(q.front(), 1);
  q.front() = 1;
  EXPECT_EQ(q, q_of_a_row);
  const auto plain = run(model, prompt, site, x, sigmas, 0.0);
  EXPECT_TRUE(guided.latent.isfinite().all().item<bool>());
  EXPECT_GT((guided.latent - plain.latent).abs().max().item<double>(), 1e-4);
}

TEST(FlowUNet, ListsItsSelfAttentionsByTheirPaths) {
  const auto unet = TorchScriptUNet::from_module(test::make_flow_unet());
  EXPECT_THAT(names(*unet), ElementsAre("model.down.4.1", "model.mid.1", "model.up.3.1"));
  EXPECT_THAT(unet->argument_names(), ElementsAre("x", "timestep", "context", "context_mask"));
  EXPECT_THAT(tokens(*unet, test::flow_input()), ElementsAre(24, 6, 24));
}

TEST(FlowUNet, HidesTheTokensThatItsMaskHides) {
  const auto unet = TorchScriptUNet::from_module(test::make_flow_unet());
  auto input = test::flow_input();
  const auto out = unet->forward(input);
  EXPECT_EQ(out.sizes(), input.x.sizes());
  input.context.select(1, 3).mul_(-5);
  EXPECT_TRUE(torch::equal(unet->forward(input), out));
  input.extra["context_mask"] = torch::ones({2, 4}, torch::kBool);
  EXPECT_GT((unet->forward(input) - out).abs().max().item<double>(), 1e-3);
}

TEST(FlowUNet, IsGuidedAtASiteThatIsNamed) {
  const ModelPatcher model(TorchScriptUNet::from_module(test::make_flow_unet()),
                           ModelSampling::flow({.multiplier = 1}));
  const auto input = test::flow_input(1);
  const Conditioning prompt{.context = input.context, .extra = input.extra};
  expect_guided_at(model, prompt, "model.mid.1", input.x, {0.9, 0.6, 0.3, 0}, {1, 2, 6, 4});
}

// A class token before the picture's tokens, a text of any length behind them.
TEST(Transformer, IsGuidedByWhatThePicturesTokensGiveToEachOther) {
  const ModelPatcher model(TorchScriptUNet::from_module(test::make_transformer()),
                           ModelSampling::discrete());
  torch::manual_seed(7);
  const auto x = 4 * torch::randn({2, 4, 8, 12});
  for (const std::int64_t words : {3, 7}) {
    const Conditioning prompt{.context = torch::randn({1, words, test::kTransformerTextWidth})};
    const Conditioning negative{.context = torch::randn({1, words, test::kTransformerTextWidth})};
    auto guided = apply_self_attention_guidance(
        model, {.site = "blocks.1",
                .tokens = {.before = 1, .after = PictureTokens::kRest, .reduction = 2}});
    torch::Tensor expected;
    guided.set_attn1_replace(
        [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
          for (const auto& rows : pass.rows(Branch::uncond)) {
            const auto q = pass.select(rows, call.q).to(torch::kDouble),
                       k = pass.select(rows, call.k).to(torch::kDouble);
            // 2 heads of 4.
            const auto p = (q.matmul(k.transpose(2, 3)) / 2).softmax(-1);
            const auto map = p.narrow(2, 1, 24).narrow(3, 1, 24).sum(2).mean(1);
            expected = upsample_attention_map(map / map.mean(1, true), 8, 12) > 1;
          }
          return next(call);
        },
        "blocks.1");
    CfgGuider guider(guided, {prompt}, {negative}, {.cond_scale = 3});
    EXPECT_TRUE(guider(x, 4).isfinite().all().item<bool>());
    ASSERT_EQ(guider.report().guided(), 1) << guider.report().skipped().begin()->first;
    EXPECT_TRUE(guider.report().evaluations.front().guidances.front().mask.equal(expected));

    CfgGuider plain(apply_self_attention_guidance(model, {.site = "blocks.1"}), {prompt},
                    {negative}, {.cond_scale = 3});
    plain(x, 4);
    EXPECT_EQ(plain.report().guided(), 0);
  }
}

TEST(PictureUNet, ListsItsSites) {
  const auto unet = test::make_picture_unet();
  EXPECT_THAT(names(*unet), ElementsAre("down", "mid_attn", "up"));
  const UNetInput input{.x = torch::ones({2, 1, 8, 12}), .timesteps = torch::ones({2})};
  EXPECT_EQ(unet->forward(input).sizes(), input.x.sizes());
  EXPECT_THAT(tokens(*unet, input), ElementsAre(24, 6, 24));
}

TEST(PictureUNet, IsGuidedAtASiteThatIsNamed) {
  const ModelPatcher model(test::make_picture_unet(), ModelSampling::discrete());
  torch::manual_seed(4);
  const auto x = 8 * torch::randn({1, 1, 8, 12});
  expect_guided_at(model, {}, "mid_attn", x, {8, 3, 1, 0}, {1, 1, 6, 8});
}

// A run as the README has it, without a word about sites.
GuiderReport sampled(const std::shared_ptr<const UNet>& unet, const ModelSampling& sampling,
                     const Conditioning& prompt, const torch::Tensor& noise) {
  const auto model = apply_self_attention_guidance({unet, sampling}, {.scale = 0.75});
  CfgGuider guider(model, {prompt}, {prompt}, {.cond_scale = 5.0});
  const auto latent = sample(guider, noise, {.steps = 3});
  EXPECT_TRUE(latent.isfinite().all().item<bool>());
  return guider.report();
}

TEST(FlowUNet, IsSampledWithoutNamingASite) {
  const auto input = test::flow_input(1);
  const Conditioning prompt{.context = input.context, .extra = input.extra};
  const auto sampling = ModelSampling::flow({.multiplier = 1});
  const auto module = test::make_flow_unet();
  const auto named = sampled(TorchScriptUNet::from_module(module), sampling, prompt, input.x);
  EXPECT_EQ(named.guided(), 3);
  EXPECT_EQ(named.sites.front().site, "model.mid.1");
  EXPECT_EQ(named.sites.front().reason, "mid is a part of its path");

  // A frozen file has no names left.
  auto trained = module.clone();
  trained.eval();
  const auto frozen = TorchScriptUNet::from_module(torch::jit::freeze(trained));
  const auto probed = sampled(frozen, sampling, prompt, input.x);
  EXPECT_EQ(probed.guided(), 3);
  EXPECT_THAT(probed.sites.front().reason, ::testing::HasSubstr("fewest tokens, 6,"));
}

TEST(PictureUNet, IsSampledWithoutNamingASite) {
  torch::manual_seed(4);
  const auto noise = torch::randn({1, 1, 8, 12});
  const auto report = sampled(test::make_picture_unet(), ModelSampling::discrete(), {}, noise);
  EXPECT_EQ(report.guided(), 3);
  EXPECT_EQ(report.sites.front().site, "mid_attn");
}

}  // namespace
}  // namespace sag

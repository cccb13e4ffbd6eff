#include "shuffle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/attention_scope.h"
#include "sag/cfg_guider.h"
#include "support/toy_unet.h"

namespace sag_sample {
namespace {

using sag::test::ToyUNet;

TEST(Shuffle, DrawsANewOrderForEveryStepAndImage) {
  const sag::AttentionSite site("middle", 0);
  torch::Tensor before;
  std::vector<std::vector<std::int64_t>> orders;
  sag::ModelPatcher model(std::make_shared<ToyUNet>(), sag::ModelSampling::discrete());
  model.set_attn1_replace(
      [&](const sag::AttentionCall& call, const sag::Pass&, const sag::NextAttention& next) {
        before = call.q;
        return next(call);
      },
      site);
  auto shuffled = shuffle_tokens(model, site);
  shuffled.set_attn1_replace(
      [&](const sag::AttentionCall& call, const sag::Pass&, const sag::NextAttention& next) {
        for (std::int64_t row = 0; row < call.q.size(0); ++row) {
          const auto order = torch::cdist(call.q[row][0], before[row][0]).argmin(1);
          const auto* first = order.const_data_ptr<std::int64_t>();
          orders.emplace_back(first, first + order.numel());
        }
        return next(call);
      },
      site);
  const std::vector<double> sigmas = {4, 2, 1, 0};
  sag::CfgGuider guider(shuffled, {sag::test::toy_prompt(1)}, {}, {.cond_scale = 1.0});
  guider.begin_run(sigmas);
  torch::manual_seed(0);
  const auto x = torch::randn({2, 4, 32, 32});
  for (int step = 0; step < 3; ++step) guider(x, sigmas[static_cast<std::size_t>(step)]);

  ASSERT_EQ(orders.size(), 6);  // of 16 tokens: twice the same by chance once in 10^13
  for (auto order : orders) {
    EXPECT_EQ(std::count(orders.begin(), orders.end(), order), 1);
    std::sort(order.begin(), order.end());
    for (std::size_t i = 0; i < order.size(); ++i) EXPECT_EQ(order[i], i) << "a token is lost";
  }
}

// Tokens 0 and 17 stay, and those between change places.
TEST(Shuffle, LeavesTokensBesideThePicturesWhereTheyAre) {
  using namespace sag;
  ModelPatcher model(std::make_shared<ToyUNet>(), ModelSampling::discrete());
  const auto q = torch::arange(18, torch::kFloat).reshape({1, 1, 18, 1});
  torch::Tensor seen;
  auto shuffled = shuffle_tokens(model, "middle", {.before = 1, .after = 1});
  shuffled.set_attn1_replace(
      [&](const AttentionCall& call, const Pass&, const NextAttention& next) {
        seen = call.k.flatten();
        return next(call);
      },
      "middle");
  StepContext step(4, 0, 16, 16);
  const Pass pass{.sigma = 4, .height = 16, .width = 16, .groups = {{.count = 1}}, .step = &step};
  const auto out = run_hooked(active_hooks(shuffled.attention_hooks(), step), pass,
                              [&] { return attention(q, q, q, {.site = "middle.0.0"}); });
  EXPECT_LT((out - attention(q, q, q)).abs().max().item<double>(), 1e-5);
  EXPECT_EQ(seen[0].item<double>(), 0);
  EXPECT_EQ(seen[17].item<double>(), 17);
  EXPECT_FALSE(seen.equal(q.flatten()));
  EXPECT_TRUE(std::get<0>(seen.sort()).equal(q.flatten()));
}

}  // namespace
}  // namespace sag_sample

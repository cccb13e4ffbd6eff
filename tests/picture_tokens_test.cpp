// SAG at an attention that has tokens beside the picture's, or not the picture's at all.
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/attention_scope.h"
#include "sag/cfg_guider.h"
#include "sag/sample.h"
#include "sag/self_attention_guidance.h"
#include "support/device.h"
#include "support/reference.h"
#include "support/token_unets.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::TokenLayout;
using test::TokenUNet;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using Reasons = std::map<std::string, std::int64_t>;

constexpr auto kRest = PictureTokens::kRest;

struct Result {
  torch::Tensor denoised;
  GuiderReport report;

  torch::Tensor mask() const { return report.evaluations.front().guidances.front().mask; }
};

Conditioning text(std::int64_t tokens, double value) {
  return {.context = torch::full({1, tokens, 4}, value, torch::kFloat)};
}

Result denoise(std::shared_ptr<const UNet> unet, const SelfAttentionGuidanceOptions& options,
               const torch::Tensor& x, std::vector<Conditioning> negatives = {text(6, -1)},
               std::int64_t max_rows = 0) {
  const auto device = unet->device();
  const auto model =
      apply_self_attention_guidance({std::move(unet), ModelSampling::discrete()}, options);
  CfgGuider guider(model, {text(6, 1)}, std::move(negatives),
                   {.cond_scale = 3, .max_rows = max_rows});
  const auto denoised = guider(x.to(device), 4);
  return {denoised, guider.report()};
}

torch::Tensor noise(std::int64_t images = 1, std::int64_t height = 16, std::int64_t width = 16) {
  return test::fill({images, 4, height, width}, .7, .3, 4);
}

// Where the network of token_unets.h looks: the left half of each picture.
torch::Tensor left_half(std::int64_t height = 16, std::int64_t width = 16) {
  return (torch::arange(width) < width / 2).expand({1, 1, height, width});
}

struct Layout {
  const char* name;
  TokenLayout unet;
  PictureTokens tokens;
};

class ExtraTokens : public testing::TestWithParam<std::tuple<const char*, Layout>> {
 protected:
  void SetUp() override { SAG_SKIP_WITHOUT_CUDA(device()); }
  torch::Device device() const { return torch::Device(std::get<0>(GetParam())); }
  const Layout& layout() const { return std::get<1>(GetParam()); }
  std::shared_ptr<TokenUNet> unet(torch::ScalarType dtype = torch::kFloat) const {
    return std::make_shared<TokenUNet>(layout().unet, device(), dtype);
  }
};

TEST_P(ExtraTokens, AreLeftOutOfTheMap) {
  for (const auto& [height, width] : {std::pair<std::int64_t, std::int64_t>{16, 16}, {8, 24}}) {
    const auto x = noise(2, height, width);
    const auto result =
        denoise(unet(), {.kernel_size = 3, .tokens = layout().tokens}, x, {text(6, -1)});
    ASSERT_TRUE(result.report.skipped().empty()) << result.report.skipped().begin()->first;
    EXPECT_TRUE(
        torch::equal(result.mask().cpu(), left_half(height, width).expand({2, 1, height, width})));
    EXPECT_TRUE(result.denoised.isfinite().all().item<bool>());
  }
}

// The same network without them has the same map, and so the same picture, as its other tokens do
// not change what it predicts.
TEST_P(ExtraTokens, MakeNoDifferenceWhereTheyDrawNoAttention) {
  auto silent = layout().unet;
  silent.share = 0;
  auto plain = silent;
  plain.before = plain.after = 0;
  plain.text = TokenLayout::Text::none;
  const auto x = noise();
  const auto with = denoise(std::make_shared<TokenUNet>(silent, device()),
                            {.kernel_size = 3, .tokens = layout().tokens}, x);
  const auto without = denoise(std::make_shared<TokenUNet>(plain, device()), {.kernel_size = 3}, x);
  EXPECT_LT(max_diff(with.denoised, without.denoised), 1e-5);
}

TEST_P(ExtraTokens, AreLeftOutWithSeveralNegativesAreasAndSplitBatches) {
  auto area = text(6, -1);
  area.area = Area{8, 8, 4, 4};
  const auto options = SelfAttentionGuidanceOptions{.kernel_size = 3, .tokens = layout().tokens};
  const auto x = noise(2);
  // A text of another length, too.
  const std::vector<Conditioning> negatives = {text(6, -1), text(9, 2), area};
  const auto whole = denoise(unet(), options, x, negatives);
  EXPECT_EQ(whole.report.guided(), 1) << whole.report.skipped().begin()->first;
  // Of an area, too, the left half.
  EXPECT_TRUE(whole.mask().cpu().equal(left_half().expand({2, -1, -1, -1})));

  const auto split = denoise(unet(), options, x, negatives, 1);
  EXPECT_TRUE(split.mask().equal(whole.mask()));
  EXPECT_LT(max_diff(split.denoised, whole.denoised), 1e-5);
}

TEST_P(ExtraTokens, AreLeftOutInOnePass) {
  const auto model = apply_self_attention_guidance({unet(), ModelSampling::discrete()},
                                                   {.one_pass = true, .tokens = layout().tokens});
  CfgGuider guider(model, {text(6, 1)}, {text(6, -1)}, {.cond_scale = 3});
  const auto latent = sample(guider, noise(), {.steps = 3});
  EXPECT_TRUE(latent.isfinite().all().item<bool>());
  EXPECT_EQ(guider.report().guided(), 3);
  for (const auto& evaluation : guider.report().evaluations)
    EXPECT_TRUE(evaluation.guidances.front().mask.cpu().equal(left_half()));
}

TEST_P(ExtraTokens, AreLeftOutOfProbabilities) {
  auto unfused = layout().unet;
  unfused.unfused = true;
  const auto result =
      denoise(std::make_shared<TokenUNet>(unfused, device()), {.tokens = layout().tokens}, noise());
  ASSERT_EQ(result.report.guided(), 1) << result.report.skipped().begin()->first;
  EXPECT_TRUE(result.mask().cpu().equal(left_half()));
}

// On CUDA the tensor core kernels, with fewer queries than keys and strided rows.
TEST_P(ExtraTokens, AreLeftOutInHalfPrecision) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    const auto result = denoise(unet(dtype), {.tokens = layout().tokens}, noise());
    ASSERT_EQ(result.report.guided(), 1) << result.report.skipped().begin()->first;
    EXPECT_TRUE(result.mask().cpu().equal(left_half()));
  }
}

TEST_P(ExtraTokens, AreAReasonWithoutTheOption) {
  const auto x = noise();
  const auto result = denoise(unet(), {}, x);
  EXPECT_EQ(result.report.guided(), 0);
  ASSERT_EQ(result.report.skipped().size(), 1u);
  EXPECT_THAT(result.report.skipped().begin()->first, HasSubstr("the option tokens says which"));
  EXPECT_TRUE(result.denoised.equal(denoise(unet(), {.scale = 0}, x).denoised));
}

INSTANTIATE_TEST_SUITE_P(
    Of, ExtraTokens,
    testing::Combine(
        test::backends(),
        testing::Values(
            Layout{"ClassToken", {.before = 1}, {.before = 1}},
            Layout{"Registers", {.after = 4}, {.after = 4}},
            Layout{"ClassTokenAndRegisters", {.before = 1, .after = 4}, {.before = 1, .after = 4}},
            Layout{
                "TextFirst", {.text = TokenLayout::Text::first}, {.before = kRest, .reduction = 2}},
            Layout{"TextLast", {.text = TokenLayout::Text::last}, {.after = kRest, .reduction = 2}},
            Layout{"ClassTokenAndTextLast",
                   {.before = 1, .text = TokenLayout::Text::last},
                   {.before = 1, .after = kRest, .reduction = 2}},
            // Keys only, as in the U-Nets of DeepFloyd IF and Kandinsky 2.
            Layout{"TextKeys",
                   {.text = TokenLayout::Text::first, .picture_queries_only = true},
                   {.before = kRest, .reduction = 2}})),
    [](const auto& info) {
      return std::string(std::get<1>(info.param).name) + "_" + std::get<0>(info.param);
    });

// The map by the definition: softmax over all keys, sums over the picture's queries, of the
// picture's keys, divided by their mean.
TEST(PictureMap, IsWhatThePicturesTokensGiveToEachOther) {
  torch::manual_seed(5);
  const auto q = torch::randn({2, 3, 5 + 64 + 7, 8}), k = 2 * torch::randn({2, 3, 5 + 64 + 7, 8});
  StepContext step(4, 0, 16, 16);
  const auto model =
      apply_self_attention_guidance({std::make_shared<test::ToyUNet>(), ModelSampling::discrete()},
                                    {.tokens = {.before = 5, .after = 7}});
  const Pass pass{.sigma = 4,
                  .height = 16,
                  .width = 16,
                  .groups = {{.count = 2, .branch = Branch::uncond}},
                  .step = &step};
  run_hooked(active_hooks(model.attention_hooks(), step), pass,
             [&] { return attention(q, k, k, {.site = "middle.0.0"}); });
  const auto records = step.records();
  ASSERT_EQ(records.size(), 1u);
  const auto scores =
      (q.to(torch::kDouble).matmul(k.to(torch::kDouble).transpose(2, 3)) / std::sqrt(8.0))
          .softmax(-1);
  auto expected = scores.narrow(2, 5, 64).narrow(3, 5, 64).sum(2).mean(1);
  expected = expected / expected.mean(1, true);
  const auto& map = records.front().second.map;
  EXPECT_LT(max_diff(map, expected), 1e-5);
  EXPECT_LT((map.mean(1) - 1).abs().max().item<double>(), 1e-6);
}

Reasons reasons(const TokenLayout& layout, const PictureTokens& tokens, std::int64_t side = 16) {
  return denoise(std::make_shared<TokenUNet>(layout), {.tokens = tokens}, noise(1, side, side))
      .report.skipped();
}

TEST(SagSkips, TokensThatAreNoGridAndNamesBothNumbers) {
  EXPECT_THAT(reasons({.before = 1}, {}),
              ElementsAre(Pair("the attention of the site has 65 tokens, no grid of the 16 x 16 "
                               "latent: the option tokens says which are the picture's",
                               1)));
  EXPECT_THAT(reasons({.before = 77}, {.before = 1}),
              ElementsAre(Pair("the attention of the site has 141 tokens, and what the option "
                               "tokens says of them is no grid of the 16 x 16 latent",
                               1)));
  EXPECT_THAT(reasons({}, {.reduction = 4}), ElementsAre(Pair(HasSubstr("64 tokens"), 1)));
  EXPECT_THAT(
      reasons({.text = TokenLayout::Text::first, .picture_queries_only = true}, {}),
      ElementsAre(Pair("the attention of the site is not self-attention: it has 64 queries and 70 "
                       "keys (if the picture's are among them, the option tokens says which)",
                       1)));
  EXPECT_TRUE(reasons({}, {}).empty());
  EXPECT_TRUE(reasons({}, {.reduction = 2}).empty());
}

// The rest of a text is not guessed where the patches do not divide the latent.
TEST(SagSkips, ATextOfUnknownLengthOnALatentThatPatchesDoNotDivide) {
  const TokenLayout layout{.text = TokenLayout::Text::first};
  EXPECT_TRUE(reasons(layout, {.before = kRest, .reduction = 2}, 18).empty());
  EXPECT_EQ(reasons(layout, {.before = kRest, .reduction = 2}, 17).size(), 1u);
}

// Attention over windows folded into rows, with heads apart.
TEST(SagSkips, WindowsFoldedIntoRows) {
  const auto result = denoise(std::make_shared<test::WindowUNet>(2), {}, noise());
  EXPECT_EQ(result.report.guided(), 0);
  EXPECT_THAT(result.report.skipped(), ElementsAre(Pair(HasSubstr("not known which rows"), 1)));
}

TEST(SagRefuses, TokensThatItCannotUnderstand) {
  const ModelPatcher model(std::make_shared<TokenUNet>(TokenLayout{}), ModelSampling::discrete());
  for (const PictureTokens& tokens :
       {PictureTokens{.before = -2}, PictureTokens{.after = kRest}, PictureTokens{.reduction = -1},
        PictureTokens{.before = kRest, .after = kRest, .reduction = 2}})
    EXPECT_THROW(apply_self_attention_guidance(model, {.tokens = tokens}), c10::ValueError);
}

}  // namespace
}  // namespace sag

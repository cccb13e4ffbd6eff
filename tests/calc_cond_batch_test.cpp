#include "sag/calc_cond_batch.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/device.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::max_diff;
using test::toy_prompt;

class CalcCondBatch : public test::BackendTest {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (IsSkipped()) return;
    unet = std::make_shared<test::ToyUNet>(device());
    model = std::make_unique<ModelPatcher>(unet, ModelSampling::discrete());
  }
  CondBatch run(const std::vector<CondRequest>& requests, std::int64_t max_rows = 0) {
    StepContext step(4, 0, requests.front().x.size(2), requests.front().x.size(3));
    return calc_cond_batch(*model, requests, 4, step, {.max_rows = max_rows});
  }
  torch::Tensor alone(const torch::Tensor& x, const Conditioning& cond) {
    return run({{.x = x, .conds = {cond}}}).denoised.front();
  }
  Conditioning prompt(double value) { return toy_prompt(value, device()); }
  torch::Tensor x(std::int64_t images = 2, std::int64_t height = 16, std::int64_t width = 24) {
    return fill({images, 4, height, width}, .7, .3, 6).to(device());
  }

  std::shared_ptr<test::ToyUNet> unet;
  std::unique_ptr<ModelPatcher> model;
};

TEST_P(CalcCondBatch, PutsWhatFitsIntoOneCall) {
  const auto batch = run({{.branch = Branch::uncond, .x = x(), .conds = {prompt(-1), prompt(0.5)}},
                          {.branch = Branch::cond, .x = x(), .conds = {prompt(1)}}});
  EXPECT_EQ(batch.unet_calls, 1);
  EXPECT_EQ(batch.unet_rows, 6);
  EXPECT_LT(max_diff(batch.denoised[1], alone(x(), prompt(1))), 1e-5);
  EXPECT_LT(max_diff(batch.denoised[0], (alone(x(), prompt(-1)) + alone(x(), prompt(0.5))) / 2),
            1e-5);
}

TEST_P(CalcCondBatch, GivesTheSameWhateverTheRowLimit) {
  const std::vector<CondRequest> requests = {
      {.branch = Branch::uncond, .x = x(3), .conds = {prompt(-1), prompt(0.5)}},
      {.branch = Branch::cond, .x = x(3), .conds = {prompt(1)}}};
  const auto whole = run(requests);
  for (const auto& [limit, calls] :
       {std::pair<std::int64_t, std::int64_t>{1, 9}, {2, 6}, {3, 3}, {4, 3}, {6, 2}, {9, 1}}) {
    const auto split = run(requests, limit);
    EXPECT_LE(split.unet_calls, calls) << limit << " rows";
    EXPECT_EQ(split.unet_rows, 9);
    for (std::size_t i = 0; i < 2; ++i)
      EXPECT_LT(max_diff(split.denoised[i], whole.denoised[i]), 1e-5) << limit << " rows";
  }
}

TEST_P(CalcCondBatch, LabelsRowsForHooksInEverySplit) {
  for (const std::int64_t limit : {0, 1, 2}) {
    // Image → how often its uncond row was seen.
    std::map<std::int64_t, int> seen;
    auto patched = model->clone();
    patched.set_attn1_replace(
        [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
          EXPECT_EQ(pass.size(), call.q.size(0));
          for (const auto& rows : pass.rows(Branch::uncond))
            for (std::int64_t i = 0; i < rows.count; ++i) ++seen[rows.image + i];
          return next(call);
        },
        {"middle", 0, 0});
    StepContext step(4, 0, 16, 24);
    const std::vector<CondRequest> requests = {
        {.branch = Branch::uncond, .x = x(3), .conds = {prompt(-1)}},
        {.branch = Branch::cond, .x = x(3), .conds = {prompt(1)}}};
    calc_cond_batch(patched, requests, 4, step, {.max_rows = limit});
    EXPECT_EQ(seen, (std::map<std::int64_t, int>{{0, 1}, {1, 1}, {2, 1}})) << limit << " rows";
  }
}

TEST_P(CalcCondBatch, KeepsToTheUNetsOwnRowLimit) {
  class Narrow final : public UNet {
   public:
    explicit Narrow(std::shared_ptr<const UNet> unet) : unet_(std::move(unet)) {}
    torch::Tensor forward(const UNetInput& input) const override {
      EXPECT_LE(input.x.size(0), 3);
      return unet_->forward(input);
    }
    std::vector<AttentionSiteInfo> attention_sites() const override {
      return unet_->attention_sites();
    }
    std::int64_t max_rows() const override { return 3; }
    torch::Device device() const override { return unet_->device(); }
    torch::ScalarType dtype() const override { return unet_->dtype(); }

   private:
    std::shared_ptr<const UNet> unet_;
  };
  const ModelPatcher narrow(std::make_shared<Narrow>(unet), ModelSampling::discrete());
  const std::vector<CondRequest> requests = {
      {.branch = Branch::uncond, .x = x(4), .conds = {prompt(-1)}},
      {.branch = Branch::cond, .x = x(4), .conds = {prompt(1)}}};
  const auto whole = run(requests);
  for (const auto& [limit, calls] : std::map<std::int64_t, int>{{0, 3}, {2, 4}, {5, 3}}) {
    StepContext step(4, 0, 16, 24);
    const auto batch = calc_cond_batch(narrow, requests, 4, step, {.max_rows = limit});
    EXPECT_EQ(batch.unet_calls, calls) << limit;
    for (const std::size_t i : {0, 1})
      EXPECT_LT(max_diff(batch.denoised[i], whole.denoised[i]), 1e-5);
  }
}

TEST_P(CalcCondBatch, WeighsByStrengthAndMask) {
  auto strong = prompt(1);
  strong.strength = 3;
  const auto mixed = run({{.x = x(), .conds = {prompt(-1), strong}}}).denoised.front();
  EXPECT_LT(max_diff(mixed, (alone(x(), prompt(-1)) + 3 * alone(x(), prompt(1))) / 4), 1e-5);

  auto left = prompt(1), right = prompt(-1);
  left.mask = torch::zeros({16, 24}, device());
  left.mask.narrow(1, 0, 12).fill_(1);
  right.mask = 1 - left.mask;
  const auto halves = run({{.x = x(), .conds = {left, right}}}).denoised.front();
  EXPECT_LT(
      max_diff(halves, torch::where(left.mask > 0, alone(x(), prompt(1)), alone(x(), prompt(-1)))),
      1e-5);
}

// ComfyUI: `get_area_and_mult`: 8 cells of feather, fewer on small areas, none on the latent's
// edge.
TEST_P(CalcCondBatch, EvaluatesAnAreaForItselfAndFeathersIt) {
  auto part = prompt(1);
  part.area = Area{16, 8, 0, 16};
  const auto batch = run({{.x = x(), .conds = {prompt(-1), part}}});
  EXPECT_EQ(batch.unet_calls, 2) << "sizes differ";
  auto inside = alone(x().narrow(3, 16, 8).contiguous(), prompt(1));
  const auto outside = alone(x(), prompt(-1));
  auto weight = torch::ones({8}, device());
  // Side 8 / 4 = 2 cells of feather on the left; the other sides lie on the edge.
  weight[0] = 0.5;
  const auto expected = (outside.narrow(3, 16, 8) + inside * weight) / (1 + weight);
  EXPECT_LT(max_diff(batch.denoised[0].narrow(3, 16, 8), expected), 1e-5);
  EXPECT_LT(max_diff(batch.denoised[0].narrow(3, 0, 16), outside.narrow(3, 0, 16)), 1e-6);
}

// Adds a further picture to the latent, and further tokens to the context.
class ExtraUNet final : public UNet {
 public:
  explicit ExtraUNet(torch::Device device) : toy_(device) {}
  torch::Tensor forward(const UNetInput& input) const override {
    return toy_.forward({.x = input.x + input.extra.at("hint").mean(1, true),
                         .timesteps = input.timesteps,
                         .context = input.context + input.extra.at("tokens").mean({1, 2, 3})});
  }
  std::vector<AttentionSiteInfo> attention_sites() const override { return toy_.attention_sites(); }
  torch::Device device() const override { return toy_.device(); }
  torch::ScalarType dtype() const override { return toy_.dtype(); }

 private:
  test::ToyUNet toy_;
};

TEST_P(CalcCondBatch, CropsPicturesToTheArea) {
  const ModelPatcher extra(std::make_shared<ExtraUNet>(device()), ModelSampling::discrete());
  const ModelPatcher concat(std::make_shared<test::ConcatUNet>(device()),
                            ModelSampling::discrete());
  const auto picture = fill({2, 5, 16, 24}, .2, .9, 2).to(device());
  for (const auto* inpainting : {&extra, &concat}) {
    const auto with = [&](const torch::Tensor& x, const torch::Tensor& picture,
                          const std::optional<Area>& area) {
      auto cond = prompt(1);
      cond.area = area;
      if (inpainting == &extra)
        cond.extra = {{"hint", picture}, {"tokens", torch::ones({1, 2, 3, 4}, device())}};
      else
        cond.concat = picture;
      StepContext step(4, 0, x.size(2), x.size(3));
      const std::vector<CondRequest> requests = {{.x = x, .conds = {cond}}};
      return calc_cond_batch(*inpainting, requests, 4, step, {}).denoised.front();
    };
    const auto part = with(x(), picture, Area{16, 8, 0, 16}).narrow(3, 16, 8);
    const auto alone = with(x().narrow(3, 16, 8).contiguous(), picture.narrow(3, 16, 8), {});
    EXPECT_LT(max_diff(part, alone), 1e-5);
  }
}

TEST_P(CalcCondBatch, GivesEachConditioningItsOwnFurtherChannels) {
  const ModelPatcher inpainting(std::make_shared<test::ConcatUNet>(device()),
                                ModelSampling::discrete());
  const auto with = [&](const torch::Tensor& concat) {
    auto cond = prompt(1);
    cond.concat = concat;
    return cond;
  };
  const auto evaluate = [&](const std::vector<CondRequest>& requests, std::int64_t max_rows) {
    StepContext step(4, 0, 16, 24);
    return calc_cond_batch(inpainting, requests, 4, step, {.max_rows = max_rows});
  };
  // One row for all images, and one for each.
  const auto shared = with(fill({1, 5, 16, 24}, .2, .9, 2).to(device()));
  const auto own = with(fill({2, 5, 16, 24}, .3, .1, 1).to(device()));
  const auto fewer = with(fill({1, 2, 16, 24}, .3, .1, 1).to(device()));
  const auto alone = [&](const Conditioning& cond) {
    return evaluate({{.x = x(), .conds = {cond}}}, 0).denoised.front();
  };
  // The toy's own formula, with x scaled but not the further channels.
  const auto sum = x() + own.concat.mean(1, true) * std::sqrt(17.0);
  const auto expected = x() + this->alone(sum, prompt(1)) - sum;
  EXPECT_LT(max_diff(alone(own), expected), 1e-4);
  for (const std::int64_t max_rows : {0, 1, 3}) {
    const auto batch =
        evaluate({{.x = x(), .conds = {shared}}, {.x = x(), .conds = {own}}}, max_rows);
    EXPECT_EQ(batch.unet_calls, max_rows == 0 ? 1 : max_rows == 1 ? 4 : 2);
    EXPECT_LT(max_diff(batch.denoised[0], alone(shared)), 1e-5);
    EXPECT_LT(max_diff(batch.denoised[1], alone(own)), 1e-5);
  }
  const auto apart = evaluate({{.x = x(), .conds = {own}}, {.x = x(), .conds = {fewer}}}, 0);
  EXPECT_EQ(apart.unet_calls, 2);
  EXPECT_LT(max_diff(apart.denoised[1], alone(fewer)), 1e-5);
}

TEST_P(CalcCondBatch, ClipsAreasAndLeavesUncoveredCells0) {
  auto part = prompt(1);
  part.area = Area{100, 100, 8, 16};
  const auto denoised = run({{.x = x(), .conds = {part}}}).denoised.front();
  EXPECT_TRUE((denoised.narrow(2, 0, 8) == 0).all().item<bool>());
  EXPECT_TRUE(denoised.isfinite().all().item<bool>());
  EXPECT_FALSE((denoised.narrow(2, 8, 8).narrow(3, 16, 8) == 0).any().item<bool>());
}

TEST_P(CalcCondBatch, CallsOnceForEachLengthOfPrompt) {
  const auto longer = Conditioning{.context = torch::full({1, 3, 1}, 1.0, device())};
  const auto batch = run({{.x = x(), .conds = {prompt(-1)}},
                          {.x = x(), .conds = {longer}},
                          {.x = x(), .conds = {longer, prompt(1)}}});
  EXPECT_EQ(batch.unet_calls, 2);
  EXPECT_LT(max_diff(batch.denoised[1], alone(x(), prompt(1))), 1e-5);
  EXPECT_LT(max_diff(batch.denoised[2], alone(x(), prompt(1))), 1e-5);
}

TEST_P(CalcCondBatch, RepeatsPromptsForCrossAttention) {
  // The toy under a name that says what reads its context.
  class WithNames final : public UNet {
   public:
    WithNames(std::shared_ptr<const UNet> unet, std::string path)
        : unet_(std::move(unet)), path_(std::move(path)) {}
    torch::Tensor forward(const UNetInput& input) const override { return unet_->forward(input); }
    std::vector<AttentionSiteInfo> attention_sites() const override {
      return {{.name = "middle.0.0", .path = path_, .ordinal = 0}};
    }
    torch::Device device() const override { return unet_->device(); }
    torch::ScalarType dtype() const override { return unet_->dtype(); }

   private:
    std::shared_ptr<const UNet> unet_;
    std::string path_;
  };
  const auto name_it = [&](const std::string& path) {
    model = std::make_unique<ModelPatcher>(std::make_shared<WithNames>(unet, path),
                                           ModelSampling::discrete());
  };
  name_it("unet.mid_block.attentions.0.transformer_blocks.0.attn1");
  const auto longer = Conditioning{.context = torch::full({1, 3, 1}, 1.0, device())};
  const auto batch = run({{.x = x(), .conds = {prompt(-1)}}, {.x = x(), .conds = {longer}}});
  EXPECT_EQ(batch.unet_calls, 1);
  EXPECT_LT(max_diff(batch.denoised[1], alone(x(), prompt(1))), 1e-5);

  const auto much_longer = Conditioning{.context = torch::full({1, 7, 1}, 1.0, device())};
  EXPECT_EQ(run({{.x = x(), .conds = {prompt(-1)}}, {.x = x(), .conds = {much_longer}}}).unet_calls,
            2);

  // CogView4's joint attention.
  name_it("transformer_blocks.0.attn1");
  EXPECT_EQ(run({{.x = x(), .conds = {prompt(-1)}}, {.x = x(), .conds = {longer}}}).unet_calls, 2);
}

TEST_P(CalcCondBatch, GivesEachImageItsOwnConditioning) {
  const auto own = Conditioning{.context = torch::tensor({1.0f, -1.0f}, device()).view({2, 1, 1})};
  for (const std::int64_t limit : {0, 1}) {
    const auto both = run({{.x = x(), .conds = {own}}}, limit).denoised.front();
    EXPECT_LT(max_diff(both[0], alone(x(), prompt(1))[0]), 1e-5);
    EXPECT_LT(max_diff(both[1], alone(x(), prompt(-1))[1]), 1e-5);
  }
}

TEST_P(CalcCondBatch, TakesAnotherXPerRequest) {
  const auto other = x() * 0.5 + 1;
  const auto batch = run({{.x = x(), .conds = {prompt(-1)}},
                          {.owner = Owner("g"), .x = other, .conds = {prompt(-1)}}});
  EXPECT_EQ(batch.unet_calls, 1);
  EXPECT_LT(max_diff(batch.denoised[1], alone(other, prompt(-1))), 1e-5);
}

TEST_P(CalcCondBatch, LeavesOutWhatIsInactive) {
  auto late = prompt(1);
  late.sigma_start = 3;
  const auto batch = run({{.x = x(), .conds = {late}}, {.x = x(), .conds = {prompt(-1), late}}});
  EXPECT_FALSE(batch.denoised[0].defined());
  EXPECT_EQ(batch.unet_rows, 2);
  EXPECT_LT(max_diff(batch.denoised[1], alone(x(), prompt(-1))), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Backends, CalcCondBatch, test::backends(), test::backend_name);

}  // namespace
}  // namespace sag

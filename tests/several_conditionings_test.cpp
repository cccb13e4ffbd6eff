// Several positives and negatives with strengths, areas, masks, ranges, token counts and further
// channels: the prediction and the attention map, against loops over cells.

#include <random>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "model/conditioning_checks.h"
#include "sag/blur.h"
#include "sag/calc_cond_batch.h"
#include "sag/cfg_guider.h"
#include "sag/self_attention_guidance.h"
#include "support/device.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::max_diff;

constexpr double kSigma = 4;

Area area_of(const Conditioning& cond, const torch::Tensor& x) {
  const auto area = cond.area.value_or(Area{x.size(2), x.size(3), 0, 0});
  return {std::min(area.height, x.size(2) - area.y), std::min(area.width, x.size(3) - area.x),
          area.y, area.x};
}

// ComfyUI: `get_area_and_mult`. How far cell `at` is faded by the edges of [begin, begin + side)
// that lie inside the latent.
double fade(std::int64_t at, std::int64_t begin, std::int64_t side, std::int64_t whole) {
  const auto reach = std::min<std::int64_t>(8, side / 4);
  const auto from_begin = at - begin, from_end = begin + side - 1 - at;
  double factor = 1;
  if (begin > 0 && from_begin < reach) factor *= (from_begin + 1.0) / static_cast<double>(reach);
  if (begin + side < whole && from_end < reach)
    factor *= (from_end + 1.0) / static_cast<double>(reach);
  return factor;
}

double weight_at(const Conditioning& cond, const torch::Tensor& x, std::int64_t image,
                 std::int64_t row, std::int64_t col) {
  const auto area = area_of(cond, x);
  if (row < area.y || row >= area.y + area.height || col < area.x || col >= area.x + area.width)
    return 0;
  if (cond.mask.defined()) {
    const auto mask =
        cond.mask.dim() == 2 ? cond.mask : cond.mask[cond.mask.size(0) == 1 ? 0 : image];
    return cond.strength * mask[row][col].item<double>();
  }
  if (!cond.area) return cond.strength;
  return cond.strength * fade(row, area.y, area.height, x.size(2)) *
         fade(col, area.x, area.width, x.size(3));
}

torch::Tensor crop(const torch::Tensor& x, const Area& area) {
  return x.narrow(2, area.y, area.height).narrow(3, area.x, area.width).contiguous();
}

/// One picture per conditioning, on its area, of `channels` channels.
using PictureOf = std::function<torch::Tensor(const Conditioning&)>;

// The average over the active conditionings, cell by cell in fp64; 0 where there is none.
torch::Tensor average(const std::vector<Conditioning>& conds, const torch::Tensor& x,
                      std::int64_t channels, const PictureOf& picture_of) {
  const auto images = x.size(0), height = x.size(2), width = x.size(3);
  auto sum = torch::zeros({images, channels, height, width}, torch::kDouble);
  auto weights = torch::zeros({images, 1, height, width}, torch::kDouble);
  auto s = sum.accessor<double, 4>(), w = weights.accessor<double, 4>();
  for (const auto& cond : conds) {
    if (!is_active(cond, kSigma)) continue;
    const auto area = area_of(cond, x);
    const auto picture = picture_of(cond).to(torch::kDouble).contiguous();
    const auto p = picture.accessor<double, 4>();
    for (std::int64_t i = 0; i < images; ++i)
      for (auto row = area.y; row < area.y + area.height; ++row)
        for (auto col = area.x; col < area.x + area.width; ++col) {
          const double weight = weight_at(cond, x, i, row, col);
          w[i][0][row][col] += weight;
          for (std::int64_t c = 0; c < channels; ++c)
            s[i][c][row][col] += weight * p[i][c][row - area.y][col - area.x];
        }
  }
  return torch::where(weights > 0, sum / weights, 0.0);
}

torch::Tensor average_prediction(const Denoiser& denoiser, const std::vector<Conditioning>& conds,
                                 const torch::Tensor& x) {
  return average(conds, x, x.size(1), [&](const Conditioning& cond) {
    const auto area = area_of(cond, x);
    Conditioning prompt{.context = cond.context, .concat = crop(cond.concat, area)};
    return denoiser(crop(x, area), kSigma, prompt);
  });
}

// Token sums of the toy's attention in fp64, each token over its 8 × 8 cells.
torch::Tensor toy_map(const torch::Tensor& x) {
  const auto pooled = torch::avg_pool2d(x / std::sqrt(kSigma * kSigma + 1), 8, {}, 0, true);
  const auto tokens = pooled.flatten(2).transpose(1, 2);
  const auto sums = test::reference_attention_map(
      test::split_heads(6 * tokens, 2), test::split_heads(5 * tokens, 2), 1 / std::sqrt(2.0));
  const auto grid = sums.view({x.size(0), 1, pooled.size(2), pooled.size(3)}).contiguous();
  auto picture = torch::zeros({x.size(0), 1, x.size(2), x.size(3)}, torch::kDouble);
  const auto g = grid.accessor<double, 4>();
  auto p = picture.accessor<double, 4>();
  // Legacy nearest.
  const auto source = [](std::int64_t at, std::int64_t in, std::int64_t out) {
    const auto scale = static_cast<float>(in) / static_cast<float>(out);
    return std::min(static_cast<std::int64_t>(std::floor(static_cast<float>(at) * scale)), in - 1);
  };
  for (std::int64_t i = 0; i < x.size(0); ++i)
    for (std::int64_t row = 0; row < x.size(2); ++row)
      for (std::int64_t col = 0; col < x.size(3); ++col)
        p[i][0][row][col] =
            g[i][0][source(row, grid.size(2), x.size(2))][source(col, grid.size(3), x.size(3))];
  return picture;
}

torch::Tensor average_map(const std::vector<Conditioning>& conds, const torch::Tensor& x) {
  return average(conds, x, 1, [&](const Conditioning& cond) {
    // ConcatUNet adds them after x was scaled.
    const auto seen = x + cond.concat.mean(1, true) * std::sqrt(kSigma * kSigma + 1);
    return toy_map(crop(seen, area_of(cond, x)));
  });
}

/// Conditionings as users combine them, from a seed.
class RandomConditionings {
 public:
  explicit RandomConditionings(unsigned seed) : random_(seed) {}

  std::int64_t integer(std::int64_t from, std::int64_t to) {
    return std::uniform_int_distribution<std::int64_t>(from, to)(random_);
  }
  double number(double from, double to) {
    return std::uniform_real_distribution<double>(from, to)(random_);
  }
  torch::Tensor latent() {
    return fill({integer(1, 3), 4, integer(6, 40), integer(6, 40)}, .7, number(0, 3), 6);
  }
  std::vector<Conditioning> list(const torch::Tensor& x) {
    std::vector<Conditioning> conds(static_cast<std::size_t>(integer(1, 4)));
    for (auto& cond : conds) cond = one(x);
    // At least one is active.
    conds.front().sigma_start = INFINITY;
    return conds;
  }
  template <class T>
  std::vector<T> shuffled(std::vector<T> list) {
    std::shuffle(list.begin(), list.end(), random_);
    return list;
  }

 private:
  Conditioning one(const torch::Tensor& x) {
    const auto height = x.size(2), width = x.size(3);
    const auto images = integer(0, 1) ? x.size(0) : 1;
    Conditioning cond{.context = torch::full({1, integer(1, 6), 1}, number(-2, 2)),
                      .concat = fill({images, 5, height, width}, .4, number(0, 3), 2)};
    if (integer(0, 1)) cond.strength = number(0.2, 3);
    // The area may reach over the edge.
    if (integer(0, 1)) {
      cond.area = Area{.y = integer(0, height - 1), .x = integer(0, width - 1)};
      cond.area->height = integer(1, height);
      cond.area->width = integer(1, width);
    }
    if (integer(0, 2) == 0) {
      cond.mask = fill({integer(0, 1) ? x.size(0) : 1, height, width}, .9, number(0, 3), 1).relu();
      if (integer(0, 1)) cond.mask = cond.mask[0];
    }
    if (integer(0, 3) == 0) cond.sigma_start = kSigma / 2;
    return cond;
  }

  std::mt19937 random_;
};

// The library runs on a backend; the loops run on the CPU.
class SeveralConditionings : public testing::TestWithParam<std::tuple<const char*, unsigned>> {
 protected:
  void SetUp() override { SAG_SKIP_WITHOUT_CUDA(device); }

  torch::Device device{std::get<0>(GetParam())};
  RandomConditionings random{std::get<1>(GetParam())};
  ModelPatcher model{std::make_shared<test::ConcatUNet>(device), ModelSampling::discrete()};
  Denoiser reference{std::make_shared<test::ConcatUNet>(), ModelSampling::discrete()};
};

TEST_P(SeveralConditionings, AreAveragedPerCell) {
  const auto x = random.latent();
  const auto conds = random.list(x);
  StepContext step(kSigma, 0, x.size(2), x.size(3));
  const CondRequest request{.x = x.to(device), .conds = conds};
  const auto denoised =
      calc_cond_batch(model, {&request, 1}, kSigma, step, {.max_rows = random.integer(0, 4)})
          .denoised.front();
  EXPECT_LT(max_diff(denoised, average_prediction(reference, conds, x)), 1e-4);
}

TEST_P(SeveralConditionings, GiveOneMapWithTheWeightsOfThePrediction) {
  const auto x = random.latent();
  const auto positive = random.list(x), negative = random.list(x);
  const SelfAttentionGuidanceOptions options{.scale = 0.75};
  const CfgGuiderOptions cfg{.cond_scale = 3, .max_rows = random.integer(0, 4)};
  CfgGuider guider(apply_self_attention_guidance(model, options), positive, negative, cfg);
  const auto denoised = guider(x.to(device), kSigma);

  const auto map = average_map(negative, x);
  const auto mask = guider.report().evaluations.front().guidances.front().mask.cpu();
  const auto clear = (map - 1).abs() > 1e-4;
  EXPECT_FALSE((((map > 1) != mask) & clear).any().item<bool>());

  // The whole evaluation, with the mask that was used: cells on the edge are settled above.
  const auto c = average_prediction(reference, positive, x),
             u = average_prediction(reference, negative, x);
  const auto degraded = torch::where(mask, test::reference_blur(u, 4, 2), u);
  const auto again = average_prediction(reference, negative, (x + degraded - u).to(x.dtype()));
  EXPECT_LT(max_diff(denoised, u + (c - u) * 3 + 0.75 * (degraded - again)), 1e-3);
}

// T37 of golden/toy.json, where the reference keeps the map of what it evaluated last.
TEST_P(SeveralConditionings, CountTheSameInAnyOrder) {
  const auto x = random.latent();
  const auto positive = random.list(x), negative = random.list(x);
  const auto guided = apply_self_attention_guidance(model);
  const auto denoise = [&](const std::vector<Conditioning>& p, const std::vector<Conditioning>& n) {
    CfgGuider guider(guided, p, n, {.cond_scale = 3});
    const auto denoised = guider(x.to(device), kSigma);
    return std::pair(denoised, guider.report().evaluations.front().guidances.front().mask.cpu());
  };
  const auto [first, mask] = denoise(positive, negative);
  const auto [other, other_mask] = denoise(random.shuffled(positive), random.shuffled(negative));
  const auto clear = (average_map(negative, x) - 1).abs() > 1e-4;
  EXPECT_FALSE(((mask != other_mask) & clear).any().item<bool>());
  if (torch::equal(mask, other_mask)) {
    EXPECT_LT(max_diff(first, other), 1e-3);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, SeveralConditionings,
                         testing::Combine(test::backends(), testing::Range(0u, 40u)),
                         [](const auto& info) {
                           return c10::str(std::get<0>(info.param), "_", std::get<1>(info.param));
                         });

// The reference's typical case: one prompt for the picture and one for a part of it.
TEST(RegionalPrompt, AddsNoConditioning) {
  auto part = test::toy_prompt(0.5);
  part.area = Area{32, 40, 16, 24};
  const ModelPatcher model(std::make_shared<test::ToyUNet>(), ModelSampling::discrete());
  CfgGuider guider(model, {test::toy_prompt(1), part}, {test::toy_prompt(-1)}, {.cond_scale = 7});
  guider(fill({1, 4, 64, 96}, .7, .3, 6), kSigma);
  EXPECT_EQ(guider.report().evaluations.front().unet_rows, 3);
}

TEST(RegionalPrompt, LeavesTheMapOfTheWholeNegative) {
  const auto x = fill({1, 4, 64, 96}, .7, .3, 6);
  Conditioning whole = test::toy_prompt(1), part = test::toy_prompt(0.5);
  part.area = Area{32, 40, 16, 24};
  const auto model =
      apply_self_attention_guidance({std::make_shared<test::ToyUNet>(), ModelSampling::discrete()});
  CfgGuider guider(model, {whole, part}, {test::toy_prompt(-1)}, {.cond_scale = 7});
  guider(x, kSigma);
  const auto map = toy_map(x);
  const auto& mask = guider.report().evaluations.front().guidances.front().mask;
  EXPECT_GT(((map - 1).abs() > 1e-4).sum().item<int>(), 5000) << "of 6144 cells";
  EXPECT_FALSE((((map > 1) != mask) & ((map - 1).abs() > 1e-4)).any().item<bool>());
}

}  // namespace
}  // namespace sag

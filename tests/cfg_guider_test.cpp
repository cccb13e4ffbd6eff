#include "sag/cfg_guider.h"

#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/calc_cond_batch.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::max_diff;
using test::toy_prompt;

struct Toy {
  std::shared_ptr<test::ToyUNet> unet = std::make_shared<test::ToyUNet>();
  ModelPatcher model{unet, ModelSampling::discrete()};
  torch::Tensor x = test::fill({1, 4, 16, 24}, .7, .3, 6);

  CfgGuider guider(const ModelPatcher& patched, double cond_scale = 7) const {
    return {patched, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = cond_scale}};
  }
  torch::Tensor prediction(double prompt) const {
    return model.denoiser()(x, 4, toy_prompt(prompt));
  }
};

TEST(CfgGuider, IsClassifierFreeGuidance) {
  const Toy toy;
  auto guider = toy.guider(toy.model);
  const auto u = toy.prediction(-1), c = toy.prediction(1);
  EXPECT_LT(max_diff(guider(toy.x, 4), u + (c - u) * 7), 1e-4);
  EXPECT_EQ(guider.report().unet_calls(), 1);
  EXPECT_EQ(guider.report().unet_rows(), 2);
}

TEST(CfgGuider, EvaluatesOneRowAtCondScale1) {
  const Toy toy;
  auto guider = toy.guider(toy.model, 1);
  EXPECT_LT(max_diff(guider(toy.x, 4), toy.prediction(1)), 1e-5);
  EXPECT_EQ(guider.report().unet_rows(), 1);
  const auto both = guider.predict_both(toy.x, 4);
  EXPECT_LT(max_diff(both.uncond_denoised, toy.prediction(-1)), 1e-5);
  EXPECT_EQ(guider.report().unet_rows(), 3);
}

TEST(CfgGuider, WithoutPositivesIsTheUnconditionalPrediction) {
  const Toy toy;
  CfgGuider guider(toy.model, {}, {toy_prompt(-1)}, {.cond_scale = 7});
  EXPECT_LT(max_diff(guider(toy.x, 4), toy.prediction(-1)), 1e-5);
  EXPECT_EQ(guider.report().unet_rows(), 1);
}

TEST(CfgGuider, WithoutAnActiveNegativeIsTheConditionalPrediction) {
  const Toy toy;
  auto negative = toy_prompt(-1);
  negative.sigma_start = 3;
  CfgGuider guider(toy.model, {toy_prompt(1)}, {negative}, {.cond_scale = 7});
  EXPECT_LT(max_diff(guider(toy.x, 4), toy.prediction(1)), 1e-5);
  CfgGuider none(toy.model, {toy_prompt(1)}, {}, {.cond_scale = 7});
  EXPECT_LT(max_diff(none(toy.x, 4), toy.prediction(1)), 1e-5);
}

TEST(CfgGuider, RunsFunctionsInTheOrderAdded) {
  const Toy toy;
  auto patched = toy.model.clone();
  const auto u = toy.prediction(-1), c = toy.prediction(1);
  patched.set_pre_cfg_function([](const CfgArgs& args) {
    return CfgPredictions{args.cond_denoised + 1, args.uncond_denoised};
  });
  patched.set_pre_cfg_function([](const CfgArgs& args) {
    return CfgPredictions{args.cond_denoised * 2, args.uncond_denoised};
  });
  patched.set_cfg_function(
      [](const CfgArgs& args) { return args.cond_denoised - args.uncond_denoised; });
  patched.set_post_cfg_function([](const PostCfgArgs& args) { return args.denoised + 3; });
  patched.set_post_cfg_function([](const PostCfgArgs& args) { return args.denoised * 5; });
  EXPECT_LT(max_diff(toy.guider(patched)(toy.x, 4), ((c + 1) * 2 - u + 3) * 5), 1e-3);
}

TEST(CfgGuider, LetsAPostCfgFunctionPredictAgain) {
  const Toy toy;
  auto patched = toy.model.clone();
  const Owner owner("mine");
  std::vector<std::string> owners;
  patched.set_attn1_replace(
      [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
        for (const auto& group : pass.groups) owners.push_back(group.owner.name());
        return next(call);
      },
      {"middle", 0, 0});
  patched.set_post_cfg_function(
      [&](const PostCfgArgs& args) { return args.predict(args.x * 0.5, Branch::cond, owner); });
  auto guider = toy.guider(patched);
  EXPECT_LT(max_diff(guider(toy.x, 4), toy.model.denoiser()(toy.x * 0.5, 4, toy_prompt(1))), 1e-5);
  EXPECT_EQ(owners, (std::vector<std::string>{"main", "main", "mine"}));
  EXPECT_EQ(guider.report().unet_calls(), 2);
  EXPECT_EQ(guider.report().unet_rows(), 3);
}

TEST(CfgGuider, CountsStepsBySigma) {
  const Toy toy;
  CfgGuider guider(toy.model, {toy_prompt(1)}, {toy_prompt(-1)});
  guider.begin_run({10, 4, 1.5, 0.5, 0});
  for (const double sigma : {10.0, 4.0, 7.0, 1.5, 0.2, 11.0}) guider(toy.x, sigma);
  std::vector<std::int64_t> steps;
  for (const auto& evaluation : guider.report().evaluations) steps.push_back(evaluation.step_index);
  EXPECT_EQ(steps, (std::vector<std::int64_t>{0, 1, 0, 2, 3, 0}));
}

TEST(CfgGuider, PassesExceptionsOnAndWorksAfterwards) {
  class HookFailure : public std::logic_error {
    using std::logic_error::logic_error;
  };
  const Toy toy;
  auto patched = toy.model.clone();
  bool fail = true;
  patched.set_attn1_replace(
      [&](const AttentionCall& call, const Pass&, const NextAttention& next) {
        if (fail) throw HookFailure("on purpose");
        return next(call);
      },
      {"middle", 0, 0});
  auto guider = toy.guider(patched);
  EXPECT_THROW(guider(toy.x, 4), HookFailure);
  EXPECT_TRUE(guider.report().evaluations.empty());
  fail = false;
  EXPECT_TRUE(torch::equal(guider(toy.x, 4), toy.guider(toy.model)(toy.x, 4)));
}

TEST(CfgGuider, ReturnsOrdinaryTensorsWithoutGradients) {
  const Toy toy;
  const auto denoised = toy.guider(toy.model)(toy.x.clone().requires_grad_(), 4);
  EXPECT_FALSE(denoised.requires_grad());
  EXPECT_FALSE(denoised.is_inference());
}

TEST(CfgGuider, ChecksItsArguments) {
  const Toy toy;
  EXPECT_THROW(CfgGuider(toy.model, {}, {}), c10::ValueError);
  EXPECT_THROW(toy.guider(toy.model, NAN), c10::ValueError);
  EXPECT_THROW(toy.guider(toy.model).begin_run({1, 2}), c10::ValueError);
  EXPECT_THROW(toy.guider(toy.model).begin_run({1, NAN}), c10::ValueError);
  EXPECT_THROW(CfgGuider(toy.model, {toy_prompt(1)}, {}, {.max_rows = -1}), c10::ValueError);
  auto guider = toy.guider(toy.model);
  EXPECT_THROW(guider(torch::zeros({4, 16, 24}), 4), c10::ValueError);
  EXPECT_THROW(guider(torch::zeros({1, 4, 1, 16, 24}), 4), c10::ValueError);
  EXPECT_THROW(guider(toy.x, 0), c10::ValueError);
  EXPECT_THROW(guider(toy.x, NAN), c10::ValueError);
  auto early = toy_prompt(1);
  early.sigma_end = 5;
  EXPECT_THROW(CfgGuider(toy.model, {early}, {})(toy.x, 4), c10::ValueError) << "nothing is active";
}

// Each mistake gives one sentence, before the UNet is called.
class CfgGuiderRefuses : public testing::Test {
 protected:
  void expect_refused(const Conditioning& positive, const Conditioning& negative,
                      const std::string& message) {
    try {
      CfgGuider(toy.model, {positive}, {negative}, {.cond_scale = 7})(toy.x, 4);
      ADD_FAILURE() << "was accepted: " << message;
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what_without_backtrace(), testing::HasSubstr(message));
    }
    EXPECT_EQ(toy.unet->calls, 0);
  }
  static Conditioning prompt(const std::function<void(Conditioning&)>& spoil) {
    auto cond = toy_prompt(1);
    spoil(cond);
    return cond;
  }
  Toy toy;
};

TEST_F(CfgGuiderRefuses, NanAndInfinity) {
  const auto bad = prompt([](auto& cond) { cond.context = torch::full({1, 2, 1}, NAN); });
  expect_refused(bad, toy_prompt(-1), "[CfgGuider] context must be finite");
  expect_refused(toy_prompt(1), bad, "[CfgGuider] context must be finite");
  expect_refused(prompt([](auto& cond) {
                   cond.y = torch::full({1, 2}, INFINITY);
                 }),
                 toy_prompt(-1), "[CfgGuider] y must be finite");
  expect_refused(prompt([](auto& cond) {
                   cond.extra["c"] = torch::full({1, 2}, NAN);
                 }),
                 toy_prompt(-1), "[CfgGuider] extra input \"c\" must be finite");
  expect_refused(prompt([](auto& cond) {
                   cond.mask = torch::full({16, 24}, NAN);
                 }),
                 toy_prompt(-1), "[CfgGuider] mask must be finite");
  expect_refused(prompt([](auto& cond) {
                   cond.mask = torch::full({16, 24}, 2.0);
                 }),
                 toy_prompt(-1), "[CfgGuider] mask must be between 0 and 1, got 2 to 2.");
}

TEST_F(CfgGuiderRefuses, WhatDoesNotFitTheLatentOrTheOtherPrompts) {
  expect_refused(prompt([](auto& cond) {
                   cond.mask = torch::ones({16, 16});
                 }),
                 toy_prompt(-1), "mask must have the latent's size, [16, 24]");
  expect_refused(prompt([](auto& cond) {
                   cond.area = Area{4, 4, 16, 0};
                 }),
                 toy_prompt(-1), "area must touch the latent of 16 x 24, got 4 x 4 at (16, 0).");
  expect_refused(prompt([](auto& cond) {
                   cond.area = Area{4, 4, -4, 0};
                 }),
                 toy_prompt(-1), "area must have positive sides and start at 0 or after");
  expect_refused(prompt([](auto& cond) {
                   cond.context = torch::ones({1, 77, 768});
                 }),
                 prompt([](auto& cond) {
                   cond.context = torch::ones({1, 77, 1024});
                 }),
                 "[CfgGuider] the context of all conditionings must have one width, got 768 and "
                 "1024.");
  expect_refused(prompt([](auto& cond) {
                   cond.y = torch::ones({1, 2816});
                 }),
                 prompt([](auto& cond) {
                   cond.y = torch::ones({1, 2560});
                 }),
                 "[CfgGuider] the y of all conditionings must have one width, got 2816 and 2560.");
  expect_refused(prompt([](auto& cond) {
                   cond.concat = torch::ones({1, 5, 16, 24});
                 }),
                 toy_prompt(-1),
                 "[CfgGuider] the concat of all conditionings must have as many channels, also "
                 "those of the negatives, got 5 and 0.");
  expect_refused(prompt([](auto& cond) {
                   cond.context = torch::ones({3, 2, 1});
                 }),
                 toy_prompt(-1), "context must have 1 row, got shape [3, 2, 1]");
}

TEST_F(CfgGuiderRefuses, LatentsThatAreNoPicturesAndSigmasThatAreNone) {
  auto guider = toy.guider(toy.model);
  const auto message = [&](const torch::Tensor& x, double sigma) -> std::string {
    try {
      guider(x, sigma);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "took it";
  };
  const std::string shape =
      "[CfgGuider] x must have shape [images, channels, height, width], none of them 0, got ";
  EXPECT_EQ(message(torch::zeros({4, 16, 24}), 4), shape + "[4, 16, 24].");
  EXPECT_EQ(message(torch::zeros({1, 4, 2, 16, 24}), 4), shape + "[1, 4, 2, 16, 24].");
  EXPECT_EQ(message(torch::zeros({0, 4, 16, 24}), 4), shape + "[0, 4, 16, 24].");
  EXPECT_EQ(message({}, 4), shape + "an undefined tensor.");
  const std::string sigma = "[CfgGuider] sigma must be finite and > 0, got ";
  EXPECT_EQ(message(toy.x, 0), sigma + "0.");
  EXPECT_EQ(message(toy.x, -1), sigma + "-1.");
  EXPECT_EQ(message(toy.x, NAN), sigma + "nan.");
  EXPECT_EQ(message(toy.x, INFINITY), sigma + "inf.");
  EXPECT_THAT(message(toy.x.to(torch::kInt), 4), testing::HasSubstr("x must be floating"));
  EXPECT_EQ(toy.unet->calls, 0);
}

// ComfyUI: `DualCFGGuider`; diffusers: `image_guidance_scale`. The form that sag-sample gives the
// guider for --image-cfg.
TEST(CfgGuider, TwoNegativesGiveThreeWayGuidance) {
  const ModelPatcher model(std::make_shared<test::ConcatUNet>(), ModelSampling::discrete());
  const auto x = test::fill({1, 4, 16, 24}, .7, .3, 6);
  const auto picture = test::fill({1, 4, 16, 24}, .2, .9, 2);
  const auto with = [](double prompt, const torch::Tensor& concat, double strength) {
    auto cond = toy_prompt(prompt);
    cond.concat = concat;
    cond.strength = strength;
    return cond;
  };
  const auto blind = torch::zeros_like(picture);
  const auto alone = [&](double prompt, const torch::Tensor& concat) {
    return model.denoiser()(x, 4, with(prompt, concat, 1));
  };
  const auto p = alone(1, picture), i = alone(-1, picture), n = alone(-1, blind);
  for (const auto& [cfg, image_cfg] :
       {std::pair(7.5, 1.5), std::pair(5.0, 1.0), std::pair(3.0, 4.0), std::pair(0.5, 2.0)}) {
    CfgGuider guider(model, {with(1, picture, 1)},
                     {with(-1, picture, cfg - image_cfg), with(-1, blind, image_cfg - 1)},
                     {.cond_scale = cfg});
    const auto expected = n + cfg * (p - i) + image_cfg * (i - n);
    EXPECT_LT(test::max_diff(guider(x, 4), expected), 1e-4) << cfg << ", " << image_cfg;
  }
}

TEST(CfgWindow, HoldsTheNoiseLevelsAtWhichTheScaleActs) {
  const ModelPatcher model(std::make_shared<test::ToyUNet>(), ModelSampling::discrete());
  const auto x = test::fill({1, 4, 16, 16}, .262, .3, 6);
  const auto at = [&](const GuidanceWindow& window, double sigma) {
    CfgGuider guider(model, {test::toy_prompt(1)}, {test::toy_prompt(-1)},
                     {.cond_scale = 7, .cfg_window = window});
    const auto denoised = guider(x, sigma);
    return std::pair(denoised, guider.report().unet_rows());
  };
  const auto cond = CfgGuider(model, {test::toy_prompt(1)}, {})(x, 4);
  const auto guided = at({}, 4);
  EXPECT_EQ(guided.second, 2);
  // Both ends belong to it.
  for (const auto& window : {GuidanceWindow{.sigma_start = 4}, GuidanceWindow{.sigma_end = 4}}) {
    EXPECT_TRUE(torch::equal(at(window, 4).first, guided.first));
    EXPECT_EQ(at(window, 4).second, 2);
  }
  for (const auto& window : {GuidanceWindow{.sigma_start = 3.9}, GuidanceWindow{.sigma_end = 4.1},
                             GuidanceWindow{.start_percent = 0.9}}) {
    EXPECT_TRUE(torch::equal(at(window, 4).first, cond));
    EXPECT_EQ(at(window, 4).second, 1);
  }
  EXPECT_THROW(at({.sigma_start = 1, .sigma_end = 2}, 4), c10::ValueError);
  // Where a guidance needs the unconditional prediction, it is there, and the scale is 1.
  auto watched = model.clone();
  watched.set_post_cfg_function(
      [](const PostCfgArgs& args) {
        EXPECT_EQ(args.cond_scale, 1);
        EXPECT_TRUE(args.uncond_denoised.defined());
        return args.denoised;
      },
      {.needs_uncond = [](const StepContext&) { return true; }});
  CfgGuider guider(watched, {test::toy_prompt(1)}, {test::toy_prompt(-1)},
                   {.cond_scale = 7, .cfg_window = {.sigma_start = 3}});
  EXPECT_LT(test::max_diff(guider(x, 4), cond), 1e-6);
}

}  // namespace
}  // namespace sag

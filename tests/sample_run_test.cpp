// sag::sample: a whole run, and what it sees to by itself.
#include "sag/sample.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/run_sampler.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "support/denoise.h"
#include "support/device.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::toy_prompt;
using testing::HasSubstr;
using testing::ThrowsMessage;

const torch::Tensor kNoise = fill({2, 4, 16, 24}, .7, .3, 1);

ModelPatcher toy_model(const ModelSampling& sampling = ModelSampling::discrete()) {
  return apply_self_attention_guidance({std::make_shared<test::ToyUNet>(), sampling},
                                       {.scale = .75});
}

CfgGuider toy_guider(const ModelPatcher& model) {
  return {model, {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 3}};
}

// What the caller of the layer below does by hand.
torch::Tensor by_hand(const ModelPatcher& model, const char* sampler, const char* schedule,
                      std::int64_t steps) {
  const auto& info = sampler_info(sampler);
  const auto sigmas = get_sigmas(schedule, model.model_sampling(), steps,
                                 {.discard_penultimate_sigma = info.discards_penultimate_sigma});
  auto guider = toy_guider(model);
  guider.begin_run(sigmas);
  return run_sampler(info.sample, test::denoise_with(guider, info), model.model_sampling(), kNoise,
                     sigmas);
}

class SampleWith : public testing::TestWithParam<std::string_view> {};

TEST_P(SampleWith, DoesWhatTheLayerBelowDoesByHand) {
  const auto name = std::string(GetParam());
  for (const auto& sampling : {ModelSampling::discrete(), ModelSampling::flow({.shift = 2})}) {
    const auto model = toy_model(sampling);
    auto guider = toy_guider(model);
    const auto samples =
        sample(guider, kNoise, {.sampler = name, .schedule = "simple", .steps = 4});
    EXPECT_TRUE(samples.equal(by_hand(model, name.c_str(), "simple", 4)));
    EXPECT_GT(guider.report().guided(), 0);
  }
}
INSTANTIATE_TEST_SUITE_P(Every, SampleWith, testing::ValuesIn(sampler_names()),
                         [](const auto& info) { return std::string(info.param); });

TEST(Sample, HasDefaultsForEverything) {
  const auto model = toy_model();
  auto guider = toy_guider(model);
  EXPECT_TRUE(sample(guider, kNoise).equal(by_hand(model, "euler", "normal", 20)));
  EXPECT_EQ(guider.report().evaluations.size(), 20u);
}

TEST(Sample, GivesTheGuiderTheSigmasOfTheRun) {
  const auto model = apply_self_attention_guidance(
      {std::make_shared<test::ToyUNet>(), ModelSampling::discrete()}, {.interval = 2});
  auto guider = toy_guider(model);
  EXPECT_THAT([&] { guider(kNoise, 1); }, ThrowsMessage<c10::ValueError>(HasSubstr("begin_run")));
  sample(guider, kNoise, {.sigmas = {10, 4, 1, 0.5, 0}});
  std::vector<std::int64_t> steps;
  for (const auto& evaluation : guider.report().evaluations) steps.push_back(evaluation.step_index);
  EXPECT_THAT(steps, testing::ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(guider.report().guided(), 2);
}

TEST(Sample, BeginsAgainWithEveryCall) {
  for (const bool one_pass : {false, true}) {
    const auto model = apply_self_attention_guidance(
        {std::make_shared<test::ToyUNet>(), ModelSampling::discrete()}, {.one_pass = one_pass});
    auto guider = toy_guider(model);
    const auto first = sample(guider, kNoise, {.steps = 5});
    EXPECT_TRUE(sample(guider, kNoise, {.steps = 5}).equal(first));
    EXPECT_EQ(guider.report().evaluations.size(), 5u) << "the report is of one run";
  }
}

TEST(Sample, RunsTheGivenSigmasAsTheyAre) {
  const SampleOptions options{.sampler = "uni_pc", .schedule = "none", .sigmas = {3, 2, 1}};
  EXPECT_EQ(run_sigmas(ModelSampling::discrete(), options), options.sigmas);
}

TEST(Sample, LeavesOutTheLastSigmaButOneWhereComfyUiDoes) {
  const auto sampling = ModelSampling::discrete();
  auto expected = get_sigmas("karras", sampling, 8);
  expected.erase(expected.end() - 2);
  for (const char* sampler : {"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})
    EXPECT_EQ(run_sigmas(sampling, {.sampler = sampler, .schedule = "karras", .steps = 7}),
              expected);
  EXPECT_EQ(run_sigmas(sampling, {.sampler = "heun", .schedule = "karras", .steps = 8}),
            get_sigmas("karras", sampling, 8));
}

TEST(Sample, ReturnsTheDtypeOfTheNoise) {
  auto guider = toy_guider(toy_model());
  const auto latent = kNoise.to(torch::kDouble);
  const auto with = [&](torch::ScalarType dtype) {
    return sample(guider, kNoise.to(dtype), {.steps = 2, .denoise = .5, .latent = latent})
        .scalar_type();
  };
  EXPECT_EQ(with(torch::kFloat), torch::kFloat);
  EXPECT_EQ(with(torch::kDouble), torch::kDouble);
  EXPECT_EQ(with(torch::kHalf), torch::kFloat);
}

TEST(Sample, StartsLaterFromALatent) {
  auto guider = toy_guider(toy_model());
  const auto latent = fill(kNoise.sizes(), .2, .1, 1);
  const auto changed = sample(guider, kNoise, {.steps = 4, .denoise = .5, .latent = latent});
  EXPECT_EQ(guider.report().evaluations.size(), 4u);
  EXPECT_LT(guider.report().evaluations.front().sigma, 5);
  EXPECT_FALSE(changed.equal(sample(guider, kNoise, {.steps = 4, .denoise = .5})));
}

// ComfyUI's ddim noises what it keeps from seed + 1.
TEST(Sample, KeepsWithNoiseOfTheNextSeedsInDdim) {
  const auto mask = torch::zeros({16, 24}), latent = fill(kNoise.sizes(), .2, .1, 1);
  const std::vector<std::uint64_t> seeds = {5, 9}, next = {6, 10};
  const auto run = [&](const char* sampler, torch::Tensor inpaint_noise) {
    auto patched = toy_model();
    std::vector<torch::Tensor> seen;
    patched.set_pre_cfg_function([&](const CfgArgs& args) {
      seen.push_back(args.x.clone());
      return CfgPredictions{args.cond_denoised, args.uncond_denoised};
    });
    auto watched = toy_guider(patched);
    sample(watched, kNoise,
           {.sampler = sampler,
            .steps = 2,
            .latent = latent,
            .denoise_mask = mask,
            .inpaint_noise = std::move(inpaint_noise),
            .seeds = seeds});
    return seen.front();
  };
  const auto noise = SeededNoise(next).draw({4, 16, 24}, torch::kCPU);
  EXPECT_TRUE(run("ddim", {}).equal(run("ddim", noise)));
  EXPECT_FALSE(run("ddim", {}).equal(run("ddim", kNoise)));
  EXPECT_TRUE(run("euler", {}).equal(run("euler", kNoise)));
}

TEST(Sample, TellsOfStepsAndEvaluations) {
  auto guider = toy_guider(toy_model());
  std::vector<std::int64_t> steps, evaluations;
  sample(guider, kNoise,
         {.sampler = "heun",
          .steps = 3,
          .callback =
              [&](const SamplerProgress& progress) {
                steps.push_back(progress.step);
                return true;
              },
          .evaluated =
              [&](const EvaluationReport& report) { evaluations.push_back(report.step_index); }});
  EXPECT_THAT(steps, testing::ElementsAre(0, 1, 2));
  EXPECT_THAT(evaluations, testing::ElementsAre(0, 1, 1, 2, 2));
}

TEST(Sample, EndsWhenACallbackSaysSoOrThrows) {
  auto guider = toy_guider(toy_model());
  sample(guider, kNoise, {.callback = [](const SamplerProgress& at) { return at.step < 2; }});
  EXPECT_EQ(guider.report().evaluations.size(), 3u);
  class Stop : public std::exception {};
  EXPECT_THROW(sample(guider, kNoise, {.evaluated = [](const EvaluationReport&) { throw Stop(); }}),
               Stop);
  EXPECT_EQ(guider.report().evaluations.size(), 1u);
  sample(guider, kNoise);
  EXPECT_EQ(guider.report().evaluations.size(), 20u) << "and works afterwards";
}

TEST(Sample, SaysWhatIsWrongInItsOwnName) {
  auto guider = toy_guider(toy_model());
  const auto refuses = [&](const torch::Tensor& noise, const SampleOptions& options,
                           const std::string& message) {
    EXPECT_THAT([&] { sample(guider, noise, options); },
                ThrowsMessage<c10::ValueError>(HasSubstr(message)));
  };
  refuses({}, {},
          "[sample] noise must have shape [images, channels, height, width], none of them "
          "0, got an undefined tensor.");
  refuses(kNoise, {.sampler = "elr"}, "got \"elr\"");
  refuses(kNoise, {.schedule = "karas"}, "got \"karas\"");
  refuses(kNoise, {.steps = 0}, "got 0");
  refuses(kNoise, {.sigmas = {1, 2}}, "sigmas must fall strictly");
  refuses(kNoise, {.latent = kNoise.slice(3, 1)},
          "[sample] latent must have the shape of noise, [2, 4, 16, 24]");
  EXPECT_THROW(sample(guider, kNoise.to(torch::kLong)), c10::TypeError);
  for (const char* sampler : {"euler", "ddim", "lcm"})
    refuses(kNoise, {.sampler = sampler, .seeds = {1}},
            "[sample] seeds must be one per image, 2, got 1.");
}

TEST(Sample, BringsEverythingToTheUNetsDevice) {
  const torch::Device device(torch::kCUDA);
  SAG_SKIP_WITHOUT_CUDA(device);
  CfgGuider guider({std::make_shared<test::ToyUNet>(device), ModelSampling::discrete()},
                   {toy_prompt(1)}, {toy_prompt(-1)}, {.cond_scale = 3});
  const auto samples = sample(
      guider, kNoise,
      {.sampler = "ddim", .steps = 3, .latent = kNoise, .denoise_mask = torch::ones({16, 24})});
  EXPECT_TRUE(samples.is_cuda());
}

}  // namespace
}  // namespace sag

// What a program sets for all of itself or for a thread does not reach into a run: the same seed
// gives the same picture.
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/sample.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using test::fill;
using test::max_diff;
using test::toy_prompt;

void set_default_dtype(torch::ScalarType dtype) {
  torch::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
}

// What a test sees of the process and the thread.
using Seen = std::tuple<torch::ScalarType, bool, bool, bool, bool, bool, int, bool>;

Seen seen() {
  const auto& context = at::globalContext();
  return {c10::typeMetaToScalarType(torch::get_default_dtype()),
          at::GradMode::is_enabled(),
          c10::InferenceMode::is_enabled(),
          at::autocast::is_autocast_enabled(torch::kCPU),
          context.deterministicAlgorithms(),
          context.deterministicAlgorithmsWarnOnly(),
          at::get_num_threads(),
          context.userEnabledMkldnn()};
}

torch::Tensor global_generator_state() {
  auto generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  return generator.get_state();
}

// A state, set while `run` runs.
struct State {
  const char* name;
  std::function<void(const std::function<void()>& run)> with;
};

State default_dtype(const char* name, torch::ScalarType dtype) {
  return {name, [dtype](const auto& run) {
            set_default_dtype(dtype);
            run();
            set_default_dtype(torch::kFloat);
          }};
}

std::vector<State> states() {
  return {default_dtype("default_dtype_double", torch::kDouble),
          default_dtype("default_dtype_half", torch::kHalf),
          default_dtype("default_dtype_bfloat16", torch::kBFloat16),
          {"grad_mode_off",
           [](const auto& run) {
             const torch::NoGradGuard no_grad;
             run();
           }},
          {"inference_mode",
           [](const auto& run) {
             const c10::InferenceMode inference;
             run();
           }},
          {"autocast",
           [](const auto& run) {
             at::autocast::set_autocast_enabled(torch::kCPU, true);
             run();
             at::autocast::set_autocast_enabled(torch::kCPU, false);
             at::autocast::clear_cache();
           }},
          {"deterministic_algorithms",
           [](const auto& run) {
             at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
             run();
             at::globalContext().setDeterministicAlgorithms(false, false);
           }},
          {"one_thread",
           [](const auto& run) {
             const auto threads = at::get_num_threads();
             at::set_num_threads(1);
             run();
             at::set_num_threads(threads);
           }},
          {"flush_denormal",
           [](const auto& run) {
             at::globalContext().setFlushDenormal(true);
             run();
             at::globalContext().setFlushDenormal(false);
           }},
          {"without_mkldnn",
           [](const auto& run) {
             at::globalContext().setUserEnabledMkldnn(false);
             run();
             at::globalContext().setUserEnabledMkldnn(true);
           }},
          {"global_seed", [](const auto& run) {
             torch::manual_seed(20261126);
             run();
           }}};
}

std::string state_name(const testing::TestParamInfo<State>& info) {
  return info.param.name;
}

// A network that autocast does not reach: what is left of autocast is the library's own.
class FixedUNet final : public UNet {
 public:
  torch::Tensor forward(const UNetInput& input) const override {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return toy_.forward(input);
  }
  std::vector<AttentionSiteInfo> attention_sites() const override { return toy_.attention_sites(); }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  test::ToyUNet toy_;
};

// Everything that draws or computes, from the noise to the latent: the start noise of the seeds, a
// sampler with its own noise, two negatives, and SAG.
torch::Tensor picture(std::string_view sampler, const ModelSampling& sampling, bool one_pass,
                      const std::vector<Conditioning>& negatives, const Conditioning& prompt) {
  const std::vector<std::uint64_t> seeds = {7, 9};
  const auto model = apply_self_attention_guidance({std::make_shared<FixedUNet>(), sampling},
                                                   {.scale = .75, .one_pass = one_pass});
  CfgGuider guider(model, {prompt}, negatives, {.cond_scale = 3});
  const auto noise = SeededNoise(seeds).draw({4, 16, 24}, torch::kCPU);
  auto latent =
      sample(guider, noise,
             {.sampler = std::string(sampler), .schedule = "simple", .steps = 4, .seeds = seeds});
  EXPECT_GT(guider.report().guided(), 0) << sampler;
  return latent;
}

class ProcessState : public testing::TestWithParam<State> {
 protected:
  void TearDown() override { EXPECT_EQ(seen(), before_); }

 private:
  const Seen before_ = seen();
};

TEST_P(ProcessState, ChangesNoPictureOfAnySampler) {
  auto second = toy_prompt(0.5);
  second.strength = 0.3;
  const std::vector<Conditioning> negatives = {toy_prompt(-1), second};
  const auto prompt = toy_prompt(1);
  for (const auto& sampling :
       {ModelSampling::discrete(), ModelSampling::flow({.shift = 2}), ModelSampling::edm({})})
    for (const auto sampler : sampler_names()) {
      const auto plain = picture(sampler, sampling, false, negatives, prompt);
      torch::Tensor here;
      GetParam().with([&] {
        const auto outside = seen();
        here = picture(sampler, sampling, false, negatives, prompt);
        EXPECT_EQ(seen(), outside) << sampler;
      });
      EXPECT_TRUE(here.equal(plain)) << sampler << ": " << max_diff(here, plain);
      EXPECT_EQ(here.scalar_type(), torch::kFloat);
      EXPECT_FALSE(here.requires_grad());
    }
}

TEST_P(ProcessState, ChangesNoPictureOfOnePassSag) {
  const std::vector<Conditioning> negatives = {toy_prompt(-1)};
  const auto prompt = toy_prompt(1);
  const auto sampling = ModelSampling::discrete();
  const auto plain = picture("euler_ancestral", sampling, true, negatives, prompt);
  GetParam().with([&] {
    EXPECT_TRUE(picture("euler_ancestral", sampling, true, negatives, prompt).equal(plain));
  });
}

TEST_P(ProcessState, ChangesNoNoise) {
  const std::vector<std::uint64_t> seeds = {7, 9};
  const auto x = torch::zeros({2, 4, 32, 32}, torch::kFloat);
  const auto draw = [&] {
    SeededNoise noise(seeds);
    const auto first = noise.draw({4, 32, 32}, torch::kCPU);
    return torch::stack({first, noise.draw({4, 32, 32}, torch::kCPU),
                         brownian_noise_sampler(seeds, x, 14.6)(10.0, 8.0)});
  };
  const auto plain = draw();
  GetParam().with([&] { EXPECT_TRUE(draw().equal(plain)); });
}

TEST_P(ProcessState, ChangesNoScheduleAndNoTable) {
  const auto numbers = [] {
    std::vector<double> all;
    for (const auto& sampling :
         {ModelSampling::discrete(Prediction::v, {.zero_terminal_snr = true}),
          ModelSampling::flow({.shift = 3}), ModelSampling::edm({})}) {
      all.insert(all.end(), sampling.sigmas().begin(), sampling.sigmas().end());
      for (const auto name : schedule_names()) {
        const auto sigmas = get_sigmas(name, sampling, 9);
        all.insert(all.end(), sigmas.begin(), sigmas.end());
      }
      all.push_back(sampling.percent_to_sigma(0.3));
      all.push_back(sampling.timestep(sampling.sigma_max()));
    }
    return all;
  };
  const auto plain = numbers();
  GetParam().with([&] { EXPECT_EQ(numbers(), plain); });
}

// A file's network in fp32; autocast is the caller's wish, and it reaches into a network.
TEST_P(ProcessState, ChangesNoPrecisionOfAFilesNetwork) {
  if (std::string(GetParam().name) == "autocast") GTEST_SKIP() << "a network obeys autocast";
  const auto context = fill({1, 10, 32}, .3, .2, 1);
  const auto noise = fill({1, 4, 16, 16}, .7, .3, 1);
  const auto draw = [&] {
    const auto unet = TorchScriptUNet::load(SAG_SOURCE_DIR "/tests/golden/comfy_sd15_tiny.ts");
    const auto model = apply_self_attention_guidance({unet, ModelSampling::discrete()});
    CfgGuider guider(model, {{.context = context}}, {{.context = -context}}, {.cond_scale = 3});
    auto latent = sample(guider, noise, {.sampler = "dpmpp_2m_sde", .steps = 2});
    EXPECT_EQ(guider.report().guided(), 2);
    return latent;
  };
  const auto plain = draw();
  GetParam().with([&] {
    const auto here = draw();
    // Another number of threads adds in another order.
    EXPECT_LT(max_diff(here, plain), 2e-5 * plain.abs().max().item<double>());
    EXPECT_EQ(here.scalar_type(), torch::kFloat);
  });
}

// What the caller set stays, also when a hook throws.
TEST_P(ProcessState, IsLeftAsItWasByAnException) {
  auto model =
      apply_self_attention_guidance({std::make_shared<FixedUNet>(), ModelSampling::discrete()});
  model.set_attn1_replace(
      [](const AttentionCall&, const Pass&, const NextAttention&) -> torch::Tensor {
        throw std::runtime_error("a hook's");
      },
      {"middle", 0, 0});
  const auto prompt = toy_prompt(1), negative = toy_prompt(-1);
  const auto noise = fill({1, 4, 16, 24}, .7, .3, 1);
  GetParam().with([&] {
    const auto outside = seen();
    CfgGuider guider(model, {prompt}, {negative}, {.cond_scale = 3});
    EXPECT_THROW(sample(guider, noise, {.sampler = "euler_ancestral"}), std::runtime_error);
    EXPECT_EQ(seen(), outside);
  });
}

INSTANTIATE_TEST_SUITE_P(Every, ProcessState, testing::ValuesIn(states()), state_name);

TEST(GlobalGenerator, IsNeitherReadNorAdvanced) {
  const std::vector<Conditioning> negatives = {toy_prompt(-1)};
  const auto prompt = toy_prompt(1);
  torch::manual_seed(3);
  const auto before = global_generator_state();
  for (const auto sampler : sampler_names())
    picture(sampler, ModelSampling::discrete(), false, negatives, prompt);
  EXPECT_TRUE(global_generator_state().equal(before));
}

TEST(GradMode, KeepsNoGraphOfParametersAndLatents) {
  const auto prompt = toy_prompt(1), negative = toy_prompt(-1);
  const auto x = fill({1, 4, 16, 24}, .7, .3, 6).requires_grad_();
  const auto model =
      apply_self_attention_guidance({std::make_shared<test::ToyUNet>(), ModelSampling::discrete()});
  CfgGuider guider(model, {{.context = prompt.context.clone().requires_grad_()}}, {negative},
                   {.cond_scale = 3});
  EXPECT_FALSE(guider(x, 4).requires_grad());
  EXPECT_FALSE(sample(guider, x, {.steps = 2}).requires_grad());
  EXPECT_FALSE(guider.report().evaluations.back().guidances.front().mask.requires_grad());
}

// Made in a caller's InferenceMode and used outside of it, and the other way round.
TEST(InferenceMode, DoesNotFollowAModelOutOfItsBlock) {
  std::shared_ptr<const UNet> unet;
  std::unique_ptr<CfgGuider> guider;
  const auto noise = fill({1, 4, 16, 16}, .7, .3, 1);
  {
    const c10::InferenceMode inference;
    const auto context = fill({1, 10, 32}, .3, .2, 1);
    unet = TorchScriptUNet::load(SAG_SOURCE_DIR "/tests/golden/comfy_sd15_tiny.ts");
    const auto model =
        apply_self_attention_guidance({unet, ModelSampling::discrete()}, {.one_pass = true});
    guider = std::make_unique<CfgGuider>(model, std::vector<Conditioning>{{.context = context}},
                                         std::vector<Conditioning>{{.context = -context}},
                                         CfgGuiderOptions{.cond_scale = 3});
    guider->begin_run({14, 5, 1, 0});
    (*guider)(noise * 14, 14);
  }
  // The step before was in the block.
  auto denoised = (*guider)(noise * 5, 5);
  EXPECT_EQ(guider->report().guided(), 2);
  denoised.mul_(2).requires_grad_();
  EXPECT_FALSE(denoised.is_inference());
}

}  // namespace
}  // namespace sag

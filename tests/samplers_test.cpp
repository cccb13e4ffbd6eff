#include "sag/samplers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include "sag/run_sampler.h"
#include "sag/schedules.h"
#include "support/toy.h"

namespace sag {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

torch::Tensor random(at::IntArrayRef shape, std::uint64_t seed) {
  return torch::randn(shape, at::detail::createCPUGenerator(seed), torch::kFloat64);
}

torch::Tensor scalar(double value) {
  return torch::full({1, 1, 1, 1}, value, torch::kFloat32);
}

NoiseSampler gaussian_noise(at::IntArrayRef shape, std::uint64_t seed) {
  return [shape = shape.vec(), generator = at::detail::createCPUGenerator(seed)](double, double) {
    return torch::randn(shape, generator, torch::kFloat64);
  };
}

// The ideal denoiser of data from N(mean, spread²): linear in x, so everything is known in closed
// form. Noisy latents are x0 + σ·n, or (1 − σ)·x0 + σ·n for flow.
struct GaussianData {
  double mean = 0.7, spread = 0.6;
  bool flow = false;

  double scale(double sigma) const { return flow ? 1 - sigma : 1.0; }
  double variance(double sigma) const { return std::pow(scale(sigma) * spread, 2) + sigma * sigma; }
  torch::Tensor operator()(const torch::Tensor& x, double sigma) const {
    const double gain = scale(sigma) * spread * spread / variance(sigma);
    return mean + gain * (x - scale(sigma) * mean);
  }
  // Where the sampling ODE takes x from sigma to sigma_end.
  torch::Tensor solution(const torch::Tensor& x, double sigma, double sigma_end) const {
    return scale(sigma_end) * mean +
           (x - scale(sigma) * mean) * std::sqrt(variance(sigma_end) / variance(sigma));
  }
};

// For CFG++ samplers: unguided, both predictions are the same.
DenoiseFunction unguided(const DenoiseFunction& model) {
  return [model](const torch::Tensor& x, double sigma) -> Denoised {
    const auto denoised = model(x, sigma).denoised;
    return {denoised, denoised};
  };
}

std::vector<double> without_zero(std::vector<double> sigmas) {
  sigmas.pop_back();
  return sigmas;
}

class EverySampler : public ::testing::TestWithParam<std::string_view> {
 protected:
  const Sampler sampler = get_sampler(GetParam());
  const std::vector<double> sigmas = {10, 4, 1.5, 0.5, 0};
  const torch::Tensor x = 10 * random({2, 4, 3, 5}, 1).to(torch::kFloat32);
  const DenoiseFunction model = unguided(GaussianData());
};

INSTANTIATE_TEST_SUITE_P(Samplers, EverySampler, testing::ValuesIn(sampler_names()),
                         [](const auto& info) { return std::string(info.param); });

Denoised scalar_model(const torch::Tensor& x, double sigma) {
  const auto denoised = 0.3 * x / (1 + sigma) + 0.1;
  return {denoised, 0.9 * denoised};
}

// One step of the reference's UniPC leaves x where it was.
bool is_faulty(const nlohmann::json& entry) {
  const std::string name = entry["params"]["sampler"];
  return name.starts_with("uni_pc") && entry["params"]["sigmas"].size() == 2;
}

TEST_P(EverySampler, GivesTheReferencesNumbers) {
  int compared = 0;
  for (const auto& entry : test::toy_entries("scalar_sampler")) {
    const auto& params = entry["params"];
    if (params["sampler"] != GetParam() || is_faulty(entry)) continue;
    const auto samples =
        sampler(scalar_model, scalar(params["x0"]), params["sigmas"].get<std::vector<double>>(),
                {.noise_sampler = [](double, double) { return scalar(0.5); },
                 .flow = params["convention"] == "CONST"});
    EXPECT_NEAR(samples.item<double>(), entry["value"], entry["tolerance"]) << params;
    ++compared;
  }
  EXPECT_GE(compared, 2);
}

TEST_P(EverySampler, AsksTheModelAsOftenAsTheReference) {
  for (const auto& entry : test::toy_entries("denoiser_calls")) {
    if (entry["params"]["sampler"] != GetParam()) continue;
    int calls = 0;
    const auto counting = [&](const torch::Tensor& x_in, double sigma) {
      ++calls;
      return model(x_in, sigma);
    };
    sampler(counting, x, get_sigmas_karras(10, 0.03, 14.6), {});
    EXPECT_EQ(calls, entry["value"]);
  }
}

TEST_P(EverySampler, AsksTheModelWithinTheSigmas) {
  const auto checking = [&](const torch::Tensor& x_in, double sigma) {
    EXPECT_GT(sigma, 0);
    EXPECT_LE(sigma, sigmas.front());
    EXPECT_FALSE(at::GradMode::is_enabled());
    return model(x_in, sigma);
  };
  sampler(checking, x, sigmas, {});
  EXPECT_TRUE(at::GradMode::is_enabled());
}

TEST_P(EverySampler, ReportsEachStep) {
  std::vector<torch::Tensor> latents;
  const auto callback = [&](const SamplerProgress& progress) {
    EXPECT_EQ(progress.step, static_cast<std::int64_t>(latents.size()));
    EXPECT_EQ(progress.steps, 4);
    EXPECT_EQ(progress.sigma, sigmas[progress.step]);
    EXPECT_TRUE(progress.denoised.equal(model(progress.x, progress.sigma).denoised));
    latents.push_back(progress.x);
    return true;
  };
  sampler(model, x, sigmas, {.callback = callback});
  ASSERT_EQ(latents.size(), 4u);
  EXPECT_TRUE(latents[0].equal(x));
}

TEST_P(EverySampler, ReturnsThePredictionWhenTheCallbackEndsTheRun) {
  torch::Tensor last;
  int calls = 0;
  const auto callback = [&](const SamplerProgress& progress) {
    ++calls;
    last = progress.denoised;
    return progress.step < 2;
  };
  const auto samples = sampler(model, x, sigmas, {.callback = callback});
  EXPECT_EQ(calls, 3);
  EXPECT_TRUE(samples.equal(last));
}

TEST_P(EverySampler, LeavesTheGivenLatentAlone) {
  const auto before = x.clone();
  sampler(model, x, sigmas, {});
  EXPECT_TRUE(x.equal(before));
}

TEST_P(EverySampler, MayStopAboveZero) {
  const std::vector<double> partial = {10, 4, 1.5};
  EXPECT_TRUE(sampler(model, x, partial, {}).isfinite().all().item<bool>());
}

TEST_P(EverySampler, OneImageDoesNotDependOnTheRestOfItsBatch) {
  const auto batch = sampler(model, x, sigmas, {});
  const auto alone = sampler(model, x.slice(0, 0, 1), sigmas, {});
  EXPECT_TRUE(batch.slice(0, 0, 1).equal(alone));
}

TEST_P(EverySampler, ComputesInFp32AtLeast) {
  for (const auto& [given, computed] :
       {std::pair{torch::kFloat16, torch::kFloat32}, std::pair{torch::kBFloat16, torch::kFloat32},
        std::pair{torch::kFloat32, torch::kFloat32}, std::pair{torch::kFloat64, torch::kFloat64}}) {
    const auto half_model = [&, computed = computed](const torch::Tensor& x_in, double sigma) {
      EXPECT_EQ(x_in.scalar_type(), computed);
      const auto [denoised, uncond_denoised] = model(x_in, sigma);
      return Denoised(denoised.to(torch::kFloat16), uncond_denoised.to(torch::kFloat16));
    };
    EXPECT_EQ(sampler(half_model, x.to(given), sigmas, {}).scalar_type(), computed);
  }
}

TEST_P(EverySampler, RefusesSigmasThatAreNone) {
  const auto with = [&](std::vector<double> bad) {
    return [=, this] { sampler(model, x, bad, {}); };
  };
  const std::string caller = "[sample_" + std::string(GetParam()) + "] ";
  const auto says = [&](const char* what) {
    return ThrowsMessage<c10::ValueError>(HasSubstr(caller + what));
  };
  EXPECT_THAT(with({}), says("there must be at least two sigmas, got 0."));
  EXPECT_THAT(with({1.0}), says("there must be at least two sigmas, got 1."));
  EXPECT_THAT(with({1.0, 2.0, 0.0}), says("sigmas must fall strictly, got 2 at 1 after 1."));
  EXPECT_THAT(with({1.0, 1.0}), says("sigmas must fall strictly"));
  EXPECT_THAT(with({1.0, -1.0}),
              says("sigmas must be finite and positive, the last one may be 0, got -1 at 1."));
  EXPECT_THAT(with({1.0, 0.0, 0.0}), says("sigmas must be finite and positive"));
  EXPECT_THAT(with({1.0, kNan, 0.0}), says("sigmas must be finite and positive"));
  EXPECT_THAT(with({kInfinity, 1.0}), says("sigmas must be finite and positive"));
}

TEST_P(EverySampler, RefusesLatentsThatAreNone) {
  EXPECT_THROW(sampler(model, {}, sigmas, {}), c10::ValueError);
  EXPECT_THAT([&] { sampler(model, x[0], sigmas, {}); },
              ThrowsMessage<c10::ValueError>(
                  HasSubstr("x must have shape [images, channels, height, width], none of them 0, "
                            "got [4, 3, 5].")));
  EXPECT_THROW(sampler(model, x.to(torch::kInt64), sigmas, {}), c10::TypeError);
  EXPECT_THROW(sampler(nullptr, x, sigmas, {}), c10::ValueError);
}

TEST_P(EverySampler, RefusesPredictionsOfAnotherShape) {
  const auto wrong =
      unguided([](const torch::Tensor& x_in, double) { return x_in.slice(0, 0, 1); });
  EXPECT_THAT([&] { sampler(wrong, x, sigmas, {}); },
              ThrowsMessage<c10::ValueError>(
                  HasSubstr("model must return the shape of x, [2, 4, 3, 5], got [1, 4, 3, 5].")));
}

TEST_P(EverySampler, LetsTheModelsErrorsThrough) {
  const auto failing = [](const torch::Tensor&, double) -> torch::Tensor {
    throw std::domain_error("out of memory");
  };
  EXPECT_THROW(sampler(failing, x, sigmas, {}), std::domain_error);
}

struct Convergence {
  std::string_view sampler;
  double order;
  // Enough for the order to show, and too few for fp32 rounding to show.
  std::int64_t steps = 200;
};

void PrintTo(const Convergence& convergence, std::ostream* out) {
  *out << convergence.sampler;
}

class ConvergingSampler : public ::testing::TestWithParam<std::tuple<Convergence, bool>> {};

// Samplers that start with a first-order step are of second order at best. eta 0 makes ODE solvers
// of the stochastic ones. ipndm_v's third-order term is right only for even steps, as in the
// reference; uni_pc's λ is rounded to fp32, also as in the reference.
INSTANTIATE_TEST_SUITE_P(
    Samplers, ConvergingSampler,
    testing::Combine(
        testing::Values(Convergence{"euler", 1}, Convergence{"ddim", 1}, Convergence{"heun", 2},
                        Convergence{"heunpp2", 1}, Convergence{"dpm_2", 2}, Convergence{"lms", 2},
                        Convergence{"ipndm", 2}, Convergence{"ipndm_v", 1.5},
                        Convergence{"deis", 2}, Convergence{"dpmpp_2m", 2},
                        Convergence{"res_multistep", 2}, Convergence{"gradient_estimation", 1},
                        Convergence{"uni_pc", 1.7, 30}, Convergence{"uni_pc_bh2", 1.7, 30},
                        Convergence{"euler_ancestral", 1}, Convergence{"dpm_2_ancestral", 2},
                        Convergence{"dpmpp_2s_ancestral", 2}, Convergence{"dpmpp_sde", 2},
                        Convergence{"dpmpp_2m_sde", 2}, Convergence{"dpmpp_2m_sde_heun", 2},
                        Convergence{"dpmpp_3m_sde", 2}, Convergence{"euler_cfg_pp", 1},
                        Convergence{"euler_ancestral_cfg_pp", 1},
                        Convergence{"gradient_estimation_cfg_pp", 1}),
        testing::Values(false, true)),
    [](const auto& info) {
      return std::string(std::get<0>(info.param).sampler) +
             (std::get<1>(info.param) ? "_flow" : "_eps");
    });

TEST_P(ConvergingSampler, ApproachesTheExactSolutionWithItsOrder) {
  const auto& [convergence, flow] = GetParam();
  const auto& [name, order, steps] = convergence;
  const GaussianData data = {.flow = flow};
  const auto x = (flow ? 1 : 10) * random({1, 1, 4, 4}, 1);
  const auto error = [&, name = name, flow = flow](std::int64_t n) {
    const auto sigmas = without_zero(get_sigmas_karras(n + 1, 0.05, flow ? 0.99 : 10.0));
    const auto samples = get_sampler(name)(unguided(data), x, sigmas, {.eta = 0, .flow = flow});
    const auto exact = data.solution(x, sigmas.front(), sigmas.back());
    return (samples - exact).abs().max().item<double>();
  };
  EXPECT_GT(std::log2(error(steps) / error(2 * steps)), order - 0.15);
}

// Samplers that add noise, whose results must have the data's distribution.
class StochasticSampler : public ::testing::TestWithParam<std::tuple<std::string_view, bool>> {
 protected:
  const Sampler sampler = get_sampler(std::get<0>(GetParam()));
  const bool flow = std::get<1>(GetParam());
  // Standard error of a variance: 0.3 %.
  const std::vector<std::int64_t> shape = {1, 4, 256, 256};

  torch::Tensor start(const GaussianData& data, double sigma) const {
    return data.scale(sigma) * data.mean + std::sqrt(data.variance(sigma)) * random(shape, 1);
  }
  torch::Tensor run(const GaussianData& data, std::span<const double> sigmas,
                    double eta = 1.0) const {
    return sampler(unguided(data), start(data, sigmas.front()), sigmas,
                   {.noise_sampler = gaussian_noise(shape, 2), .eta = eta, .flow = flow});
  }
};

constexpr std::array<std::string_view, 9> kStochastic = {
    "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral",
    "dpmpp_sde",       "dpmpp_2m_sde",    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",    "er_sde",          "euler_ancestral_cfg_pp"};

INSTANTIATE_TEST_SUITE_P(Samplers, StochasticSampler,
                         testing::Combine(testing::ValuesIn(kStochastic),
                                          testing::Values(false, true)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) +
                                  (std::get<1>(info.param) ? "_flow" : "_eps");
                         });

TEST_P(StochasticSampler, KeepsTheVarianceOfNoiseAroundOneImage) {
  const GaussianData data = {.spread = 0.0, .flow = flow};
  // Exact at any step width.
  const std::vector<double> sigmas = {0.9, 0.6, 0.5, 0.2};
  for (const double eta : {0.0, 0.5, 1.0}) {
    const auto samples = run(data, sigmas, eta);
    EXPECT_NEAR(samples.mean().item<double>(), data.scale(0.2) * data.mean, 2e-3) << eta;
    EXPECT_NEAR(samples.var().item<double>() / (0.2 * 0.2), 1.0, 0.015) << eta;
  }
}

TEST_P(StochasticSampler, KeepsTheDistributionOfTheData) {
  const GaussianData data = {.flow = flow};
  const auto samples = run(data, get_sigmas_karras(200, 0.01, flow ? 0.999 : 10.0));
  EXPECT_NEAR(samples.mean().item<double>(), data.mean, 0.01);
  EXPECT_NEAR(samples.var().item<double>() / (data.spread * data.spread), 1.0, 0.05);
}

TEST(EulerAncestral, IsEulerWithoutFreshNoise) {
  for (const bool flow : {false, true}) {
    const GaussianData data = {.flow = flow};
    const std::vector<double> sigmas = {0.9, 0.6, 0.5, 0.2, 0.0};
    const auto x = random({1, 4, 8, 8}, 1);
    EXPECT_TRUE(sample_euler_ancestral(data, x, sigmas, {.eta = 0, .flow = flow})
                    .allclose(sample_euler(data, x, sigmas)));
  }
}

// More steps follow the same Brownian path in finer detail, so pictures of one seed converge.
class BrownianSampler : public ::testing::TestWithParam<std::string_view> {};

INSTANTIATE_TEST_SUITE_P(Samplers, BrownianSampler,
                         testing::Values("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
                                         "dpmpp_3m_sde"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(BrownianSampler, DrawsTheSamePictureWithMoreSteps) {
  const auto x = 10 * random({2, 1, 16, 16}, 1);
  const auto picture = [&](std::int64_t steps) {
    return get_sampler(GetParam())(GaussianData(), x, get_sigmas_karras(steps, 0.03, 10.0),
                                   {.seeds = {5, 6}});
  };
  const auto fine = picture(400);
  const auto distance = [&](const torch::Tensor& other) {
    return (other - fine).square().mean().sqrt().item<double>();
  };
  const double coarse = distance(picture(20)), middle = distance(picture(100));
  EXPECT_LT(middle, coarse / 2);
  // The spread of the data is 0.6.
  EXPECT_LT(middle, 0.05);
}

TEST_P(BrownianSampler, ImagesDependOnTheirSeedAlone) {
  const auto x = 10 * random({3, 1, 8, 8}, 1);
  const auto sigmas = get_sigmas_karras(6, 0.03, 10.0);
  const auto sampler = get_sampler(GetParam());
  const auto batch = sampler(GaussianData(), x, sigmas, {.seeds = {4, 9, 4}});
  const auto alone = sampler(GaussianData(), x.slice(0, 1, 2), sigmas, {.seeds = {9}});
  EXPECT_TRUE(batch.slice(0, 1, 2).equal(alone));
  EXPECT_FALSE(batch[0].equal(sampler(GaussianData(), x, sigmas, {.seeds = {5, 9, 4}})[0]));
}

TEST(EulerAncestral, DrawsNewNoiseAtEachStepButTheLast) {
  std::vector<std::pair<double, double>> drawn;
  const auto noise_sampler = [&](double sigma, double sigma_next) {
    drawn.emplace_back(sigma, sigma_next);
    return scalar(0.5);
  };
  const std::vector<double> sigmas = {4, 2, 1, 0};
  sample_euler_ancestral(GaussianData(), scalar(1), sigmas, {.noise_sampler = noise_sampler});
  EXPECT_EQ(drawn, (std::vector<std::pair<double, double>>{{4, 2}, {2, 1}}));
  drawn.clear();
  sample_euler_ancestral(GaussianData(), scalar(1), sigmas,
                         {.noise_sampler = noise_sampler, .s_noise = 0});
  EXPECT_TRUE(drawn.empty());
}

TEST(EulerAncestral, DefaultNoiseIsNotTheStartNoise) {
  const std::vector<std::uint64_t> seeds = {0, 1};
  const auto noise = std::make_shared<SeededNoise>(seeds);
  const auto x = 4 * noise->draw({4, 8, 8}, torch::kCPU);
  const std::vector<double> sigmas = {4, 2, 1, 0};
  const auto by_default = sample_euler_ancestral(GaussianData(), x, sigmas);
  const auto continued = sample_euler_ancestral(GaussianData(), x, sigmas,
                                                {.noise_sampler = seeded_noise_sampler(noise, x)});
  EXPECT_TRUE(by_default.equal(continued));
}

TEST(EulerAncestral, RefusesOptionsOutOfRange) {
  const auto with = [](SamplerOptions options) {
    return [=] {
      sample_euler_ancestral(GaussianData(), scalar(1), std::vector<double>{4, 2, 0}, options);
    };
  };
  EXPECT_THAT(with({.eta = 1.5}),
              ThrowsMessage<c10::ValueError>(HasSubstr("eta must be in [0, 1]")));
  EXPECT_THROW(with({.eta = kNan})(), c10::ValueError);
  EXPECT_THROW(with({.s_noise = -1})(), c10::ValueError);
  EXPECT_THAT(with({.flow = true}),
              ThrowsMessage<c10::ValueError>(HasSubstr("must be <= 1, got 4")));
  EXPECT_THAT(
      with({.noise_sampler =
                [](double, double) {
                  return torch::zeros({2, 1, 1, 1});
                }}),
      ThrowsMessage<c10::ValueError>(HasSubstr("noise_sampler must return the shape of x")));
}

TEST(SamplerParity, OneStepOfUniPcReachesThePrediction) {
  for (const auto sampler : {sample_uni_pc, sample_uni_pc_bh2}) {
    const auto x = scalar(10);
    const auto samples = sampler(scalar_model, x, std::vector<double>{10, 0}, {});
    // It ends at 0.001.
    EXPECT_TRUE(samples.allclose(scalar_model(x, 10).denoised, 0, 2e-3));
  }
}

TEST(SamplerParity, SigmasOfTheCallerStayAsTheyWere) {
  const std::vector<double> sigmas = {10, 4, 1.5, 0.5, 0};
  auto given = sigmas;
  sample_uni_pc(scalar_model, scalar(10), given, {});
  EXPECT_EQ(given, sigmas);
  const std::vector<double> flow_sigmas = {1, 0.5, 0};
  given = flow_sigmas;
  sample_dpmpp_2m_sde(scalar_model, scalar(1), given, {.flow = true});
  EXPECT_EQ(given, flow_sigmas);
}

TEST(SamplerParity, SdeSamplersOfFlowModelsStartBelowOne) {
  for (const double shift : {1.0, 3.0}) {
    double first = 0;
    const auto model = [&](const torch::Tensor& x, double sigma) {
      if (first == 0) first = sigma;
      return 0.3 * x;
    };
    run_sampler(sample_dpmpp_2m_sde, model, ModelSampling::flow({.shift = shift}), scalar(1),
                std::vector<double>{1, 0.5, 0});
    EXPECT_DOUBLE_EQ(first, ModelSampling::flow({.shift = shift}).percent_to_sigma(1e-4));
  }
}

TEST(SamplerParity, UniPcOfAFlowModelIsScaledForWhereItEnds) {
  // The reference writes 0.001 into the schedule, and so undoes the scaling for 0.001.
  const auto constant = [](const torch::Tensor& x, double) { return torch::ones_like(x); };
  const auto samples = run_sampler(sample_uni_pc, constant, ModelSampling::flow({}), scalar(2),
                                   std::vector<double>{1, .75, .5, .25, 0});
  // (1 − σ)·x0 + σ·n, as the prediction never changes.
  const double ended = 0.999 * 1 + 0.001 * 2;
  // λ is fp32, as in the reference. Without the scaling the difference would be 1e-3.
  EXPECT_NEAR(samples.item<double>(), ended / 0.999, 5e-5);
}

TEST(UniPc, IsFiniteAtTheSmallestSigmas) {
  const std::vector<std::vector<double>> tiny = {
      {1, 3e-4, 1e-4, 0}, {1, 1e-4, 0}, {1, 1e-4, 5e-5, 0}};
  for (const auto& sigmas : tiny)
    EXPECT_TRUE(sample_uni_pc(scalar_model, scalar(1), sigmas, {}).isfinite().all().item<bool>());
}

TEST(UniPc, TakesSigmasThatFp32CannotTellApart) {
  const auto sampling = ModelSampling::flow({});
  const auto sigmas = get_sigmas("exponential", sampling, 180);
  const auto constant = [](const torch::Tensor& x, double) { return torch::ones_like(x); };
  for (const auto sampler : {sample_uni_pc, sample_uni_pc_bh2}) {
    const auto samples = sampler(constant, scalar(2), sigmas, {});
    const double end = std::min(0.001, sigmas[sigmas.size() - 2] / 2);
    EXPECT_NEAR(samples.item<double>(), 1 + end, 1e-4);
  }
}

// The predictions around a corrector differ, however close their sigmas.
TEST(UniPc, IsNotLedAstrayBySigmasThatLieClose) {
  const GaussianData model{.mean = 0, .spread = 1};
  const auto sigmas = get_sigmas_karras(20, 0.03, 14.6);
  const auto x = scalar(1) * sigmas[0];
  for (const auto sampler : {sample_uni_pc, sample_uni_pc_bh2}) {
    const double expected = sampler(model, x, sigmas, {}).item<double>();
    for (const double gap : {1e-3, 1e-4, 1e-6, 1e-9, 1e-12}) {
      for (const int at : {1, 10, 18}) {
        auto close = sigmas;
        close.insert(close.begin() + at + 1, sigmas[static_cast<std::size_t>(at)] * (1 - gap));
        EXPECT_NEAR(sampler(model, x, close, {}).item<double>(), expected, 5e-3 * expected) << gap;
      }
    }
  }
}

TEST(SamplerParity, UniPcOfAFlowModelIsScaledForWhereItReallyEnds) {
  const auto constant = [](const torch::Tensor& x, double) { return torch::ones_like(x); };
  const auto samples = run_sampler(sample_uni_pc, constant, ModelSampling::flow({}), scalar(2),
                                   std::vector<double>{1, .5, .001, 0});
  const double end = 0.0005, ended = (1 - end) * 1 + end * 2;
  EXPECT_NEAR(samples.item<double>(), ended / (1 - end), 5e-5);
}

TEST(FlowSamplers, NameTheSigmaThatTheyCannotStartAt) {
  const auto with = [](std::vector<double> sigmas) {
    return [=] { sample_dpmpp_2m_sde(scalar_model, scalar(1), sigmas, {.flow = true}); };
  };
  EXPECT_THAT(with({5, .5, 0}), ThrowsMessage<c10::ValueError>(HasSubstr("must be <= 1, got 5")));
  EXPECT_THAT(with({1, .99995, 0}),
              ThrowsMessage<c10::ValueError>(HasSubstr("second sigma must be below 0.9999")));
}

TEST(CfgPlusPlus, NeedsBothPredictions) {
  for (const auto name : sampler_names()) {
    const auto alone = [](const torch::Tensor& x, double) { return 0.3 * x; };
    const auto run = [&] { get_sampler(name)(alone, scalar(1), std::vector<double>{4, 1, 0}, {}); };
    if (!sampler_info(name).needs_uncond) {
      EXPECT_NO_THROW(run()) << name;
      continue;
    }
    EXPECT_THAT(run, ThrowsMessage<c10::ValueError>(HasSubstr("must return uncond_denoised too")))
        << name;
  }
}

TEST(GetSampler, FindsEveryName) {
  for (const auto name : sampler_names()) EXPECT_NE(get_sampler(name), nullptr) << name;
  EXPECT_EQ(get_sampler("heun"), &sample_heun);
}

TEST(GetSampler, ListsTheKnownNamesForAnUnknownOne) {
  EXPECT_THAT([] { get_sampler("plms"); },
              ThrowsMessage<c10::ValueError>(HasSubstr(
                  "[sampler_info] name must be one of euler, euler_cfg_pp, euler_ancestral, ")));
  EXPECT_THAT([] { get_sampler("plms"); },
              ThrowsMessage<c10::ValueError>(HasSubstr(", uni_pc, uni_pc_bh2, got \"plms\".")));
}

class RunSampler : public ::testing::Test {
 protected:
  const std::vector<std::int64_t> shape = {2, 4, 6, 8};
  const torch::Tensor noise = random(shape, 1).to(torch::kFloat32);
  const torch::Tensor latent = random(shape, 2).to(torch::kFloat32);
  const ModelSampling eps = ModelSampling::discrete();
  const ModelSampling flow = ModelSampling::flow({});
  torch::Tensor first_x;
  // A model that always predicts the same image.
  const DenoiseFunction model = [this](const torch::Tensor& x, double) {
    if (!first_x.defined()) first_x = x;
    return torch::full_like(x, 0.5);
  };

  torch::Tensor run(const ModelSampling& sampling, std::vector<double> sigmas,
                    const RunSamplerOptions& options = {}) {
    first_x.reset();
    return run_sampler(sample_euler, model, sampling, noise, sigmas, options);
  }
};

TEST_F(RunSampler, StartsFromTheNoisedLatent) {
  run(eps, {10, 1, 0}, {.latent = latent});
  EXPECT_TRUE(first_x.allclose(10 * noise + latent));
  run(flow, {0.75, 0.5, 0}, {.latent = latent});
  EXPECT_TRUE(first_x.allclose(0.75 * noise + 0.25 * latent));
}

TEST_F(RunSampler, StartsFromZerosWithoutALatent) {
  run(eps, {10, 1, 0});
  EXPECT_TRUE(first_x.allclose(10 * noise));
}

TEST_F(RunSampler, StartsWithTheWholeVarianceAtTheHighestSigma) {
  const double sigma_max = eps.sigma_max();
  for (const auto& [sigma, whole] :
       {std::pair{sigma_max, true}, std::pair{sigma_max * (1 - 0.9e-5), true},
        std::pair{sigma_max * (1 - 1.1e-5), false}, std::pair{20.0, true}}) {
    run(eps, {sigma, 1, 0});
    const double expected = whole ? std::sqrt(1 + sigma * sigma) : sigma;
    const double scale = (first_x / noise).mean().item<double>();
    EXPECT_NEAR(scale, expected, 1e-5 * expected) << sigma;
  }
}

TEST_F(RunSampler, UndoesTheScalingOfAFlowRunThatStopsEarly) {
  const auto samples = run(flow, {0.75, 0.5}, {.latent = latent});
  const auto x = 0.75 * noise + 0.25 * latent;
  const auto stopped = x + (x - 0.5) / 0.75 * (0.5 - 0.75);
  EXPECT_TRUE(samples.allclose(stopped / 0.5, 1e-5, 1e-6));
}

TEST_F(RunSampler, ReturnsThePredictionUnscaledWhenTheCallbackEndsTheRun) {
  const auto stop = [](const SamplerProgress&) { return false; };
  const auto samples = run(flow, {0.75, 0.5}, {.sampler = {.callback = stop}});
  EXPECT_TRUE(samples.equal(torch::full_like(noise, 0.5)));
}

TEST_F(RunSampler, TellsTheSamplerWhetherTheModelIsFlow) {
  const Sampler sampler = [](const DenoiseFunction&, torch::Tensor x, std::span<const double>,
                             const SamplerOptions& options) {
    return torch::full_like(x, options.flow ? 1.0 : 0.0);
  };
  const std::vector<double> sigmas = {0.75, 0};
  EXPECT_EQ(run_sampler(sampler, model, flow, noise, sigmas).mean().item<double>(), 1.0);
  EXPECT_EQ(run_sampler(sampler, model, eps, noise, sigmas, {.sampler = {.flow = true}})
                .mean()
                .item<double>(),
            0.0);
}

TEST_F(RunSampler, RepaintsOnlyWhereTheMaskIsOne) {
  auto mask = torch::zeros({6, 8});
  mask.slice(1, 4).fill_(1.0);
  for (const auto& given :
       {mask, mask.reshape({1, 1, 6, 8}), mask.expand({2, 1, 6, 8}), mask.to(torch::kBool)}) {
    for (const auto name : sampler_names()) {
      // uni_pc ends at 0.001.
      const double tolerance = name.starts_with("uni_pc") ? 5e-3 : 2e-5;
      const auto samples =
          run_sampler(get_sampler(name), unguided(model), eps, noise, get_sigmas("karras", eps, 5),
                      {.latent = latent, .denoise_mask = given});
      EXPECT_TRUE(samples.slice(3, 0, 4).allclose(latent.slice(3, 0, 4), tolerance, tolerance))
          << name;
      EXPECT_NEAR(samples.slice(3, 4).mean().item<double>(), 0.5, tolerance) << name;
    }
  }
}

TEST_F(RunSampler, RefusesTensorsOfTheWrongSize) {
  const auto with = [this](RunSamplerOptions options) {
    return [=, this] { run(eps, {1, 0}, options); };
  };
  EXPECT_THAT(
      with({.latent = latent.slice(3, 1)}),
      ThrowsMessage<c10::ValueError>(HasSubstr(
          "[run_sampler] latent must have the shape of noise, [2, 4, 6, 8], got [2, 4, 6, 7].")));
  for (const auto& mask_shape : std::vector<std::vector<std::int64_t>>{
           {8, 6}, {6}, {1, 6, 8}, {3, 1, 6, 8}, {2, 4, 6, 8}, {1, 1, 3, 4}}) {
    EXPECT_THAT(with({.denoise_mask = torch::ones(mask_shape)}),
                ThrowsMessage<c10::ValueError>(HasSubstr(
                    "[run_sampler] denoise_mask must be [6, 8] or [2 or 1, 1, 6, 8], got")));
  }
  EXPECT_THROW(run_sampler(sample_euler, model, eps, noise[0], std::vector<double>{1, 0}),
               c10::ValueError);
}

TEST_F(RunSampler, RefusesNanAndInfinity) {
  for (const double bad : {kNan, kInfinity}) {
    auto broken = latent.clone();
    broken[1][2][3][4] = bad;
    auto mask = torch::ones({6, 8});
    mask[0][0] = bad;
    const std::vector<double> sigmas = {1, 0};
    EXPECT_THAT([&] { run_sampler(sample_euler, model, eps, broken, sigmas); },
                ThrowsMessage<c10::ValueError>(HasSubstr("[run_sampler] noise must be finite")));
    EXPECT_THAT([&] { run(eps, sigmas, {.latent = broken}); },
                ThrowsMessage<c10::ValueError>(HasSubstr("[run_sampler] latent must be finite")));
    EXPECT_THAT(
        [&] { run(eps, sigmas, {.denoise_mask = mask}); },
        ThrowsMessage<c10::ValueError>(HasSubstr("[run_sampler] denoise_mask must be finite")));
  }
}

TEST_F(RunSampler, RefusesToReturnNanAndInfinity) {
  for (const double bad : {kNan, kInfinity}) {
    const auto failing = [bad](const torch::Tensor& x, double) { return torch::full_like(x, bad); };
    EXPECT_THAT(
        [&] {
          run_sampler(sample_euler, failing, eps, noise, std::vector<double>{1, 0});
        },
        ThrowsMessage<c10::Error>(HasSubstr("[run_sampler] the final latent must be finite")));
  }
}

TEST_F(RunSampler, NoisesTheKeptPartAsItIsTold) {
  const auto other = random(shape, 3).to(torch::kFloat32);
  const auto mask = torch::zeros({6, 8});
  run(eps, {2, 1, 0}, {.latent = latent, .denoise_mask = mask, .inpaint_noise = other});
  EXPECT_TRUE(first_x.allclose(2 * other + latent));
}

TEST_F(RunSampler, RefusesMasksOutOfRangeAndIntegers) {
  EXPECT_THAT(
      [&] {
        run(eps, {1, 0}, {.denoise_mask = torch::full({6, 8}, 255.0)});
      },
      ThrowsMessage<c10::ValueError>(HasSubstr("between 0 and 1, got 255 to 255")));
  const auto integers = torch::ones({6, 8}, torch::kInt64);
  EXPECT_THROW(run(eps, {1, 0}, {.denoise_mask = integers}), c10::TypeError);
  EXPECT_THROW(run(eps, {1, 0}, {.latent = torch::ones(shape, torch::kInt64)}), c10::TypeError);
  EXPECT_THROW(run_sampler(nullptr, model, eps, noise, std::vector<double>{1, 0}), c10::ValueError);
  EXPECT_THAT(
      [&] { run(eps, {}); },
      ThrowsMessage<c10::ValueError>(HasSubstr("[run_sampler] there must be at least two sigmas")));
}

}  // namespace
}  // namespace sag

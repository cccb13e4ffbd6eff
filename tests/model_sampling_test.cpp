#include "sag/model_sampling.h"

#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/toy.h"

namespace sag {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct NamedSampling {
  const char* name;
  ModelSampling sampling;
  std::vector<double> sigmas;
};

std::vector<NamedSampling> every_sampling() {
  const std::vector<double> sigmas = {0.03, 0.5, 1.0, 4.0, 14.6};
  return {{"eps", ModelSampling::discrete(), sigmas},
          {"v", ModelSampling::discrete(Prediction::v), sigmas},
          {"x0", ModelSampling::discrete(Prediction::x0), sigmas},
          {"edm", ModelSampling::edm({}), sigmas},
          {"flow", ModelSampling::flow({.shift = 3.0}), {0.003, 0.25, 0.75, 1.0}}};
}

torch::Tensor random(std::uint64_t seed) {
  return torch::randn({2, 4, 3, 5}, at::detail::createCPUGenerator(seed), torch::kFloat64);
}

// The output of a perfect UNet with this prediction, from the papers' definitions.
torch::Tensor exact_output(Prediction prediction, double sigma, const torch::Tensor& x0,
                           const torch::Tensor& noise) {
  const double sigma_data = EdmSamplingOptions().sigma_data;
  switch (prediction) {
    case Prediction::eps:
      return noise;
    case Prediction::v:
      return (noise - sigma * x0) / std::hypot(1.0, sigma);
    case Prediction::x0:
      return x0;
    case Prediction::edm:
      return (sigma * x0 - sigma_data * sigma_data * noise) /
             (sigma_data * std::hypot(sigma, sigma_data));
    case Prediction::flow:
      return noise - x0;
  }
  return {};
}

double max_difference(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(Prediction, RoundTripsEveryName) {
  for (const auto* name : {"eps", "v", "x0", "edm", "flow"}) {
    EXPECT_EQ(to_string(parse_prediction(name)), name);
  }
}

TEST(Prediction, ListsTheKnownNamesForAnUnknownOne) {
  EXPECT_THAT([] { parse_prediction("epsilon"); },
              ThrowsMessage<c10::ValueError>(
                  HasSubstr("[parse_prediction] name must be one of eps, v, x0, edm, flow, got "
                            "\"epsilon\".")));
}

TEST(ModelSampling, HasStableDiffusionsTable) {
  const auto sampling = ModelSampling::discrete();
  EXPECT_EQ(sampling.sigmas().size(), 1000u);
  for (const auto& entry : test::toy_entries("sigma_table")) {
    if (entry["what"] != "SD sigma table: min, max") continue;
    EXPECT_EQ(sampling.sigma_min(), entry["value"][0].get<double>());
    EXPECT_EQ(sampling.sigma_max(), entry["value"][1].get<double>());
  }
}

TEST(ModelSampling, FindsTheReferencesTimesteps) {
  const auto sampling = ModelSampling::discrete();
  for (const auto& entry : test::toy_entries("sigma_table")) {
    if (!entry["params"].contains("sigmas")) continue;
    for (std::size_t i = 0; i < entry["value"].size(); ++i) {
      EXPECT_EQ(sampling.timestep(entry["params"]["sigmas"][i]), entry["value"][i].get<double>());
    }
  }
}

TEST(ModelSampling, PercentsAreTheReferences) {
  const auto discrete = ModelSampling::discrete();
  const auto flow = ModelSampling::flow({.shift = 3.0});
  for (const auto& entry : test::toy_entries("sigma_table")) {
    if (!entry["params"].contains("percent")) continue;
    const auto& sampling = entry["what"] == "percent_to_sigma, SD discrete" ? discrete : flow;
    EXPECT_NEAR(sampling.percent_to_sigma(entry["params"]["percent"]), entry["value"],
                entry["tolerance"]);
  }
}

TEST(ModelSampling, PercentsAtTheEndsCoverEverySigma) {
  for (const auto& [name, sampling, sigmas] : every_sampling()) {
    const bool flow = sampling.prediction() == Prediction::flow;
    EXPECT_EQ(sampling.percent_to_sigma(0.0), flow ? 1.0 : kInfinity) << name;
    EXPECT_EQ(sampling.percent_to_sigma(1.0), 0.0) << name;
    EXPECT_NEAR(sampling.percent_to_sigma(1e-9), sampling.sigma_max(), 1e-4) << name;
  }
}

TEST(ModelSampling, EveryTimestepOfTheTableRoundTrips) {
  const auto sampling = ModelSampling::discrete();
  for (int timestep = 0; timestep < 1000; ++timestep) {
    ASSERT_EQ(sampling.timestep(sampling.sigma(timestep)), timestep);
    ASSERT_EQ(sampling.timestep(sampling.sigmas()[timestep]), timestep);
    ASSERT_NEAR(sampling.sigma(timestep) / sampling.sigmas()[timestep], 1.0, 3e-7);
  }
}

TEST(ModelSampling, InterpolatesTheLogarithmBetweenTimesteps) {
  const auto sampling = ModelSampling::discrete();
  const double below = sampling.sigma(10), above = sampling.sigma(11);
  EXPECT_NEAR(sampling.sigma(10.25), std::pow(below, 0.75) * std::pow(above, 0.25), 1e-7);
}

TEST(ModelSampling, StaysWithinTheTable) {
  const auto sampling = ModelSampling::discrete();
  EXPECT_EQ(sampling.sigma(-5), sampling.sigma(0));
  EXPECT_EQ(sampling.sigma(2000), sampling.sigma(999));
  EXPECT_EQ(sampling.timestep(1e-9), 0);
  EXPECT_EQ(sampling.timestep(1e9), 999);
}

TEST(ModelSampling, ContinuousTimestepsRoundTrip) {
  for (const double sigma : {0.002, 0.7, 1.0}) {
    const auto edm = ModelSampling::edm({});
    const auto flow = ModelSampling::flow({});
    EXPECT_NEAR(edm.sigma(edm.timestep(sigma)), sigma, 3e-7 * sigma);
    EXPECT_NEAR(flow.sigma(flow.timestep(sigma)), sigma, 3e-7 * sigma);
    EXPECT_NEAR(edm.timestep(sigma), std::log(sigma) / 4, 1e-12);
    EXPECT_NEAR(flow.timestep(sigma), 1000 * sigma, 1e-9);
  }
  EXPECT_EQ(ModelSampling::flow({}).timestep(0.0), 0.0);
}

TEST(ModelSampling, ShiftMovesFlowTowardsNoise) {
  const auto flow = ModelSampling::flow({.shift = 3.0, .multiplier = 1.0});
  EXPECT_DOUBLE_EQ(flow.sigma(0.5), 0.75);
  EXPECT_EQ(flow.sigma_max(), 1.0);
}

TEST(ModelSampling, EdmCoversItsRange) {
  const auto edm = ModelSampling::edm({.sigma_min = 0.01, .sigma_max = 50.0});
  EXPECT_NEAR(edm.sigma_min(), 0.01, 1e-8);
  EXPECT_NEAR(edm.sigma_max(), 50.0, 1e-4);
  EXPECT_EQ(edm.sigmas().size(), 1000u);
}

TEST(ModelSampling, ThePerfectOutputGivesTheCleanLatentBack) {
  const auto x0 = random(1), noise = random(2);
  for (const auto& [name, sampling, sigmas] : every_sampling()) {
    for (const double sigma : sigmas) {
      const auto x = sampling.noise_scaling(sigma, noise, x0);
      const auto output = exact_output(sampling.prediction(), sigma, x0, noise);
      EXPECT_LT(max_difference(sampling.calculate_denoised(sigma, output, x), x0), 1e-13)
          << name << " at " << sigma;
    }
  }
}

TEST(ModelSampling, RenoiseScaleIsTheShareOfTheCleanLatent) {
  const auto x0 = random(1), noise = random(2), change = random(3);
  for (const auto& [name, sampling, sigmas] : every_sampling()) {
    for (const double sigma : sigmas) {
      const auto x = sampling.noise_scaling(sigma, noise, x0);
      const auto x_again = sampling.noise_scaling(sigma, noise, x0 + change);
      EXPECT_LT(max_difference(x + sampling.renoise_scale(sigma) * change, x_again), 1e-14)
          << name << " at " << sigma;
    }
  }
}

TEST(ModelSampling, InputsHaveTheVarianceTheUNetWasTrainedWith) {
  const auto x = random(1);
  const double sigma = 3.0;
  EXPECT_LT(max_difference(ModelSampling::discrete().calculate_input(sigma, x), x / std::sqrt(10)),
            1e-15);
  EXPECT_LT(
      max_difference(ModelSampling::edm({.sigma_data = 4.0}).calculate_input(sigma, x), x / 5),
      1e-15);
  EXPECT_TRUE(ModelSampling::flow({}).calculate_input(0.5, x).equal(x));
}

TEST(ModelSampling, MaxDenoiseStartsFromTheWholeVariance) {
  const auto x0 = random(1), noise = random(2);
  for (const auto& [name, sampling, sigmas] : every_sampling()) {
    const double sigma = sigmas.back();
    const auto x = sampling.noise_scaling(sigma, noise, x0, /*max_denoise=*/true);
    const bool flow = sampling.prediction() == Prediction::flow;
    const auto expected =
        flow ? sampling.noise_scaling(sigma, noise, x0) : noise * std::sqrt(1 + sigma * sigma) + x0;
    EXPECT_LT(max_difference(x, expected), 1e-14) << name;
  }
}

TEST(ModelSampling, OnlyFlowScalesTheEndOfARun) {
  const auto latent = random(1);
  EXPECT_TRUE(ModelSampling::discrete().inverse_noise_scaling(0.5, latent).equal(latent));
  EXPECT_LT(max_difference(ModelSampling::flow({}).inverse_noise_scaling(0.75, latent), 4 * latent),
            1e-14);
}

TEST(ModelSampling, KeepsTheDtypeOfTheLatent) {
  for (const auto dtype : {torch::kFloat16, torch::kFloat32, torch::kFloat64}) {
    const auto x = random(1).to(dtype);
    for (const auto& [name, sampling, sigmas] : every_sampling()) {
      EXPECT_EQ(sampling.calculate_input(0.5, x).scalar_type(), dtype) << name;
      EXPECT_EQ(sampling.calculate_denoised(0.5, x, x).scalar_type(), dtype) << name;
      EXPECT_EQ(sampling.noise_scaling(0.5, x, x).scalar_type(), dtype) << name;
    }
  }
}

TEST(ModelSampling, TakesATableOfItsOwn) {
  const auto sampling = ModelSampling::from_alphas_cumprod(Prediction::v, {0.8, 0.5, 0.2});
  EXPECT_EQ(sampling.sigmas(), (std::vector<double>{0.5, 1.0, 2.0}));
  EXPECT_EQ(sampling.timestep(1.1), 1);
  EXPECT_NEAR(sampling.percent_to_sigma(0.5), 1.0, 1e-7);
}

TEST(ModelSampling, RefusesTablesThatAreNone) {
  const auto from = [](std::vector<double> alphas_cumprod) {
    return [=] { ModelSampling::from_alphas_cumprod(Prediction::eps, alphas_cumprod); };
  };
  for (const auto& table : std::vector<std::vector<double>>{
           {}, {0.5, 0.5}, {0.5, 0.6}, {1.0, 0.5}, {0.5, 0.0}, {std::nan("")}}) {
    EXPECT_THAT(from(table), ThrowsMessage<c10::ValueError>(HasSubstr("alphas_cumprod must")));
  }
  EXPECT_THAT([] { ModelSampling::discrete(Prediction::flow); },
              ThrowsMessage<c10::ValueError>(HasSubstr("must be eps, v or x0, got flow")));
}

TEST(ModelSampling, RefusesConstantsOutOfRange) {
  EXPECT_THROW(ModelSampling::discrete(Prediction::eps, {.beta_start = 0.0}), c10::ValueError);
  EXPECT_THROW(ModelSampling::discrete(Prediction::eps, {.beta_end = 1.0}), c10::ValueError);
  EXPECT_THROW(ModelSampling::discrete(Prediction::eps, {.timesteps = 0}), c10::ValueError);
  EXPECT_THAT([] { parse_beta_schedule("cosine"); },
              ThrowsMessage<c10::ValueError>(HasSubstr("scaled_linear, linear, got \"cosine\"")));
  EXPECT_THROW(ModelSampling::edm({.sigma_data = 0.0}), c10::ValueError);
  EXPECT_THROW(ModelSampling::edm({.sigma_min = 90.0}), c10::ValueError);
  EXPECT_THROW(ModelSampling::flow({.shift = -1.0}), c10::ValueError);
  EXPECT_THROW(ModelSampling::flow({.multiplier = kInfinity}), c10::ValueError);
}

TEST(ModelSampling, RefusesSigmasThatAreNone) {
  const auto x = random(1);
  for (const auto& [name, sampling, sigmas] : every_sampling()) {
    for (const double sigma : {-1.0, kInfinity, std::nan("")}) {
      EXPECT_THROW(sampling.timestep(sigma), c10::ValueError) << name;
      EXPECT_THROW(sampling.calculate_input(sigma, x), c10::ValueError) << name;
      EXPECT_THROW(sampling.calculate_denoised(sigma, x, x), c10::ValueError) << name;
      EXPECT_THROW(sampling.noise_scaling(sigma, x, x), c10::ValueError) << name;
      EXPECT_THROW(sampling.renoise_scale(sigma), c10::ValueError) << name;
    }
    EXPECT_THROW(sampling.sigma(std::nan("")), c10::ValueError) << name;
    EXPECT_THROW(sampling.percent_to_sigma(1.5), c10::ValueError) << name;
  }
  EXPECT_THROW(ModelSampling::discrete().timestep(0.0), c10::ValueError);
  EXPECT_THROW(ModelSampling::flow({}).noise_scaling(1.5, x, x), c10::ValueError);
  EXPECT_THROW(ModelSampling::flow({}).inverse_noise_scaling(1.0, x), c10::ValueError);
}

TEST(ModelSampling, LinearBetasAreLinear) {
  const auto sampling = ModelSampling::discrete(
      Prediction::eps,
      {.beta_start = 0.1, .beta_end = 0.3, .timesteps = 3, .beta_schedule = BetaSchedule::linear});
  const double alpha_cumprod = 0.9 * 0.8 * 0.7;
  EXPECT_NEAR(sampling.sigma_max(), std::sqrt((1 - alpha_cumprod) / alpha_cumprod), 1e-7);
}

TEST(ModelSampling, FlowTablesEndAtOneWhateverTheShift) {
  for (int hundredths = 1; hundredths <= 600; ++hundredths) {
    const auto sampling = ModelSampling::flow({.shift = hundredths / 100.0});
    EXPECT_EQ(sampling.sigma_max(), 1.0) << hundredths;
    EXPECT_EQ(sampling.sigma(sampling.timestep(1.0)), 1.0) << hundredths;
  }
}

TEST(ModelSampling, EveryTableCanEndInPureNoise) {
  for (const auto schedule : beta_schedule_names()) {
    for (const std::int64_t timesteps : {2, 1000, 4000}) {
      const auto sampling =
          ModelSampling::discrete(Prediction::v, {.beta_start = 1e-4,
                                                  .beta_end = 0.02,
                                                  .timesteps = timesteps,
                                                  .beta_schedule = parse_beta_schedule(schedule),
                                                  .zero_terminal_snr = true});
      EXPECT_GT(sampling.sigma_max(), 4000) << schedule << timesteps;
    }
  }
  EXPECT_THROW(ModelSampling::discrete(Prediction::v, {.timesteps = 1, .zero_terminal_snr = true}),
               c10::ValueError);
}

}  // namespace
}  // namespace sag

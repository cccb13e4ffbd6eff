#include "sag/schedules.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/samplers.h"
#include "sampling/run.h"
#include "support/toy.h"

namespace sag {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const ModelSampling kDiscrete = ModelSampling::discrete();
const ModelSampling kFlow = ModelSampling::flow({.shift = 3.0});

bool known(const std::string& name) {
  return std::ranges::count(schedule_names(), name) == 1;
}

TEST(GetSigmas, AreTheReferences) {
  int compared = 0;
  for (const auto& entry : test::toy_entries("schedule")) {
    const auto& params = entry["params"];
    if (!params.contains("scheduler") || !known(params["scheduler"])) continue;
    const auto& sampling = params["model"] == "SD discrete" ? kDiscrete : kFlow;
    const auto sigmas =
        get_sigmas(params["scheduler"].get<std::string>(), sampling, params["steps"]);
    const auto expected = entry["value"].get<std::vector<double>>();
    ASSERT_EQ(sigmas.size(), expected.size());
    for (std::size_t i = 0; i < sigmas.size(); ++i) {
      EXPECT_NEAR(sigmas[i], expected[i], 3e-7 * expected[i]) << params << " at " << i;
    }
    ++compared;
  }
  EXPECT_EQ(compared, 54);
}

TEST(GetSigmas, LowerDenoiseKeepsTheEndOfALongerSchedule) {
  for (const auto& entry : test::toy_entries("schedule")) {
    if (!entry.contains("detail") || !entry["detail"].contains("sigmas")) continue;
    const auto sigmas = get_sigmas("normal", kDiscrete, 20, {.denoise = 0.5});
    const auto expected = entry["detail"]["sigmas"].get<std::vector<double>>();
    ASSERT_EQ(sigmas.size(), expected.size());
    for (std::size_t i = 0; i < sigmas.size(); ++i) {
      EXPECT_NEAR(sigmas[i], expected[i], 3e-7 * expected[i]);
    }
  }
}

TEST(GetSigmas, FallStrictlyToZeroForEveryModelAndLength) {
  const auto edm = ModelSampling::edm({});
  for (const auto* sampling : {&kDiscrete, &kFlow, &edm}) {
    for (const auto name : schedule_names()) {
      for (const std::int64_t n : {1, 2, 3, 7, 50, 999}) {
        const auto sigmas = get_sigmas(name, *sampling, n);
        if (name == "beta")
          ASSERT_LE(sigmas.size(), static_cast<std::size_t>(n + 1));
        else
          ASSERT_EQ(sigmas.size(), static_cast<std::size_t>(n + 1)) << name;
        EXPECT_NO_THROW(check_sigmas(sigmas, "test")) << name << " " << n;
        EXPECT_EQ(sigmas.back(), 0.0) << name;
        // ddim_uniform starts lower by design.
        if (name == "ddim_uniform") continue;
        EXPECT_NEAR(sigmas.front() / sampling->sigma_max(), 1.0, 1e-5) << name;
      }
    }
  }
}

TEST(GetSigmas, HoldFp32Values) {
  for (const auto name : schedule_names()) {
    for (const double sigma : get_sigmas(name, kFlow, 13)) {
      EXPECT_EQ(sigma, static_cast<float>(sigma)) << name;
    }
  }
}

TEST(SamplerParity, DdimUniformHasAsManyStepsAsAskedFor) {
  // Where the reference's stride divides the table well, it is the same.
  for (const std::int64_t n : {1, 2, 3, 4, 5, 8, 9, 10, 20, 25, 27, 37, 40, 50}) {
    const auto sigmas = get_sigmas_ddim_uniform(kDiscrete, n);
    for (std::int64_t k = 0; k < n; ++k)
      EXPECT_EQ(sigmas[static_cast<std::size_t>(n - 1 - k)], kDiscrete.sigmas()[1 + k * (1000 / n)])
          << n << " " << k;
  }
  for (std::int64_t n = 1; n < 200; ++n)
    EXPECT_EQ(get_sigmas_ddim_uniform(kDiscrete, n).size(), static_cast<std::size_t>(n + 1));
}

TEST(SamplerParity, KlOptimalOfOneStepIsFinite) {
  EXPECT_NEAR(get_sigmas_kl_optimal(1, 0.03, 14.6).front(), 14.6, 1e-4);
}

TEST(GetSigmas, DiscardThePenultimateSigmaForTheSamplersThatWantIt) {
  const auto longer = get_sigmas("karras", kDiscrete, 11);
  const auto sigmas = get_sigmas("karras", kDiscrete, 10, {.discard_penultimate_sigma = true});
  ASSERT_EQ(sigmas.size(), 11u);
  EXPECT_TRUE(std::equal(sigmas.begin(), sigmas.end() - 1, longer.begin()));
  EXPECT_EQ(sigmas.back(), 0.0);
  std::vector<std::string_view> samplers;
  for (const auto name : sampler_names())
    if (sampler_info(name).discards_penultimate_sigma) samplers.push_back(name);
  EXPECT_THAT(samplers, testing::ElementsAre("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"));
}

TEST(GetSigmas, StartAtTheZeroTerminalSnrTablesEnd) {
  const auto sampling = ModelSampling::discrete(Prediction::v, {.zero_terminal_snr = true});
  for (const auto& entry : test::toy_entries("zsnr"))
    EXPECT_NEAR(sampling.sigma_max(), entry["value"], entry["tolerance"]);
  EXPECT_EQ(get_sigmas("simple", sampling, 4).front(), sampling.sigma_max());
}

TEST(GetSigmas, EndAtZeroOnceWhenTheModelsRangeDoes) {
  const auto sampling = ModelSampling::flow({.shift = 1e-3});
  ASSERT_LT(sampling.sigma(sampling.timestep(sampling.sigma_min())), 1e-5);
  const auto sigmas = get_sigmas_normal(sampling, 5);
  EXPECT_EQ(sigmas.size(), 6u);
  EXPECT_EQ(sigmas.back(), 0.0);
  EXPECT_GT(sigmas[4], 1e-5);
}

TEST(GetSigmas, ListTheKnownNamesForAnUnknownOne) {
  EXPECT_THAT(
      [] { get_sigmas("cosine", kDiscrete, 5); },
      ThrowsMessage<c10::ValueError>(HasSubstr(
          "[get_sigmas] name must be one of normal, karras, exponential, simple, "
          "sgm_uniform, ddim_uniform, beta, linear_quadratic, kl_optimal, got \"cosine\".")));
}

TEST(GetSigmas, RefuseArgumentsOutOfRange) {
  for (const auto name : schedule_names()) {
    EXPECT_THROW(get_sigmas(name, kDiscrete, 0), c10::ValueError);
    for (const double denoise : {0.0, -0.5, 1.5, 1e-9, std::nan("")}) {
      EXPECT_THROW(get_sigmas(name, kDiscrete, 5, {.denoise = denoise}), c10::ValueError);
    }
  }
  EXPECT_THROW(get_sigmas_normal(kDiscrete, 0), c10::ValueError);
  EXPECT_THROW(get_sigmas_simple(kDiscrete, 0), c10::ValueError);
  EXPECT_THAT([] { get_sigmas_simple(kDiscrete, 1001); },
              ThrowsMessage<c10::ValueError>(HasSubstr("at most the 1000 entries")));
  for (const auto& [low, high] : std::vector<std::pair<double, double>>{
           {0.0, 1.0}, {-1.0, 1.0}, {2.0, 1.0}, {0.1, kInfinity}, {std::nan(""), 1.0}}) {
    EXPECT_THROW(get_sigmas_karras(5, low, high), c10::ValueError);
    EXPECT_THROW(get_sigmas_exponential(5, low, high), c10::ValueError);
  }
  EXPECT_THROW(get_sigmas_karras(5, 0.1, 10, 0.0), c10::ValueError);
}

}  // namespace
}  // namespace sag

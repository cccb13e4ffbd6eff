#include "sag/noise.h"

#include <cstdlib>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace sag {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;
using Seeds = std::vector<std::uint64_t>;

const std::vector<std::int64_t> kImageShape = {4, 16, 24};

torch::Tensor first_draw(const Seeds& seeds) {
  return SeededNoise(seeds).draw(kImageShape, torch::kCPU);
}

TEST(SeededNoise, IsTheSameForTheSameSeeds) {
  SeededNoise noise(Seeds{7, 8}), again(Seeds{7, 8});
  for (int draw = 0; draw < 3; ++draw) {
    EXPECT_TRUE(noise.draw(kImageShape, torch::kCPU).equal(again.draw(kImageShape, torch::kCPU)));
  }
}

TEST(SeededNoise, OneImageDoesNotDependOnTheRestOfItsBatch) {
  SeededNoise batch(Seeds{3, 1, 2}), alone(Seeds{1});
  for (int draw = 0; draw < 3; ++draw) {
    EXPECT_TRUE(
        batch.draw(kImageShape, torch::kCPU)[1].equal(alone.draw(kImageShape, torch::kCPU)[0]));
  }
}

TEST(SeededNoise, DoesNotTouchTheGlobalGenerator) {
  torch::manual_seed(5);
  const auto expected = torch::randn({8});
  torch::manual_seed(5);
  first_draw({9});
  EXPECT_TRUE(torch::randn({8}).equal(expected));
}

TEST(SeededNoise, FirstDrawIsTorchsRandnOfTheSeed) {
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{42}, ~std::uint64_t{0}}) {
    torch::manual_seed(seed);
    EXPECT_TRUE(first_draw({seed}).equal(torch::randn({1, 4, 16, 24})));
  }
}

TEST(SeededNoise, LaterDrawsAreUnrelatedToTheFirst) {
  SeededNoise noise(Seeds{11});
  const auto first = noise.draw({65536}, torch::kCPU)[0];
  const auto second = noise.draw({65536}, torch::kCPU)[0];
  const double correlation = (first * second).mean().item<double>();
  // Four standard errors.
  EXPECT_LT(std::abs(correlation), 4.0 / 256);
}

TEST(SeededNoise, IsUnitGaussian) {
  const auto noise = SeededNoise(Seeds{1, 2}).draw({4, 128, 128}, torch::kCPU);
  EXPECT_EQ(noise.scalar_type(), torch::kFloat32);
  EXPECT_NEAR(noise.mean().item<double>(), 0.0, 0.012);
  EXPECT_NEAR(noise.var().item<double>(), 1.0, 0.016);
}

TEST(SeededNoise, NeedsASeed) {
  EXPECT_THAT([] { SeededNoise noise(Seeds{}); },
              ThrowsMessage<c10::ValueError>(HasSubstr("[SeededNoise] seeds must not be empty")));
}

TEST(SeededNoise, IsTheSameOnCuda) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  const auto noise = SeededNoise(Seeds{7, 8}).draw(kImageShape, torch::kCUDA);
  EXPECT_TRUE(noise.is_cuda());
  EXPECT_TRUE(noise.cpu().equal(first_draw({7, 8})));
}

TEST(SeededNoiseSampler, GoesOnDrawingFromTheSharedNoise) {
  const auto noise = std::make_shared<SeededNoise>(Seeds{7, 8});
  const auto x = noise->draw(kImageShape, torch::kCPU).to(torch::kFloat64);
  const auto sampler = seeded_noise_sampler(noise, x);

  SeededNoise expected(Seeds{7, 8});
  expected.draw(kImageShape, torch::kCPU);
  for (int step = 0; step < 2; ++step) {
    const auto drawn = sampler(2.0, 1.0);
    EXPECT_EQ(drawn.scalar_type(), torch::kFloat64);
    EXPECT_TRUE(drawn.equal(expected.draw(kImageShape, torch::kCPU).to(torch::kFloat64)));
  }
}

// Noise over an interval times the square root of its width: a difference of the path.
torch::Tensor increment(const NoiseSampler& noise, double sigma, double sigma_next) {
  return noise(sigma, sigma_next) * std::sqrt(sigma - sigma_next);
}

TEST(BrownianNoise, IncrementsOfOnePathAddUp) {
  const auto x = torch::zeros({2, 4, 16, 24});
  const auto noise = brownian_noise_sampler(Seeds{7, 8}, x, 14.6);
  const auto again = brownian_noise_sampler(Seeds{7, 8}, x, 14.6);
  const std::vector<double> sigmas = {14.6, 9.1, 9.0999, 4.0, 1.0, 0.3, 0.05, 0.03, 1e-3};
  auto sum = torch::zeros_like(x);
  for (std::size_t i = 0; i + 1 < sigmas.size(); ++i)
    sum += increment(noise, sigmas[i], sigmas[i + 1]);
  EXPECT_TRUE(sum.allclose(increment(again, 14.6, 1e-3), 1e-4, 1e-5));
}

TEST(BrownianNoise, IsUnitGaussianAndIndependentOverSteps) {
  const auto x = torch::zeros({1, 4, 128, 128});
  const auto noise = brownian_noise_sampler(Seeds{3}, x, 14.6);
  torch::Tensor last;
  // The last three are closer to each other than most schedules' steps.
  for (const auto& [sigma, sigma_next] :
       {std::pair{14.6, 9.0}, std::pair{9.0, 3.0}, std::pair{3.0, 2.9}, std::pair{2.9, 0.04},
        std::pair{0.04, 0.039}, std::pair{0.039, 0.0385}}) {
    const auto drawn = noise(sigma, sigma_next);
    EXPECT_NEAR(drawn.mean().item<double>(), 0.0, 0.016) << sigma;
    EXPECT_NEAR(drawn.var().item<double>(), 1.0, 0.025) << sigma;
    if (last.defined()) {
      EXPECT_LT(std::abs((drawn * last).mean().item<double>()), 0.016) << sigma;
    }
    last = drawn;
  }
  // It is not the start noise of the same seed either.
  EXPECT_LT(std::abs((noise(14.6, 9.0) * SeededNoise(Seeds{3}).draw({4, 128, 128}, torch::kCPU))
                         .mean()
                         .item<double>()),
            0.016);
}

TEST(BrownianNoise, OneImageDoesNotDependOnTheRestOfItsBatch) {
  const auto batch = brownian_noise_sampler(Seeds{3, 1}, torch::zeros({2, 4, 8, 8}), 10.0);
  const auto alone = brownian_noise_sampler(Seeds{1}, torch::zeros({1, 4, 8, 8}), 10.0);
  EXPECT_TRUE(batch(9.0, 2.0)[1].equal(alone(9.0, 2.0)[0]));
}

TEST(BrownianNoise, IsTheSameOnCuda) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  const auto x = torch::zeros({2, 4, 16, 24});
  const auto noise = brownian_noise_sampler(Seeds{7, 8}, x.cuda(), 10.0)(9.0, 2.0);
  EXPECT_TRUE(noise.is_cuda());
  EXPECT_TRUE(noise.cpu().equal(brownian_noise_sampler(Seeds{7, 8}, x, 10.0)(9.0, 2.0)));
}

TEST(BrownianNoise, RefusesWhatIsNoPath) {
  const auto x = torch::zeros({2, 4, 8, 8});
  EXPECT_THROW(brownian_noise_sampler(Seeds{}, x, 10.0), c10::ValueError);
  EXPECT_THROW(brownian_noise_sampler(Seeds{1}, x, 10.0), c10::ValueError);
  EXPECT_THROW(brownian_noise_sampler(Seeds{1, 2}, x, 0.0), c10::ValueError);
  const auto noise = brownian_noise_sampler(Seeds{1, 2}, x, 10.0);
  EXPECT_THAT(
      [&] { noise(11.0, 1.0); },
      ThrowsMessage<c10::ValueError>(HasSubstr("sigmas must fall and be between 0 and 10")));
  EXPECT_THROW(noise(1.0, 1.0), c10::ValueError);
  EXPECT_THROW(noise(1.0, -1.0), c10::ValueError);
}

TEST(SeededNoiseSampler, NeedsASeedForEachImage) {
  const auto noise = std::make_shared<SeededNoise>(Seeds{7, 8});
  EXPECT_THAT(
      [&] {
        seeded_noise_sampler(noise, torch::zeros({3, 4, 8, 8}));
      },
      ThrowsMessage<c10::ValueError>(HasSubstr("one image per seed, 2, got [3, 4, 8, 8]")));
  EXPECT_THROW(seeded_noise_sampler(nullptr, torch::zeros({3, 4, 8, 8})), c10::ValueError);
}

}  // namespace
}  // namespace sag

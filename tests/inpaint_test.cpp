#include "sag/inpaint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace sag {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const std::vector<std::int64_t> kShape = {2, 4, 6, 8};

torch::Tensor random(std::uint64_t seed) {
  return torch::randn(kShape, at::detail::createCPUGenerator(seed), torch::kFloat32);
}

// Repaints the right half.
torch::Tensor half_mask() {
  auto mask = torch::zeros({1, 1, 6, 8});
  mask.slice(3, 4).fill_(1.0);
  return mask;
}

torch::Tensor left(const torch::Tensor& x) {
  return x.slice(3, 0, 4);
}
torch::Tensor right(const torch::Tensor& x) {
  return x.slice(3, 4);
}

class InpaintModel : public ::testing::TestWithParam<Prediction> {
 protected:
  ModelSampling sampling() const {
    return GetParam() == Prediction::flow ? ModelSampling::flow({})
                                          : ModelSampling::discrete(GetParam());
  }

  torch::Tensor latent = random(1), noise = random(2), x = random(3), seen;
  DenoiseFunction model = [this](const torch::Tensor& x_in, double) {
    seen = x_in;
    return x_in + 100;
  };
};

INSTANTIATE_TEST_SUITE_P(Predictions, InpaintModel,
                         testing::Values(Prediction::eps, Prediction::flow),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST_P(InpaintModel, SeesTheKnownPartNoisedToSigma) {
  const double sigma = 0.5;
  inpaint_model(model, sampling(), latent, noise, half_mask())(x, sigma);
  EXPECT_TRUE(left(seen).equal(left(sampling().noise_scaling(sigma, noise, latent))));
  EXPECT_TRUE(right(seen).equal(right(x)));
}

TEST_P(InpaintModel, ReturnsTheKnownPartClean) {
  const auto denoised =
      inpaint_model(model, sampling(), latent, noise, half_mask())(x, 0.5).denoised;
  EXPECT_TRUE(left(denoised).equal(left(latent)));
  EXPECT_TRUE(right(denoised).equal(right(x) + 100));
}

TEST_P(InpaintModel, MixesWhereTheMaskIsBetween) {
  const auto mask = torch::full({6, 8}, 0.25);
  const auto denoised = inpaint_model(model, sampling(), latent, noise, mask)(x, 0.5).denoised;
  const auto known = sampling().noise_scaling(0.5, noise, latent);
  EXPECT_TRUE(seen.allclose(0.25 * x + 0.75 * known));
  EXPECT_TRUE(denoised.allclose(0.25 * (seen + 100) + 0.75 * latent));
}

TEST_P(InpaintModel, TakesABoolMask) {
  const auto with_bool =
      inpaint_model(model, sampling(), latent, noise, half_mask().to(torch::kBool))(x, 0.5)
          .denoised;
  EXPECT_TRUE(with_bool.equal(
      inpaint_model(model, sampling(), latent, noise, half_mask())(x, 0.5).denoised));
}

TEST_P(InpaintModel, RefusesShapesThatDoNotFit) {
  const auto with = [this](const torch::Tensor& latent, const torch::Tensor& noise,
                           const torch::Tensor& mask) {
    return [=, this] { inpaint_model(model, sampling(), latent, noise, mask); };
  };
  EXPECT_THAT(
      with(latent, noise, torch::ones({1, 1, 8, 6})),
      ThrowsMessage<c10::ValueError>(HasSubstr(
          "[inpaint_model] mask must be broadcastable to [2, 4, 6, 8], got [1, 1, 8, 6].")));
  EXPECT_THAT(with(latent, noise.slice(0, 0, 1), half_mask()),
              ThrowsMessage<c10::ValueError>(HasSubstr("latent and noise must both be")));
  EXPECT_THROW(with(latent[0], noise[0], half_mask())(), c10::ValueError);
  EXPECT_THROW(with({}, noise, half_mask())(), c10::ValueError);
  const auto inpaint = inpaint_model(model, sampling(), latent, noise, half_mask());
  EXPECT_THAT(
      [&] { inpaint(x.slice(0, 0, 1), 0.5); },
      ThrowsMessage<c10::ValueError>(HasSubstr("x must have the shape of latent, [2, 4, 6, 8]")));
}

TEST_P(InpaintModel, RefusesIntegers) {
  const auto integers = torch::ones(kShape, torch::kInt64);
  EXPECT_THROW(inpaint_model(model, sampling(), integers, noise, half_mask()), c10::TypeError);
  EXPECT_THROW(inpaint_model(model, sampling(), latent, integers, half_mask()), c10::TypeError);
  EXPECT_THROW(inpaint_model(model, sampling(), latent, noise, integers), c10::TypeError);
  EXPECT_THROW(inpaint_model(nullptr, sampling(), latent, noise, half_mask()), c10::ValueError);
}

}  // namespace
}  // namespace sag

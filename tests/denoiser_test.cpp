#include "sag/denoiser.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/device.h"
#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

/// Returns the latent's channels of its input, and keeps what it was given.
class Echo final : public UNet {
 public:
  explicit Echo(torch::ScalarType dtype) : dtype_(dtype) {}
  torch::Tensor forward(const UNetInput& input) const override {
    seen = input;
    return wrong_shape ? input.x.narrow(2, 0, 1) : input.x.narrow(1, 0, 4);
  }
  std::vector<AttentionSiteInfo> attention_sites() const override { return {}; }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return dtype_; }

  mutable UNetInput seen;
  bool wrong_shape = false;

 private:
  torch::ScalarType dtype_;
};

TEST(Denoiser, ScalesInputAndOutputByThePrediction) {
  const auto unet = std::make_shared<Echo>(torch::kFloat);
  const auto sampling = ModelSampling::discrete(Prediction::eps);
  const auto x = torch::randn({2, 4, 8, 8});
  const auto denoised = Denoiser(unet, sampling)(x, 3.0, {});
  EXPECT_LT(test::max_diff(unet->seen.x, x / std::sqrt(10.0)), 1e-6);
  EXPECT_LT(test::max_diff(denoised, x - 3.0 * x / std::sqrt(10.0)), 1e-5);
  EXPECT_EQ(unet->seen.timesteps.sizes().vec(), std::vector<std::int64_t>{2});
  EXPECT_EQ(unet->seen.timesteps[0].item<double>(), sampling.timestep(3.0));
}

TEST(Denoiser, BringsEveryTensorToTheUNet) {
  const auto unet = std::make_shared<Echo>(torch::kHalf);
  const auto denoised = Denoiser(unet, ModelSampling::flow({}))(
      torch::randn({3, 4, 8, 8}), 0.5,
      {.context = torch::randn({1, 5, 6}),
       .y = torch::randn({3, 7}),
       .extra = {{"ids", torch::ones({1, 2}, torch::kLong)}}});
  EXPECT_EQ(unet->seen.x.scalar_type(), torch::kHalf);
  EXPECT_EQ(unet->seen.timesteps.scalar_type(), torch::kFloat);
  EXPECT_EQ(unet->seen.context.sizes().vec(), (std::vector<std::int64_t>{3, 5, 6}));
  EXPECT_EQ(unet->seen.context.scalar_type(), torch::kHalf);
  EXPECT_EQ(unet->seen.extra.at("ids").scalar_type(), torch::kLong);
  EXPECT_EQ(unet->seen.extra.at("ids").size(0), 3);
  EXPECT_EQ(denoised.scalar_type(), torch::kFloat)
      << "the arithmetic around the UNet stays in fp32";
}

// ComfyUI: `apply_model` scales x alone.
TEST(Denoiser, AppendsFurtherChannelsAsTheyAre) {
  const auto unet = std::make_shared<Echo>(torch::kHalf);
  const auto x = torch::randn({3, 4, 8, 8}), concat = torch::rand({1, 5, 8, 8}, torch::kDouble);
  const auto denoised =
      Denoiser(unet, ModelSampling::discrete())(x, 3.0, {.concat = concat}).to(torch::kDouble);
  EXPECT_EQ(unet->seen.x.sizes().vec(), (std::vector<std::int64_t>{3, 9, 8, 8}));
  EXPECT_EQ(unet->seen.x.scalar_type(), torch::kHalf);
  EXPECT_TRUE(unet->seen.x.narrow(1, 4, 5).equal(concat.to(torch::kHalf).expand({3, 5, 8, 8})));
  EXPECT_TRUE(unet->seen.x.narrow(1, 0, 4).equal((x / std::sqrt(10.0)).to(torch::kHalf)));
  EXPECT_EQ(denoised.sizes(), x.sizes());
}

TEST(Denoiser, PromotesHalfAndKeepsDouble) {
  const Denoiser denoiser(std::make_shared<Echo>(torch::kFloat), ModelSampling::flow({}));
  EXPECT_EQ(denoiser(torch::randn({1, 4, 8, 8}).to(torch::kHalf), 0.5, {}).scalar_type(),
            torch::kFloat);
  EXPECT_EQ(denoiser(torch::randn({1, 4, 8, 8}, torch::kDouble), 0.5, {}).scalar_type(),
            torch::kDouble);
}

// Traced in-place operations write into their input, which for a flow model is x itself.
TEST(Denoiser, KeepsXFromTheUNet) {
  class Writes final : public UNet {
   public:
    torch::Tensor forward(const UNetInput& input) const override { return input.x.fill_(7); }
    std::vector<AttentionSiteInfo> attention_sites() const override { return {}; }
    torch::Device device() const override { return torch::kCPU; }
    torch::ScalarType dtype() const override { return torch::kFloat; }
  };
  const auto x = torch::randn({1, 4, 8, 8}), before = x.clone();
  for (const auto& sampling : {ModelSampling::flow({}), ModelSampling::discrete()}) {
    Denoiser(std::make_shared<Writes>(), sampling)(x, 0.5, {});
    EXPECT_TRUE(x.equal(before));
  }
}

TEST(Denoiser, ChecksItsArguments) {
  const auto unet = std::make_shared<Echo>(torch::kFloat);
  const Denoiser denoiser(unet, ModelSampling::discrete());
  const auto x = torch::zeros({2, 4, 8, 8});
  EXPECT_THROW(Denoiser(nullptr, ModelSampling::discrete()), c10::ValueError);
  EXPECT_THROW(denoiser(torch::zeros({4, 8, 8}), 1, {}), c10::ValueError);
  EXPECT_THROW(denoiser(torch::zeros({1, 4, 1, 8, 8}), 1, {}), c10::ValueError);
  EXPECT_THROW(denoiser(x.to(torch::kInt), 1, {}), c10::TypeError);
  EXPECT_THROW(denoiser(x, 0, {}), c10::ValueError);
  EXPECT_THROW(denoiser(x, NAN, {}), c10::ValueError);
  EXPECT_THROW(denoiser(x, 1, {.context = torch::zeros({3, 4, 5})}), c10::ValueError);
  EXPECT_THROW(denoiser(x, 1, {.concat = torch::zeros({2, 5, 8, 9})}), c10::ValueError);
  unet->wrong_shape = true;
  EXPECT_THROW(denoiser(x, 1, {}), c10::ValueError);
}

}  // namespace
}  // namespace sag

// Self-Attention Guidance for those who have their own UNet, sampler and everything: tensors and
// one callable. The "UNet" here is made up, so that the program runs as it is.
#include <iostream>

#include <torch/torch.h>

#include <sag/attention_map.h>
#include <sag/self_attention_guidance.h>

namespace {

struct Prediction {
  torch::Tensor denoised;  // the clean latent, [B, 4, H, W]
  torch::Tensor q, k;      // of the middle block's self-attention, [B, heads, tokens, head_dim]
};

// Stands for your own unconditional call of the UNet, with q and k kept on the way.
Prediction my_unet(const torch::Tensor& x) {
  const auto tokens =
      torch::avg_pool2d(x, 8).flatten(2).transpose(1, 2).unsqueeze(1);  // [B, 1, tokens, 4]
  return {.denoised = x * 0.9, .q = tokens * 3, .k = tokens * 3};
}

}  // namespace

int main() {
  torch::manual_seed(0);
  const double sigma = 2.0;
  const auto x = torch::randn({2, 4, 64, 48}) * sigma;
  const auto uncond = my_unet(x);
  const auto denoised = uncond.denoised;  // without a prompt; otherwise your CFG result

  // 1. How much attention each token receives. The tokens × tokens matrix never exists.
  const auto map = sag::attention_map(uncond.q, uncond.k);  // [B, tokens], average 1

  // 2. Blur what is attended to, ask once more, steer away.
  const auto guided = sag::self_attention_guidance(
      denoised, x, uncond.denoised, map,
      [](const torch::Tensor& x_again) { return my_unet(x_again).denoised; }, {.scale = 0.75});

  std::cout << "tokens above the average: " << (map > 1).sum().item<int>() << " of " << map.numel()
            << ", largest change: " << (guided - denoised).abs().max().item<float>() << "\n";
}

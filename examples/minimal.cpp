// Samples a TorchScript UNet with Self-Attention Guidance. Usage: minimal unet.ts
// The file: forward(x, timesteps, context), Stable Diffusion's noise schedule, a 4-channel latent.
#include <iostream>

#include <torch/torch.h>

#include <sag/sag.h>

int main(int argc, char** argv) try {
  if (argc != 2) return std::cerr << "usage: minimal unet.ts\n", 1;
  const auto unet = sag::TorchScriptUNet::load(argv[1], {.device = torch::kCPU});
  const sag::ModelPatcher model(unet, sag::ModelSampling::discrete(sag::Prediction::eps));
  const auto guided = sag::apply_self_attention_guidance(model, {.scale = 0.75, .blur_sigma = 2.0});

  // Your text encoder's output; a width of 32 fits tests/golden/comfy_sd15_tiny.ts.
  const sag::Conditioning prompt{.context = torch::randn({1, 77, 32})};
  const sag::Conditioning negative{.context = torch::zeros({1, 77, 32})};

  sag::CfgGuider guider(guided, {prompt}, {negative}, {.cond_scale = 7.0});
  const auto latent = sag::sample(guider, torch::randn({1, 4, 16, 16}),
                                  {.sampler = "euler", .schedule = "karras", .steps = 20});

  std::cout << latent.sizes() << ", " << guider.report().guided() << " of "
            << guider.report().evaluations.size() << " evaluations guided\n";
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
}

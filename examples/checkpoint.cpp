// Draws a prompt with a checkpoint as it was downloaded, guided by Self-Attention Guidance:
//
//     checkpoint v1-5-pruned-emaonly.safetensors "a red fox" fox.ppm
#include <fstream>
#include <iostream>

#include <torch/torch.h>

#include <sag/sag.h>

namespace {

// [1, 3, height, width] in [-1, 1], as a PPM file.
void write_picture(const std::string& path, const torch::Tensor& picture) {
  const auto bytes = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch::kByte);
  const auto pixels = bytes[0].permute({1, 2, 0}).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << pixels.size(1) << ' ' << pixels.size(0) << "\n255\n";
  if (!file.write(static_cast<const char*>(pixels.const_data_ptr()), pixels.numel()))
    throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) return std::cerr << "usage: checkpoint FILE.safetensors PROMPT OUT.ppm\n", 1;
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);
  const auto loaded = sag::load_checkpoint(argv[1], {}, {.device = device});
  if (!loaded.text_encoder || !loaded.decoder)
    throw std::runtime_error("the checkpoint has no text encoder or no VAE");

  // The latent's cells: 8 x 8 pixels each.
  const std::int64_t side = loaded.info.family == "sdxl" ? 128 : 64;
  const auto condition = [&](const std::string& text) {
    const auto encoded = loaded.text_encoder->encode(text, side, side);
    sag::Conditioning cond{.context = encoded.context.to(device)};
    if (encoded.y.defined()) cond.y = encoded.y.to(device);
    return cond;
  };
  const sag::ModelPatcher model(loaded.unet, loaded.model_sampling);
  const auto guided = sag::apply_self_attention_guidance(model, {.scale = 0.75});
  sag::CfgGuider guider(guided, {condition(argv[2])}, {condition("")}, {.cond_scale = 7.0});
  const auto latent = sag::sample(guider, torch::randn({1, 4, side, side}, device),
                                  {.sampler = "dpmpp_2m", .schedule = "karras", .steps = 20});
  write_picture(argv[3], loaded.decoder->run(latent));
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

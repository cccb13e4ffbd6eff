// Samples a TorchScript UNet with Self-Attention Guidance, from the command line:
//
//     sample_torchscript --unet unet.ts --cond cond.pt --uncond uncond.pt --out latent.pt
//
// The plainest program of its kind: Stable Diffusion's noise schedule, tensors as torch.save writes
// them. The command sag-sample does the same for every kind of model, with pictures and checks.
#include <fstream>
#include <iostream>
#include <iterator>

#include <torch/torch.h>
#include <CLI/CLI.hpp>

#include <sag/sag.h>

namespace {

torch::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto value = torch::pickle_load(bytes);
  if (!value.isTensor()) throw std::runtime_error(path + " must hold one tensor");
  return value.toTensor();
}

void write_tensor(const std::string& path, const torch::Tensor& tensor) {
  const auto bytes = torch::pickle_save(tensor.cpu());
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) try {
  std::string unet_file, cond_file, uncond_file, out_file;
  std::int64_t steps = 20, channels = 4, height = 64, width = 64;
  std::uint64_t seed = 0;
  double cfg = 7.5, sag_scale = 0.5;
  CLI::App app("Samples a TorchScript UNet with Self-Attention Guidance.");
  app.add_option("--unet", unet_file, "UNet, forward(x, timesteps, context)")->required();
  app.add_option("--cond", cond_file, "Text embedding, [1, tokens, width]")->required();
  app.add_option("--uncond", uncond_file, "Embedding of the negative text")->required();
  app.add_option("--out", out_file, "Where the latent goes")->required();
  app.add_option("--steps", steps, "Steps")->capture_default_str();
  app.add_option("--cfg", cfg, "Scale of classifier-free guidance")->capture_default_str();
  app.add_option("--sag-scale", sag_scale, "Scale of SAG, 0 is off")->capture_default_str();
  app.add_option("--seed", seed, "Seed of the noise")->capture_default_str();
  app.add_option("--channels", channels, "Channels of the latent")->capture_default_str();
  app.add_option("--height", height, "Height of the latent")->capture_default_str();
  app.add_option("--width", width, "Width of the latent")->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);
  const auto unet = sag::TorchScriptUNet::load(unet_file, {.device = device});
  const sag::ModelPatcher model(unet, sag::ModelSampling::discrete(sag::Prediction::eps));
  const auto guided = sag::apply_self_attention_guidance(model, {.scale = sag_scale});

  sag::CfgGuider guider(guided, {{.context = read_tensor(cond_file)}},
                        {{.context = read_tensor(uncond_file)}}, {.cond_scale = cfg});
  const auto show = [](const sag::SamplerProgress& progress) {
    std::cout << "\rstep " << progress.step + 1 << " of " << progress.steps << std::flush;
    return true;
  };
  const std::vector<std::uint64_t> seeds = {seed};
  const auto noise = sag::SeededNoise(seeds).draw({channels, height, width}, device);
  const auto latent = sag::sample(
      guider, noise,
      {.sampler = "euler", .schedule = "karras", .steps = steps, .seeds = seeds, .callback = show});
  write_tensor(out_file, latent);
  std::cout << "\n"
            << guider.report().guided() << " of " << steps << " steps guided, watching "
            << guider.report().sites.front().site << "; the latent is in " << out_file << "\n";
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

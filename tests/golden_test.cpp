// Whole runs of ComfyUI and diffusers over small UNets (golden/README.md), repeated through the
// public API.

#include <filesystem>
#include <fstream>
#include <map>

#include <nlohmann/json.hpp>

#include "sag/cfg_guider.h"
#include "sag/samplers.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/device.h"
#include "support/golden.h"
#include "support/reference.h"

namespace sag {
namespace {

using nlohmann::json;
using test::golden_dir;
using test::max_diff;

// Five times what rounding alone was measured to do to these runs, of the largest value.
constexpr double kTolerance = 2e-5;

const json& golden_index() {
  static const json parsed = json::parse(std::ifstream(golden_dir() + "/index.json"));
  return parsed;
}

bool is_sampler(const std::string& name) {
  const auto names = sampler_names();
  return std::find(names.begin(), names.end(), name) != names.end();
}

// Where the reference is wrong, the run with the fault mended is the one to equal.
bool is_faulty(const json& run) {
  if (run["variant"] != "reference") return false;
  return run.contains("error") || run["prediction"] == "flow" ||
         run.value("reference_grid", json()) != run.value("true_grid", json());
}

std::vector<json> comfyui_runs() {
  std::vector<json> runs;
  for (const auto& run : golden_index()["comfyui_runs"])
    if (is_sampler(run["sampler"]) && !is_faulty(run)) runs.push_back(run);
  return runs;
}

std::shared_ptr<TorchScriptUNet> load_unet(const std::string& file, torch::Device device) {
  static std::map<std::string, std::shared_ptr<TorchScriptUNet>> loaded;
  auto& unet = loaded[file + device.str()];
  if (!unet) unet = TorchScriptUNet::load(golden_dir() + "/" + file, {.device = device});
  return unet;
}

ModelSampling sampling_of(const json& run) {
  if (run["prediction"] == "flow") {
    return ModelSampling::flow(
        {.shift = run["flow"]["shift"], .multiplier = run["flow"]["multiplier"]});
  }
  return ModelSampling::discrete(parse_prediction(run["prediction"].get<std::string>()));
}

SelfAttentionGuidanceOptions sag_of(const json& run) {
  SelfAttentionGuidanceOptions options{.scale = run["sag"]["scale"],
                                       .blur_sigma = run["sag"]["blur_sigma"],
                                       .threshold = run["sag"]["threshold"],
                                       .kernel_size = run["sag"]["kernel_size"]};
  if (!run["window"].is_null() && run["variant"] == "windowed") {
    options.sigma_start = run["window"]["sigma_start"];
    options.sigma_end = run["window"]["sigma_end"];
  }
  return options;
}

class ComfyUi : public testing::TestWithParam<std::tuple<const char*, json>> {};

TEST_P(ComfyUi, RunIsReproduced) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(run["file"], device);
  const auto tensor = [&](const char* key) { return golden.get(key); };

  ModelPatcher model(load_unet(run["unet"], device), sampling_of(run));
  if (run["variant"] != "no_sag") model = apply_self_attention_guidance(model, sag_of(run));
  const auto sigmas = golden.numbers("sigmas");
  CfgGuider guider(model, {{.context = tensor("cond"), .y = tensor("y_cond")}},
                   {{.context = tensor("uncond"), .y = tensor("y_uncond")}},
                   {.cond_scale = run["cfg"], .sigmas = sigmas});

  const double factor = run["latent_scale_factor"];
  const auto latent = tensor("latent").defined() ? tensor("latent") * factor : torch::Tensor();
  const auto& sampler = sampler_info(run["sampler"].get<std::string>());
  const auto denoise = [&](const torch::Tensor& x, double sigma) -> Denoised {
    if (!sampler.needs_uncond) return guider(x, sigma);
    const auto [denoised, uncond_denoised] = guider.predict_both(x, sigma);
    return {denoised, uncond_denoised};
  };
  const auto samples =
      sample(sampler.sample, denoise, model.model_sampling(), tensor("noise"), sigmas,
             {.latent = latent,
              .denoise_mask = tensor("denoise_mask"),
              .inpaint_noise = tensor("inpaint_noise")}) /
      factor;

  const auto expected = tensor(run["samples"].get<std::string>().c_str());
  const auto tolerance =
      (device.is_cuda() ? 1e-4 : kTolerance) * expected.abs().max().item<double>();
  EXPECT_LT(max_diff(samples, expected), tolerance);
}

std::string run_name(const testing::TestParamInfo<std::tuple<const char*, json>>& info) {
  auto name = std::get<1>(info.param)["id"].get<std::string>() + "_" + std::get<0>(info.param);
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
}
INSTANTIATE_TEST_SUITE_P(Golden, ComfyUi,
                         testing::Combine(test::backends(), testing::ValuesIn(comfyui_runs())),
                         run_name);

TEST(GoldenData, IsAllThere) {
  std::map<std::string, int> per_unet;
  for (const auto& run : comfyui_runs()) {
    EXPECT_TRUE(std::filesystem::exists(golden_dir() + "/" + run["file"].get<std::string>()))
        << run["id"];
    ++per_unet[run["unet"]];
  }
  EXPECT_GE(per_unet["comfy_sd15_tiny.ts"], 30);
  EXPECT_GE(per_unet["comfy_sdxl_tiny.ts"], 6);
  EXPECT_GE(per_unet["comfy_sd2v_tiny.ts"], 2);
}

// diffusers samples x / √(1 + σ²), blurs with sigma 1, and below guidance 1 has the conditional
// branch alone.
class Diffusers : public testing::TestWithParam<std::tuple<const char*, const char*>> {};

TEST_P(Diffusers, DdimRunIsReproduced) {
  const auto& [device_name, id] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const auto& runs = golden_index()["diffusers_runs"];
  const auto& run =
      *std::find_if(runs.begin(), runs.end(), [id = id](const json& r) { return r["id"] == id; });
  const test::Golden golden(run["file"], device);

  auto model =
      apply_self_attention_guidance({load_unet(run["unet"], device), ModelSampling::discrete()},
                                    {.scale = run["sag_scale"], .blur_sigma = run["blur_sigma"]});
  auto sigmas = golden.numbers("sigmas");
  const auto last = golden.numbers("alphas_cumprod_prev").back();
  sigmas.push_back(std::sqrt((1 - last) / last));
  const double guidance = run["guidance_scale"];
  const Conditioning cond{.context = golden.get("cond")}, uncond{.context = golden.get("uncond")};
  CfgGuider guider = guidance > 1 ? CfgGuider(model, {cond}, {uncond}, {.cond_scale = guidance})
                                  : CfgGuider(model, {}, {cond});

  const auto x =
      sample_ddim(std::ref(guider),
                  golden.get("latents") * std::sqrt(1 + sigmas.front() * sigmas.front()), sigmas);
  const auto samples = x / std::sqrt(1 + sigmas.back() * sigmas.back());
  const auto expected = golden.get("samples");
  EXPECT_LT(max_diff(samples, expected),
            (device.is_cuda() ? 1e-4 : kTolerance) * expected.abs().max().item<double>());
}
INSTANTIATE_TEST_SUITE_P(Golden, Diffusers,
                         testing::Combine(test::backends(),
                                          testing::Values("diff_ddim_16x16", "diff_ddim_16x24_b2",
                                                          "diff_ddim_24x17", "diff_ddim_g1",
                                                          "diff_ddim_g0_odd", "diff_ddim_nosag")),
                         [](const auto& info) {
                           return std::string(std::get<1>(info.param)) + "_" +
                                  std::get<0>(info.param);
                         });

}  // namespace
}  // namespace sag

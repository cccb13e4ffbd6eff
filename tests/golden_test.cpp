// Whole runs of ComfyUI and diffusers over small UNets (golden/README.md), repeated through the
// public API.

#include <filesystem>

#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include "sag/cfg_guider.h"
#include "sag/checkpoint.h"
#include "sag/run_sampler.h"
#include "sag/sample.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "support/denoise.h"
#include "support/device.h"
#include "support/golden_runs.h"
#include "support/reference.h"
#include "support/safetensors_file.h"

namespace sag {
namespace {

using nlohmann::json;
using test::golden_index;
using test::is_faulty;
using test::max_diff;

// Samplers whose runs are not repeated, and why.
const std::map<std::string, std::string> kSamplersNotRepeated = {};

bool is_sampler(const std::string& name) {
  const auto names = sampler_names();
  return std::find(names.begin(), names.end(), name) != names.end();
}

double tolerance(const torch::Tensor& expected, torch::Device device) {
  return (device.is_cuda() ? 1e-4 : test::kGoldenTolerance) * expected.abs().max().item<double>();
}

bool is_mended(const json& run) {
  return run["variant"] != "reference" && run["variant"] != "no_sag" &&
         is_faulty(test::variant_of(run, "reference"));
}

std::vector<json> runs_where(const std::function<bool(const json&)>& wanted) {
  std::vector<json> runs;
  for (const auto& run : golden_index()["comfyui_runs"])
    if (is_sampler(run["sampler"]) && wanted(run)) runs.push_back(run);
  return runs;
}

std::vector<json> comfyui_runs() {
  return runs_where([](const json& run) { return !is_faulty(run) && !is_mended(run); });
}

std::vector<json> faulty_runs() {
  return runs_where(is_faulty);
}

struct Repeated {
  torch::Tensor samples;
  GuiderReport report;
  // One per evaluation inside the window.
  std::vector<torch::Tensor> maps;
};

// Samples as the run says, with our sampler of the same name.
torch::Tensor sample_as(const json& run, CfgGuider& guider, const test::Golden& golden) {
  const double factor = run["latent_scale_factor"];
  const auto latent = golden.get("latent");
  return sample(guider, golden.get("noise"),
                {.sampler = run["sampler"],
                 .sigmas = golden.numbers("sigmas"),
                 .latent = latent.defined() ? latent * factor : latent,
                 .denoise_mask = golden.get("denoise_mask"),
                 .inpaint_noise = golden.get("inpaint_noise")}) /
         factor;
}

Repeated repeat(const json& run, const test::Golden& golden,
                const std::shared_ptr<const UNet>& unet) {
  Repeated result;
  ModelPatcher model(unet, test::sampling_of(run));
  if (run["variant"] != "no_sag") {
    const auto options = test::sag_of(run);
    model = apply_self_attention_guidance(model, options);
    model.set_attn1_replace(test::map_recorder(result.maps), {"middle", 0, 0},
                            {.active = [options](const StepContext& step) {
                              const double sigma = step.sigma();
                              return options.sigma_end <= sigma && sigma <= options.sigma_start;
                            }});
  }
  CfgGuider guider(model, {{.context = golden.get("cond"), .y = golden.get("y_cond")}},
                   {{.context = golden.get("uncond"), .y = golden.get("y_uncond")}},
                   {.cond_scale = run["cfg"]});
  result.samples = sample_as(run, guider, golden);
  result.report = guider.report();
  return result;
}

// ComfyUI's calls and rows, except that scale 0 adds none here, and that at cfg 1 the evaluations
// outside the window have one row (ComfyUI's window was put around a function that always asks for
// the unconditional rows).
void expect_cost(const json& run, const GuiderReport& report) {
  const bool idle = run["variant"] != "no_sag" && run["sag"]["scale"] == 0;
  const auto counted = idle ? test::variant_of(run, "no_sag") : run;
  std::int64_t rows = counted["rows_total"];
  if (run["variant"] == "windowed" && run["cfg"] == 1) {
    const auto outside = static_cast<std::int64_t>(report.evaluations.size()) - report.guided();
    EXPECT_GT(outside, 0);
    rows -= outside * run["batch"].get<std::int64_t>();
  }
  EXPECT_EQ(report.unet_rows(), rows);
  EXPECT_EQ(report.unet_calls(), counted["forwards"].get<std::int64_t>());
}

// Compared before the samples: a flipped mask cell changes them far more than rounding does.
void expect_maps(const std::vector<torch::Tensor>& maps, const torch::Tensor& token_sums) {
  ASSERT_EQ(static_cast<std::int64_t>(maps.size()), token_sums.size(0));
  double worst = 0;
  for (std::int64_t call = 0; call < token_sums.size(0); ++call) {
    const auto& map = maps[static_cast<std::size_t>(call)];
    const auto expected = token_sums[call];
    const auto difference = max_diff(map, expected);
    EXPECT_LT(difference, test::kTokenSumTolerance) << "call " << call;
    worst = std::max(worst, difference);
    const auto flipped = (map > 1) != (expected > 1);
    if (!flipped.any().item<bool>()) continue;
    const auto margin = (expected - 1).abs().masked_select(flipped).max().item<double>();
    EXPECT_LT(margin, test::kTokenSumTolerance)
        << "call " << call << ": " << flipped.sum().item<int>() << " cells flipped";
  }
  testing::Test::RecordProperty("token_sums_difference", c10::str(worst));
}

void expect_reproduced(const json& run, const Repeated& ours, const test::Golden& golden,
                       torch::Device device) {
  expect_cost(run, ours.report);
  const auto token_sums = golden.get(run["key_prefix"].get<std::string>() + "token_sums");
  if (token_sums.defined()) expect_maps(ours.maps, token_sums);
  const auto expected = golden.get(run["samples"]);
  const auto difference = max_diff(ours.samples, expected);
  EXPECT_LT(difference, tolerance(expected, device));
  testing::Test::RecordProperty("relative_difference",
                                c10::str(difference / expected.abs().max().item<double>()));
}

using RunTest = testing::TestWithParam<std::tuple<const char*, json>>;
std::string run_name(const testing::TestParamInfo<std::tuple<const char*, json>>& info) {
  return test::test_name(std::get<1>(info.param), std::get<0>(info.param));
}

class ComfyUi : public RunTest {};

TEST_P(ComfyUi, RunIsReproduced) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(run["file"], device);
  expect_reproduced(run, repeat(run, golden, test::load_unet(run["unet"], device)), golden, device);
}
INSTANTIATE_TEST_SUITE_P(Golden, ComfyUi,
                         testing::Combine(test::backends(), testing::ValuesIn(comfyui_runs())),
                         run_name);

// The same from a checkpoint in one file: ComfyUI's weights, under LDM's names, in a skeleton that
// was traced from diffusers' module.
class ComfyUiCheckpoint : public RunTest {};

// One UNet per file and device.
std::shared_ptr<const UNet> checkpoint_unet(const std::string& file, torch::Device device) {
  static std::map<std::string, std::shared_ptr<const UNet>> loaded;
  auto& unet = loaded[c10::str(file, device)];
  if (unet) return unet;
  std::map<std::string, torch::Tensor> tensors;
  const auto module = torch::jit::load(test::kGoldenDir + file).attr("unet").toModule();
  for (const auto& parameter : module.named_parameters())
    tensors["model.diffusion_model." + parameter.name] = parameter.value.detach();
  const test::TemporaryFolder folder;
  const auto path = folder.write("a.safetensors", test::safetensors_bytes(tensors));
  const auto skeleton = std::filesystem::path(file).stem().string();
  unet = Checkpoint::open(path, {.skeleton = test::kGoldenDir + "skeletons/" + skeleton})
             .load_unet({.device = device});
  return unet;
}

TEST_P(ComfyUiCheckpoint, RunIsReproduced) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(run["file"], device);
  expect_reproduced(run, repeat(run, golden, checkpoint_unet(run["unet"], device)), golden, device);
}
INSTANTIATE_TEST_SUITE_P(Golden, ComfyUiCheckpoint,
                         testing::Combine(test::backends(),
                                          testing::ValuesIn(runs_where([](const json& run) {
                                            return run["variant"] == "reference" && !is_faulty(run);
                                          }))),
                         run_name);

// Where ComfyUI throws or goes wrong, ours is the same run with the fault fixed, and differs from
// what ComfyUI gave.
class ComfyUiFault : public RunTest {};

TEST_P(ComfyUiFault, IsMended) {
  const auto& [device_name, faulty] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(faulty["file"], device);
  const auto& run = test::mended(faulty);
  const auto ours = repeat(run, golden, test::load_unet(run["unet"], device));
  expect_reproduced(run, ours, golden, device);
  EXPECT_EQ(ours.report.guided(), static_cast<std::int64_t>(ours.report.evaluations.size()));
  if (faulty.contains("error")) {
    EXPECT_TRUE(ours.samples.isfinite().all().item<bool>());
  } else {
    const auto wrong = golden.get(faulty["samples"]);
    EXPECT_GT(max_diff(ours.samples, wrong), 100 * tolerance(wrong, device));
  }
}
INSTANTIATE_TEST_SUITE_P(Golden, ComfyUiFault,
                         testing::Combine(test::backends(), testing::ValuesIn(faulty_runs())),
                         run_name);

// diffusers samples x / √(1 + σ²), blurs with sigma 1, and below guidance 1 has the conditional
// branch alone.
class Diffusers : public RunTest {};

CfgGuider diffusers_guider(const ModelPatcher& model, const json& run, const test::Golden& golden) {
  const Conditioning cond{.context = golden.get("cond")}, uncond{.context = golden.get("uncond")};
  const double guidance = run["guidance_scale"];
  return guidance > 1 ? CfgGuider(model, {cond}, {uncond}, {.cond_scale = guidance})
                      : CfgGuider(model, {}, {cond});
}

ModelPatcher diffusers_model(const json& run, torch::Device device) {
  return apply_self_attention_guidance(
      {test::load_unet(run["unet"], device), ModelSampling::discrete()},
      {.scale = run["sag_scale"], .blur_sigma = run["blur_sigma"]});
}

TEST_P(Diffusers, DdimRunIsReproduced) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(run["file"], device);
  auto sigmas = golden.numbers("sigmas");
  const auto last = golden.numbers("alphas_cumprod_prev").back();
  sigmas.push_back(std::sqrt((1 - last) / last));
  auto guider = diffusers_guider(diffusers_model(run, device), run, golden);

  const auto x =
      sample_ddim(std::ref(guider),
                  golden.get("latents") * std::sqrt(1 + sigmas.front() * sigmas.front()), sigmas);
  const auto samples = x / std::sqrt(1 + sigmas.back() * sigmas.back());
  const auto expected = golden.get("samples");
  EXPECT_LT(max_diff(samples, expected), tolerance(expected, device));
  std::int64_t rows = 0;
  for (const std::int64_t of_call : run["forward_rows"]) rows += of_call;
  EXPECT_EQ(guider.report().unet_rows(), rows);
}

// DDIM over epsilon, which is Euler's method in our coordinates. "trailing" is not: it steps to a
// noise level other than that of the next timestep.
std::vector<json> diffusers_ddim_runs() {
  std::vector<json> runs;
  for (const auto& run : golden_index()["diffusers_runs"])
    if (run["scheduler"] == "DDIM" && run["prediction_type"] == "epsilon" && !run.contains("error"))
      runs.push_back(run);
  return runs;
}
INSTANTIATE_TEST_SUITE_P(Golden, Diffusers,
                         testing::Combine(test::backends(),
                                          testing::ValuesIn(diffusers_ddim_runs())),
                         run_name);

// Its pipeline refuses schedulers with timesteps between integers, and thin latents.
class DiffusersFault : public RunTest {};

TEST_P(DiffusersFault, RunsHere) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  ASSERT_TRUE(run["reference_crashed"]);
  const test::Golden golden(run["file"], device);
  const auto model = diffusers_model(run, device);
  const auto sigmas = get_sigmas("normal", model.model_sampling(), run["steps"]);
  const auto sample_with = [&](const ModelPatcher& with) {
    auto guider = diffusers_guider(with, run, golden);
    const auto sampler = get_sampler(run["scheduler"] == "LMSDiscrete" ? "lms" : "euler");
    auto samples = run_sampler(sampler, std::ref(guider), with.model_sampling(),
                               golden.get("latents"), sigmas);
    return Repeated{samples, guider.report(), {}};
  };
  const auto guided = sample_with(model);
  EXPECT_TRUE(guided.samples.isfinite().all().item<bool>());
  const auto plain = sample_with({test::load_unet(run["unet"], device), ModelSampling::discrete()});
  // As in ComfyUI.
  if (run["latent_size"][0] == 4) {
    EXPECT_TRUE(torch::equal(guided.samples, plain.samples));
    EXPECT_EQ(guided.report.skipped(),
              (std::map<std::string, std::int64_t>{{"a side of the latent is 4 or less", 8}}));
  } else {
    EXPECT_EQ(guided.report.guided(), 8);
    EXPECT_GT(max_diff(guided.samples, plain.samples), 1);
  }
}

std::vector<json> diffusers_crashes() {
  std::vector<json> runs;
  for (const auto& run : golden_index()["diffusers_runs"])
    if (run.contains("error") && (run["scheduler"] != "LMSDiscrete" || is_sampler("lms")))
      runs.push_back(run);
  return runs;
}
INSTANTIATE_TEST_SUITE_P(Golden, DiffusersFault,
                         testing::Combine(test::backends(), testing::ValuesIn(diffusers_crashes())),
                         run_name);

// Nothing is skipped silently. (diffusers' other runs are repeated step by step in
// golden_calls_test.cpp.)
TEST(GoldenData, EveryRunIsRepeatedOrSaysWhyNot) {
  std::size_t left_out = 0;
  for (const auto& run : golden_index()["comfyui_runs"]) {
    EXPECT_TRUE(std::filesystem::exists(test::kGoldenDir + run["file"].get<std::string>()))
        << run["id"];
    left_out += kSamplersNotRepeated.contains(run["sampler"]);
  }
  for (const auto& [sampler, reason] : kSamplersNotRepeated)
    EXPECT_FALSE(is_sampler(sampler)) << sampler << " is listed as " << reason;
  // Runs whose fault is fixed are repeated in the test of the faulty one.
  std::size_t mended = 0;
  for (const auto& run : faulty_runs()) mended += is_mended(test::mended(run));
  EXPECT_EQ(comfyui_runs().size() + faulty_runs().size() + mended + left_out,
            golden_index()["comfyui_runs"].size());
  for (const auto& run : golden_index()["diffusers_runs"])
    EXPECT_TRUE(std::filesystem::exists(test::kGoldenDir + run["file"].get<std::string>()))
        << run["id"];
}

}  // namespace
}  // namespace sag

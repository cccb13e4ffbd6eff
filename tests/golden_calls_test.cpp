// Single evaluations of the reference runs (golden/README.md): everything that happens inside one.

#include <algorithm>
#include <set>

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include "sag/blur.h"
#include "sag/cfg_guider.h"
#include "support/device.h"
#include "support/golden_runs.h"
#include "support/reference.h"
#include "support/toy.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

using nlohmann::json;
using test::golden_index;
using test::max_diff;

double largest(const torch::Tensor& t) {
  return t.abs().max().item<double>();
}

/// One evaluation with SAG, taken apart. The names are those of the golden files.
struct Call {
  std::map<std::string, torch::Tensor> tensors;
  // Token sums of the unconditional rows.
  torch::Tensor map;
  // Of the patched model, in one piece.
  torch::Tensor result;
};

struct CallInput {
  std::vector<Conditioning> positive, negative;
  double cond_scale;
  torch::Tensor x;
  double sigma;
  SelfAttentionGuidanceOptions sag;
  // Used instead of the recorded one.
  torch::Tensor given_map = {};
};

// Repeats the evaluation part by part with the functions on tensors, and once more with the patch.
Call evaluate(const ModelPatcher& model, const CallInput& in) {
  Call call;
  auto& seen = call.tensors;
  std::vector<torch::Tensor> maps;
  auto probed = model.clone();
  probed.set_attn1_replace(test::map_recorder(maps), {"middle", 0, 0});
  probed.set_post_cfg_function(
      [&](const PostCfgArgs& args) {
        call.map = maps.at(0);
        const auto& map = in.given_map.defined() ? in.given_map : call.map;
        seen["cond_denoised"] = args.cond_denoised;
        seen["uncond_denoised"] = args.uncond_denoised;
        seen["cfg_result"] = args.denoised;
        seen["degraded"] = create_blur_map(args.uncond_denoised, map,
                                           {.blur_sigma = in.sag.blur_sigma,
                                            .threshold = in.sag.threshold,
                                            .kernel_size = in.sag.kernel_size});
        seen["result"] = self_attention_guidance(
            args.denoised, args.x, args.uncond_denoised, map,
            [&](const torch::Tensor& x_again) {
              seen["degraded_noised"] = x_again;
              return seen["sag"] = args.predict(x_again, Branch::uncond, Owner("probe"));
            },
            {.scale = in.sag.scale,
             .blur_sigma = in.sag.blur_sigma,
             .threshold = in.sag.threshold,
             .kernel_size = in.sag.kernel_size,
             .renoise_scale = args.model_sampling.renoise_scale(args.sigma)});
        return args.denoised;
      },
      {.needs_uncond = [](const StepContext&) { return true; }});
  CfgGuider(probed, in.positive, in.negative, {.cond_scale = in.cond_scale})(in.x, in.sigma);
  const auto patched = apply_self_attention_guidance(model, in.sag);
  call.result =
      CfgGuider(patched, in.positive, in.negative, {.cond_scale = in.cond_scale})(in.x, in.sigma);
  return call;
}

CallInput call_input(const json& run, const test::Golden& golden, std::int64_t call) {
  const auto prefix = run["key_prefix"].get<std::string>();
  return {.positive = {{.context = golden.get("cond"), .y = golden.get("y_cond")}},
          .negative = {{.context = golden.get("uncond"), .y = golden.get("y_uncond")}},
          .cond_scale = run["cfg"],
          .x = golden.get(c10::str(prefix, "call", call, ".x")),
          .sigma = golden.get(prefix + "denoiser_sigmas")[call][0].item<double>(),
          .sag = test::sag_of(run)};
}

const std::vector<std::string> kParts = {"cond_denoised", "uncond_denoised", "cfg_result",
                                         "degraded",      "degraded_noised", "sag",
                                         "result"};

using RunTest = testing::TestWithParam<std::tuple<const char*, json>>;
std::string run_name(const testing::TestParamInfo<std::tuple<const char*, json>>& info) {
  return test::test_name(std::get<1>(info.param), std::get<0>(info.param));
}

class ComfyUiCalls : public RunTest {};

// Returns the largest difference, as a share of the part's largest value.
double expect_parts(const Call& call, const json& run, const test::Golden& golden,
                    const std::string& prefix, double tolerance) {
  double worst = 0;
  const auto expect_near = [&](const torch::Tensor& actual, const std::string& part,
                               const char* what) {
    const auto expected = golden.get(prefix + part);
    const auto relative = max_diff(actual, expected) / largest(expected);
    EXPECT_LT(relative, tolerance) << what;
    worst = std::max(worst, relative);
  };
  for (const auto& part : kParts) {
    if (run["sag"]["scale"] == 0 && (part == "degraded_noised" || part == "sag")) {
      EXPECT_FALSE(call.tensors.contains(part)) << "nothing to evaluate at scale 0";
      continue;
    }
    expect_near(call.tensors.at(part), part, part.c_str());
  }
  expect_near(call.result, "result", "patched");
  return worst;
}

TEST_P(ComfyUiCalls, AreReproducedPartByPart) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(run["file"], device);
  const ModelPatcher model(test::load_unet(run["unet"], device), test::sampling_of(run));
  const auto prefix = run["key_prefix"].get<std::string>();
  const double tolerance = device.is_cuda() ? 1e-4 : test::kGoldenTolerance;
  double worst = 0;
  for (const std::int64_t number : run["detail_calls"]) {
    SCOPED_TRACE(c10::str("call ", number));
    const auto call = evaluate(model, call_input(run, golden, number));
    const auto token_sums = golden.get(prefix + "token_sums")[number];
    EXPECT_LT(max_diff(call.map, token_sums), test::kTokenSumTolerance);
    const auto clear = (token_sums - 1).abs() > test::kTokenSumTolerance;
    EXPECT_FALSE((((call.map > 1) != (token_sums > 1)) & clear).any().item<bool>());
    worst = std::max(
        worst, expect_parts(call, run, golden, c10::str(prefix, "call", number, "."), tolerance));
  }
  RecordProperty("relative_difference", c10::str(worst));
}

// ComfyUI's calls of flow models are wrong, see ComfyUiFault in golden_test.cpp.
std::vector<json> runs_with_calls() {
  std::vector<json> runs;
  for (const auto& run : golden_index()["comfyui_runs"])
    if (!run.value("detail_calls", json::array()).empty() && !test::is_faulty(run))
      runs.push_back(run);
  return runs;
}
INSTANTIATE_TEST_SUITE_P(Golden, ComfyUiCalls,
                         testing::Combine(test::backends(), testing::ValuesIn(runs_with_calls())),
                         run_name);

TEST(ComfyUiCallData, CoversEveryPredictionAndNetwork) {
  std::map<std::string, int> of;
  for (const auto& run : runs_with_calls()) {
    ++of[run["unet"]];
    ++of[run["prediction"]];
  }
  EXPECT_GE(of["comfy_sd15_tiny.ts"], 25);
  EXPECT_GE(of["comfy_sdxl_tiny.ts"], 5);
  EXPECT_GE(of["comfy_sd2v_tiny.ts"], 3);
  EXPECT_GE(of["flow"], 4);
}

// In half precision, with the golden's mask. A flipped cell changes the picture by more than
// rounding, so the masks are compared on their own: they may differ only next to the threshold.
struct HalfBounds {
  // A share of its largest value.
  double prediction;
  // Likewise, for the CFG result of two predictions.
  double cfg;
  // How far from 1 the token sum of a cell that flips may be.
  double mask_margin;
};

// Seen in fp16: predictions up to 2.5e-3 off, CFG results 1.0e-2, token sums 5e-3, no cell flipped.
// bf16 keeps three bits fewer: predictions up to 1.8e-2 off in LibTorch's own kernels, 2.2e-2 with
// channels last, token sums 7e-2, one cell flipped, 2.6e-2 from 1; and CFG at 7.5 adds up 7.5 and
// 6.5 times the rounding of two predictions: 6.1e-2.
HalfBounds bounds_of(torch::ScalarType dtype) {
  if (dtype == torch::kHalf) return {.prediction = 2e-2, .cfg = 2e-2, .mask_margin = 1e-2};
  return {.prediction = 2e-2, .cfg = 8e-2, .mask_margin = 5e-2};
}

class HalfPrecisionCall
    : public testing::TestWithParam<std::tuple<torch::ScalarType, const char*>> {};

TEST_P(HalfPrecisionCall, LiesNearTheReference) {
  // On a CPU half precision is about 60 times slower.
  const torch::Device device("cuda");
  SAG_SKIP_WITHOUT_CUDA(device);
  const auto& [dtype, id] = GetParam();
  const auto& runs = golden_index()["comfyui_runs"];
  const auto& run =
      *std::find_if(runs.begin(), runs.end(), [id = id](const json& r) { return r["id"] == id; });
  const test::Golden golden(run["file"], device);
  const auto model = [&, dtype = dtype](std::optional<bool> channels_last) {
    const auto path = test::kGoldenDir + run["unet"].get<std::string>();
    return ModelPatcher(
        TorchScriptUNet::load(path,
                              {.device = device, .dtype = dtype, .channels_last = channels_last}),
        test::sampling_of(run));
  };
  const auto prefix = run["key_prefix"].get<std::string>();
  const auto token_sums = golden.get(prefix + "token_sums")[0];
  auto in = call_input(run, golden, 0);
  in.given_map = token_sums;
  const auto call = evaluate(model({}), in);
  // The contiguous network runs only LibTorch's kernels: what they lose is due to the dtype.
  const auto plain = evaluate(model(false), in);

  const auto bounds = bounds_of(dtype);
  for (const auto& part : kParts) {
    const auto expected = golden.get(prefix + "call0." + part);
    const auto error = [&](const Call& of) {
      return max_diff(of.tensors.at(part), expected) / largest(expected);
    };
    const bool after_cfg = part == "cfg_result" || part == "result";
    const double bound = after_cfg ? bounds.cfg : bounds.prediction;
    EXPECT_LT(error(plain), bound) << part;
    // The largest of many rounding errors varies by chance with the layout, by up to 1.4 times as
    // seen.
    EXPECT_LT(error(call), std::max(bound, 1.5 * error(plain))) << part;
    RecordProperty(part, c10::str(error(call), ", LibTorch's kernels ", error(plain)));
  }
  const auto flipped = (call.map > 1) != (token_sums > 1);
  const auto margins = (token_sums - 1).abs().masked_select(flipped);
  const double margin = margins.numel() > 0 ? largest(margins) : 0;
  EXPECT_LT(margin, bounds.mask_margin) << margins.numel() << " cells flipped";
  RecordProperty("token_sums_difference", c10::str(max_diff(call.map, token_sums)));
  RecordProperty("flipped_cells", c10::str(margins.numel(), ", up to ", margin, " from 1"));
}

INSTANTIATE_TEST_SUITE_P(
    Golden, HalfPrecisionCall,
    testing::Combine(testing::Values(torch::kHalf, torch::kBFloat16),
                     testing::Values("eps_euler_normal/reference", "v_euler_normal/reference",
                                     "sdxl_euler_normal/reference",
                                     "flow_euler_simple/alpha_corrected", "grid_24x17/true_grid")),
    [](const auto& info) {
      return test::test_name(json{{"id", std::get<1>(info.param)}},
                             c10::toString(std::get<0>(info.param)));
    });

// diffusers' steps with every scheduler that it accepts for SAG. The scheduler only moves the
// latent on, so a step needs only its latent.
class DiffusersSteps : public RunTest {};

TEST_P(DiffusersSteps, AreReproducedOneByOne) {
  const auto& [device_name, run] = GetParam();
  const torch::Device device(device_name);
  SAG_SKIP_WITHOUT_CUDA(device);
  const test::Golden golden(run["file"], device);
  const bool v = run["prediction_type"] == "v_prediction";
  const auto sampling = ModelSampling::discrete(v ? Prediction::v : Prediction::eps);
  const ModelPatcher model(test::load_unet(run["unet"], device), sampling);
  const Conditioning cond{.context = golden.get("cond")}, uncond{.context = golden.get("uncond")};
  const bool cfg = run["guidance_scale"] > 1;
  const double tolerance = device.is_cuda() ? 1e-4 : test::kGoldenTolerance;
  const auto alphas_cumprod = golden.numbers("alphas_cumprod");
  const auto timesteps = golden.numbers("timesteps");

  for (std::size_t i = 0; i < timesteps.size(); ++i) {
    const auto part = [&](const char* name) { return golden.get(c10::str("step", i, ".", name)); };
    // Most runs keep only their first step.
    if (!part("latents_in").defined()) break;
    SCOPED_TRACE(c10::str("step ", i));
    const double sigma = std::sqrt((1 - alphas_cumprod[i]) / alphas_cumprod[i]);
    const double scale = std::sqrt(1 + sigma * sigma);
    EXPECT_EQ(sampling.timestep(sigma), timesteps[i]);
    const auto call =
        evaluate(model, {.positive = cfg ? std::vector{cond} : std::vector<Conditioning>{},
                         .negative = {cfg ? uncond : cond},
                         .cond_scale = cfg ? run["guidance_scale"].get<double>() : 1.0,
                         .x = part("latents_in") * scale,
                         .sigma = sigma,
                         .sag = {.scale = run["sag_scale"], .blur_sigma = run["blur_sigma"]}});
    const auto& ours = call.tensors;
    const auto expect_near = [&](const torch::Tensor& actual, const torch::Tensor& expected) {
      EXPECT_LT(max_diff(actual, expected), tolerance * largest(expected));
    };
    EXPECT_LT(max_diff(call.map, golden.get("token_sums")[static_cast<std::int64_t>(i)]),
              test::kTokenSumTolerance);
    expect_near(ours.at("uncond_denoised"), part("pred_x0"));
    expect_near(ours.at("degraded_noised") / scale, part("degraded_latents"));
    // It adds the difference of two outputs, which for v is not that of two noises: its result
    // differs from ours by scale · (1 − ᾱ) · (degraded − x0), see docs/parity.md.
    const double bias = v ? run["sag_scale"].get<double>() * (1 - alphas_cumprod[i]) : 0;
    const auto theirs =
        sampling.calculate_denoised(sigma, part("noise_pred"), part("latents_in") * scale);
    expect_near(call.result - bias * (ours.at("degraded") - ours.at("uncond_denoised")), theirs);
    if (v) {
      EXPECT_GT(max_diff(call.result, theirs), 100 * tolerance * largest(theirs));
    }
  }
}

std::vector<json> diffusers_runs_with_steps() {
  std::vector<json> runs;
  for (const auto& run : golden_index()["diffusers_runs"])
    if (!run.contains("error") && run["sag_scale"] > 0) runs.push_back(run);
  return runs;
}
INSTANTIATE_TEST_SUITE_P(Golden, DiffusersSteps,
                         testing::Combine(test::backends(),
                                          testing::ValuesIn(diffusers_runs_with_steps())),
                         run_name);

TEST(DiffusersData, HasEveryScheduler) {
  std::set<std::string> schedulers;
  for (const auto& run : diffusers_runs_with_steps()) {
    const test::Golden golden(run["file"], torch::kCPU);
    EXPECT_TRUE(golden.get("step0.latents_in").defined()) << run["id"];
    schedulers.insert(run["scheduler"].get<std::string>());
  }
  EXPECT_EQ(schedulers, (std::set<std::string>{"DDIM", "DDIM_trailing", "DPMSolverMultistep",
                                               "PNDM", "UniPCMultistep"}));
}

// small_latents of golden/toy.json: ComfyUI throws, because it finds no grid for 1 to 3 tokens;
// ours guides. Neither guides with a side of 4 or less.
TEST(SmallLatents, AreGuidedWhereTheReferenceThrows) {
  const auto run = test::variant_of(json{{"case", "eps_euler_normal"}}, "reference");
  const test::Golden golden(run["file"], torch::kCPU);
  const ModelPatcher plain(test::load_unet(run["unet"], torch::kCPU), test::sampling_of(run));
  const auto guided = apply_self_attention_guidance(plain, {.scale = 0.75});
  const Conditioning cond{.context = golden.get("cond")}, uncond{.context = golden.get("uncond")};
  int thrown = 0;
  for (const auto& entry : test::toy_entries("small_latents")) {
    const std::int64_t height = entry.at("params").at("latent")[0],
                       width = entry.at("params").at("latent")[1];
    SCOPED_TRACE(c10::str(height, " x ", width));
    const auto x = test::fill({1, 4, height, width}, .7, .3, 6);
    CfgGuider guider(guided, {cond}, {uncond}, {.cond_scale = 7});
    const auto denoised = guider(x, 4);
    EXPECT_TRUE(denoised.isfinite().all().item<bool>());
    const bool thin = std::min(height, width) <= 4;
    EXPECT_EQ(guider.report().guided(), thin ? 0 : 1);
    if (thin) {
      EXPECT_TRUE(
          torch::equal(denoised, CfgGuider(plain, {cond}, {uncond}, {.cond_scale = 7})(x, 4)));
    }
    thrown += entry.at("value") == "throws";
  }
  EXPECT_EQ(thrown, 5);
}

// PAG: its own extra pass has the attention of the middle replaced by v. Together with SAG, on a
// network with many attentions, each contributes what it does alone, whichever was installed first.
TEST(PerturbedAttention, AddsUpWithSagOnARealUNet) {
  const auto run = test::variant_of(json{{"case", "eps_euler_normal"}}, "reference");
  const test::Golden golden(run["file"], torch::kCPU);
  const auto in = call_input(run, golden, 0);
  const ModelPatcher base(test::load_unet(run["unet"], torch::kCPU), test::sampling_of(run));
  const Owner pag("pag");
  bool perturbed = false;
  const auto with_pag = [&](const ModelPatcher& model) {
    auto patched = model.clone();
    patched.set_attn1_replace(
        [&, pag](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
          const auto plain = next(call);
          if (pass.rows(Branch::cond, pag).empty()) return plain;
          perturbed = max_diff(call.v, plain) > 0.1;
          return call.v;
        },
        {"middle", 0, 0});
    patched.set_post_cfg_function([pag](const PostCfgArgs& args) {
      return args.denoised + 3 * (args.cond_denoised - args.predict(args.x, Branch::cond, pag));
    });
    return patched;
  };
  const auto with_sag = [&](const ModelPatcher& model) {
    return apply_self_attention_guidance(model, in.sag);
  };
  const auto denoise = [&](const ModelPatcher& model) {
    return CfgGuider(model, in.positive, in.negative, {.cond_scale = in.cond_scale})(in.x,
                                                                                     in.sigma);
  };
  const auto plain = denoise(base);
  const auto by_sag = denoise(with_sag(base)) - plain, by_pag = denoise(with_pag(base)) - plain;
  const double scale = largest(plain);
  EXPECT_TRUE(perturbed);
  EXPECT_GT(largest(by_pag), 1e-2 * scale);
  EXPECT_GT(largest(by_sag), 1e-2 * scale);
  EXPECT_LT(max_diff(denoise(with_pag(with_sag(base))), plain + by_sag + by_pag),
            test::kGoldenTolerance * scale);
  EXPECT_LT(max_diff(denoise(with_sag(with_pag(base))), plain + by_sag + by_pag),
            test::kGoldenTolerance * scale);
}

}  // namespace
}  // namespace sag

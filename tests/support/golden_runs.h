#pragma once

// The entries of golden/index.json: what was run, and what our counterpart of it is.

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include "sag/attention_map.h"
#include "sag/model_patcher.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/files.h"
#include "support/golden.h"

namespace sag::test {

/// Five times what rounding alone was measured to do to these runs, of the largest value.
constexpr double kGoldenTolerance = 2e-5;
/// The same for token sums, absolute; nearer to 1 than this a mask may flip.
constexpr double kTokenSumTolerance = 1e-4;

inline const nlohmann::json& golden_index() {
  static const auto parsed = nlohmann::json::parse(read_bytes(kGoldenDir + "index.json"));
  return parsed;
}

/// Returns the run of the same case in another variant.
inline const nlohmann::json& variant_of(const nlohmann::json& run, const std::string& variant) {
  const auto& runs = golden_index()["comfyui_runs"];
  return *std::find_if(runs.begin(), runs.end(), [&](const auto& other) {
    return other["case"] == run["case"] && other["variant"] == variant;
  });
}

inline const nlohmann::json& diffusers_run(const std::string& id) {
  const auto& runs = golden_index()["diffusers_runs"];
  return *std::find_if(runs.begin(), runs.end(), [&](const auto& run) { return run["id"] == id; });
}

/// Whether ComfyUI did the wrong thing in this run: it threw, it folded the tokens into a wrong
/// grid, or it re-noised a flow model's latent without 1 − σ.
inline bool is_faulty(const nlohmann::json& run) {
  using nlohmann::json;
  return run["variant"] == "reference" &&
         (run.contains("error") || run["prediction"] == "flow" ||
          run.value("reference_grid", json()) != run.value("true_grid", json()));
}

/// Returns the same run with the fault mended: what ours must equal.
inline const nlohmann::json& mended(const nlohmann::json& faulty) {
  return variant_of(faulty, faulty["prediction"] == "flow" ? "alpha_corrected" : "true_grid");
}

/// One network per file, device and dtype.
inline std::shared_ptr<TorchScriptUNet> load_unet(const std::string& file, torch::Device device,
                                                  torch::ScalarType dtype = torch::kFloat) {
  static std::map<std::string, std::shared_ptr<TorchScriptUNet>> loaded;
  auto& unet = loaded[c10::str(file, device, dtype)];
  if (!unet) {
    unet = TorchScriptUNet::load(kGoldenDir + file, {.device = device, .dtype = dtype});
  }
  return unet;
}

inline ModelSampling sampling_of(const nlohmann::json& run) {
  if (run["prediction"] == "flow") {
    return ModelSampling::flow(
        {.shift = run["flow"]["shift"], .multiplier = run["flow"]["multiplier"]});
  }
  return ModelSampling::discrete(parse_prediction(run["prediction"].get<std::string>()));
}

inline SelfAttentionGuidanceOptions sag_of(const nlohmann::json& run) {
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

/// Returns a hook that appends the token sums of the main pass's unconditional rows to `maps`.
inline AttentionHook map_recorder(std::vector<torch::Tensor>& maps) {
  return [&maps](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
    for (const auto& rows : pass.rows(Branch::uncond))
      maps.push_back(
          attention_map(pass.select(rows, call.q), pass.select(rows, call.k), call.scale));
    return next(call);
  };
}

/// The name of a test on one run and device.
inline std::string test_name(const nlohmann::json& run, const std::string& suffix) {
  auto name = run["id"].get<std::string>() + "_" + suffix;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
}

}  // namespace sag::test

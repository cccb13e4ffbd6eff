// The shipped model: small, clean, and it samples.

#include <filesystem>
#include <regex>

#include <caffe2/serialize/inline_container.h>
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/noise.h"
#include "sag/sample.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"
#include "support/files.h"
#include "support/reference.h"

namespace sag {
namespace {

using test::kModelDir;

TEST(DemoModel, IsAtMost16MiB) {
  std::uintmax_t bytes = 0;
  for (const auto& file : std::filesystem::recursive_directory_iterator(kModelDir))
    if (file.is_regular_file()) bytes += file.file_size();
  EXPECT_LE(bytes, 16u << 20);
}

TEST(DemoModel, ArchivesTellNothingOfTheMachineThatMadeThem) {
  const std::regex machine(R"((/root|/home|/tmp|/usr|/opt|\.py\b|site-packages))");
  for (const char* name : {"unet.ts", "text_encoder.ts"}) {
    caffe2::serialize::PyTorchStreamReader reader(kModelDir + name);
    for (const auto& record : reader.getAllRecords()) {
      EXPECT_EQ(record.find("debug_pkl"), std::string::npos) << name << ": " << record;
      if (record.find(".storage/") != std::string::npos || record.starts_with("data/") ||
          record.starts_with("constants/"))
        continue;  // weights
      const auto [data, size] = reader.getRecord(record);
      const std::string text(static_cast<const char*>(data.get()), size);
      EXPECT_FALSE(std::regex_search(text, machine)) << name << ": " << record;
    }
  }
}

TEST(DemoModel, DrawsAWordAndSagChangesIt) {
  auto encoder = torch::jit::load(kModelDir + "text_encoder.ts");
  const auto encode = [&](const std::string& text) {
    return encoder.get_method("encode")({text}).toTensor().to(torch::kFloat);
  };
  const auto unet = TorchScriptUNet::load(kModelDir + "unet.ts");
  const ModelPatcher model(
      unet, ModelSampling::edm({.sigma_data = 0.5, .sigma_min = 0.02, .sigma_max = 60}));
  const auto sigmas = get_sigmas("karras", model.model_sampling(), 4);
  const auto draw = [&](const ModelPatcher& patched, const std::string& prompt) {
    CfgGuider guider(patched, {{.context = encode(prompt)}}, {{.context = encode("")}},
                     {.cond_scale = 2});
    const std::vector<std::uint64_t> seeds = {7};
    const auto noise = SeededNoise(seeds).draw({3, 64, 64}, torch::kCPU);
    return sample(guider, noise, {.sigmas = sigmas});
  };
  const auto plain = draw(model, "red heart");
  EXPECT_TRUE(plain.isfinite().all().item<bool>());
  EXPECT_GT(test::max_diff(plain, draw(model, "tiger face")), 0.1);
  EXPECT_GT(
      test::max_diff(plain, draw(apply_self_attention_guidance(model, {.scale = 1}), "red heart")),
      1e-3);
}

}  // namespace
}  // namespace sag

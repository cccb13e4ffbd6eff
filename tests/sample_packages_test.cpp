// The command sag-sample with compiled UNets. The packages are written by aoti_fixture.py.

#include <filesystem>
#include <fstream>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "command.h"
#include "command_line.h"
#include "errors.h"
#include "files/tensor_file.h"
#include "support/files.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

const std::string kPackages = SAG_PACKAGES "/";

class SamplePackages : public testing::Test {
 protected:
  SamplePackages() {
    for (const int seed : {1, 2}) {
      torch::manual_seed(seed);
      save(c10::str("cond", seed), torch::randn({1, 3, 6}));
      save(c10::str("y", seed), torch::randn({1, 5}));
    }
  }

  std::string path(const std::string& name) const { return folder_.path(name); }
  void save(const std::string& name, const torch::Tensor& t) const {
    folder_.write(name, tensor_file_bytes(t));
  }

  static std::string run(std::vector<std::string> arguments) {
    std::ostringstream out;
    if (const auto choices = parse_command_line(arguments, out)) run_command(*choices, out);
    return out.str();
  }

  /// Samples latents of height 12, and returns them.
  torch::Tensor sample(std::vector<std::string> arguments, const char* width = "16") const {
    for (const char* argument : {"--height", "12", "--width", width, "--steps", "3", "--sag-scale",
                                 "0.75", "--quiet", "--batch", "1"})
      arguments.push_back(argument);
    for (const auto& [option, name] :
         {std::pair{"--cond", "cond1"}, std::pair{"--uncond", "cond2"}, std::pair{"--cond-y", "y1"},
          std::pair{"--uncond-y", "y2"}, std::pair{"--save-latent", "latent"}}) {
      arguments.push_back(option);
      arguments.push_back(path(name));
    }
    run(arguments);
    return read_tensor("latent", path("latent"));
  }

 private:
  sag::test::TemporaryFolder folder_;
};

TEST_F(SamplePackages, GiveTheLatentsOfTheTorchScriptFile) {
  const auto expected = sample({"--unet", kPackages + "unet.ts", "--device", "cpu"});
  EXPECT_FALSE(
      expected.equal(sample({"--unet", kPackages + "unet.ts", "--device", "cpu", "--no-sag"})));
  // On the device that they were compiled for, whatever there is here.
  for (const char* unet : {"unet.pt2", "folder"}) {
    const auto got = sample({"--unet", kPackages + unet});
    EXPECT_LE((got - expected).abs().max().item<double>(),
              2e-5 * expected.abs().max().item<double>())
        << unet;
  }
}

TEST_F(SamplePackages, MayBeNamedByAModel) {
  const auto expected = sample({"--unet", kPackages + "unet.pt2"});
  for (const char* unet : {"unet.pt2", "folder"}) {
    fs::remove(path(unet));
    fs::create_symlink(fs::absolute(kPackages + unet), path(unet));
    std::ofstream(path("model.json")) << c10::str(
        R"({"format": 1, "prediction": "eps", "sample": {"shape": [4, 12, 16], "multiple": 2},
            "files": {"unet": ")",
        unet, R"("}, "defaults": {"cfg": 7.5}})");
    const auto got = sample({"--model", path("")});
    EXPECT_LE((got - expected).abs().max().item<double>(),
              2e-5 * expected.abs().max().item<double>())
        << unet;
  }
}

TEST_F(SamplePackages, ListTheirSites) {
  for (const char* unet : {"unet.pt2", "folder"}) {
    const auto listed = run({"--unet", kPackages + unet, "--list-sites"});
    EXPECT_THAT(listed, AllOf(HasSubstr("middle.0.0"), HasSubstr("input.1.0"), HasSubstr("#2"),
                              HasSubstr("middle_block.1.transformer_blocks.0.attn1")));
  }
}

TEST_F(SamplePackages, RefuseWhatWasDecidedWhenTheyWereCompiled) {
  const std::string unet = kPackages + "unet.pt2";
  EXPECT_NO_THROW(run({"--unet", unet, "--list-sites", "--dtype", "fp32"}));
  EXPECT_NO_THROW(run({"--unet", unet, "--list-sites", "--channels-last", "auto"}));
  EXPECT_THAT(
      [&] {
        run({"--unet", unet, "--list-sites", "--dtype", "fp16"});
      },
      ThrowsMessage<UsageError>(HasSubstr("--dtype fp16")));
  EXPECT_THAT(
      [&] {
        run({"--unet", unet, "--list-sites", "--channels-last", "on"});
      },
      ThrowsMessage<UsageError>(HasSubstr("--channels-last")));
  EXPECT_THAT(
      [&] {
        run({"--unet", kPackages + "no_such_folder", "--list-sites"});
      },
      ThrowsMessage<UsageError>(HasSubstr("there is no file")));
  EXPECT_THAT(
      [&] {
        sample({"--unet", kPackages + "foreign/one_site.pt2", "--site", "input.1.0"});
      },
      ThrowsMessage<UsageError>(HasSubstr("export it with --site for another")));
  EXPECT_THAT(
      [&] {
        sample({"--unet", unet}, "15");
      },
      ThrowsMessage<c10::ValueError>(HasSubstr("in steps of 2")));
}

}  // namespace
}  // namespace sag_sample

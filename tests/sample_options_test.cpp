// The command line of sag-sample, and what it and a model directory decide together.
#include <fstream>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "errors.h"
#include "inputs.h"
#include "options.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "settings.h"

namespace sag_sample {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

Options parse(std::vector<std::string> arguments) {
  std::ostringstream out;
  return parse_options(arguments, out).value();
}

// The arguments after a model and an output.
Options parse_more(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {"--model", "m", "--out", "o.png"});
  return parse(arguments);
}

std::string mistake(const std::vector<std::string>& arguments) {
  try {
    parse(arguments);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

std::string mistake_in_more(const std::vector<std::string>& arguments) {
  try {
    parse_more(arguments);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

Options tensors_with(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(),
                   {"--unet", SAG_SOURCE_DIR "/CMakeLists.txt", "--save-latent", "l.pt"});
  return parse(arguments);
}

TEST(SampleOptions, LeavesOpenWhatIsNotGiven) {
  const auto options = parse_more({});
  EXPECT_FALSE(options.steps);
  EXPECT_FALSE(options.sag_scale);
  EXPECT_FALSE(options.sampler);
  EXPECT_EQ(options.seed, 0u);
}

TEST(SampleOptions, ReadsNegativeNumbersAndInfinity) {
  const auto options = parse_more({"--sag-scale", "-1", "--cfg=-2.5", "--sag-start", "inf"});
  EXPECT_EQ(options.sag_scale, -1.0);
  EXPECT_EQ(options.cfg, -2.5);
  EXPECT_EQ(options.sag_start, std::numeric_limits<double>::infinity());
}

TEST(SampleOptions, KeepsEveryPromptAlsoEmptyOnes) {
  const auto options =
      parse_more({"--prompt", "red heart", "--prompt", "", "--prompt=", "--prompt", "-x"});
  EXPECT_THAT(options.prompts, ElementsAre("red heart", "", "", "-x"));
}

TEST(SampleOptions, LaterValuesReplaceEarlierOnes) {
  EXPECT_EQ(parse_more({"--steps", "3", "--steps", "4"}).steps, 4);
}

TEST(SampleOptions, TakesTheLargestSeed) {
  EXPECT_EQ(parse_more({"--seed", "18446744073709551615"}).seed, 18446744073709551615u);
}

TEST(SampleOptions, SaysWhatANumberMustBe) {
  EXPECT_EQ(mistake_in_more({"--steps", "0"}),
            "--steps must be a whole number between 1 and 10000, got 0.");
  EXPECT_EQ(mistake_in_more({"--steps", "1.5"}),
            "--steps must be a whole number between 1 and 10000, got 1.5.");
  EXPECT_EQ(mistake_in_more({"--cfg", "nan"}), "--cfg must be a finite number, got nan.");
  EXPECT_EQ(mistake_in_more({"--sag-blur", "-1"}),
            "--sag-blur must be a number of at least 0, got -1.");
  EXPECT_EQ(mistake_in_more({"--denoise", "0"}),
            "--denoise must be a number greater than 0 and at most 1, got 0.");
  EXPECT_EQ(mistake_in_more({"--sag-kernel", "4"}),
            "--sag-kernel must be an odd whole number, or 0, got 4.");
}

TEST(SampleOptions, NamesUnknownAndIncompleteOptions) {
  EXPECT_EQ(mistake_in_more({"--stepz", "3"}), "There is no option --stepz; --help lists them.");
  EXPECT_EQ(mistake_in_more({"heart"}), "\"heart\" belongs to no option.");
  EXPECT_EQ(mistake_in_more({"--steps"}), "--steps needs a value.");
  EXPECT_THAT(mistake_in_more({"--sampler", "plms"}), HasSubstr("--sampler must be one of euler"));
}

TEST(SampleOptions, RefusesWhatDoesNotGoTogether) {
  EXPECT_EQ(mistake({"--out", "x.png"}), "One of --model and --unet is needed.");
  EXPECT_EQ(mistake({"--model", "m", "--unet", "u", "--out", "x"}),
            "--model and --unet cannot be given together.");
  EXPECT_EQ(mistake({"--model", "m"}), "Nothing to write: give --out, --save-latent or --json.");
  EXPECT_NE(mistake_in_more({"--prompt", "a", "--cond", "c.pt"}), "");
  EXPECT_NE(mistake_in_more({"--sigmas", "s.pt", "--steps", "3"}), "");
  EXPECT_NE(mistake_in_more({"--mask", "m.pt"}), "");
  EXPECT_NE(mistake_in_more({"--compare", "--no-sag"}), "");
  EXPECT_NE(mistake_in_more({"--sag-one-pass", "--no-sag"}), "");
  EXPECT_NE(mistake_in_more({"--sag-interval", "2", "--no-sag"}), "");
  EXPECT_NE(mistake_in_more({"--sag-shuffle", "--no-sag"}), "");
  EXPECT_NE(mistake_in_more({"--cond-y", "y.pt"}), "");
  EXPECT_NE(mistake_in_more({"--sag-start", "3", "--sag-start-percent", "0.1"}), "");
}

TEST(SampleOptions, ListSitesNeedsNoOutput) {
  EXPECT_TRUE(parse({"--model", "m", "--list-sites"}).list_sites);
}

TEST(SampleOptions, HelpShowsGroupsDefaultsAndChoices) {
  std::ostringstream out;
  EXPECT_FALSE(parse_options({"--help"}, out));
  EXPECT_THAT(out.str(), HasSubstr("Self-attention guidance:"));
  EXPECT_THAT(out.str(), HasSubstr("[the model's, else 20]"));
  EXPECT_THAT(out.str(), HasSubstr("--sampler help lists them"));
}

TEST(SampleOptions, ListsSamplersAndSchedules) {
  for (const auto& arguments : std::vector<std::vector<std::string>>{
           {"--sampler", "help"}, {"--model", "m", "--sampler=help"}}) {
    std::ostringstream out;
    EXPECT_FALSE(parse_options(arguments, out));
    EXPECT_EQ(out.str(), fmt::format("{}\n", fmt::join(sag::sampler_names(), "\n")));
  }
  std::ostringstream out;
  EXPECT_FALSE(parse_options({"--schedule", "help"}, out));
  EXPECT_EQ(out.str(), fmt::format("{}\n", fmt::join(sag::schedule_names(), "\n")));
}

TEST(SampleOptions, VersionIsOneLine) {
  std::ostringstream out;
  EXPECT_FALSE(parse_options({"--version"}, out));
  EXPECT_THAT(out.str(), testing::StartsWith("sag-sample "));
}

TEST(SampleSettings, DefaultsAreTheLibrarys) {
  const auto settings = decide_settings(tensors_with({"--device", "cpu"}), nullptr);
  const sag::SelfAttentionGuidanceOptions defaults;
  EXPECT_EQ(settings.guidance.scale, defaults.scale);
  EXPECT_EQ(settings.guidance.blur_sigma, defaults.blur_sigma);
  EXPECT_EQ(settings.guidance.threshold, defaults.threshold);
  EXPECT_EQ(settings.guidance.kernel_size, defaults.kernel_size);
  EXPECT_EQ(settings.guidance.site.name(), "middle.0.0");
  EXPECT_EQ(settings.prediction, "eps");
  EXPECT_NEAR(settings.sampling.sigma_max(), 14.6146, 1e-3);
}

TEST(SampleSettings, CommandLineCountsBeforeTheModel) {
  ModelDirectory model;
  model.prediction = "edm";
  model.sigma_max = 60.0;
  model.shape = {3, 64, 64};
  model.multiple = 8;
  model.defaults.steps = 12;
  model.defaults.cfg = 2.0;
  model.defaults.sag_scale = 1.0;
  const auto options =
      parse_more({"--device", "cpu", "--cfg", "4", "--width", "96", "--sag-blur", "3"});
  const auto settings = decide_settings(options, &model);
  EXPECT_EQ(settings.cfg, 4.0);
  EXPECT_EQ(settings.steps, 12);
  EXPECT_EQ(settings.guidance.scale, 1.0);
  EXPECT_EQ(settings.guidance.blur_sigma, 3.0);
  EXPECT_THAT(settings.shape, ElementsAre(3, 64, 96));
  EXPECT_NEAR(settings.sampling.sigma_max(), 60.0, 1e-3);
  EXPECT_THROW(check_latent_size(settings, "The latent", 3, 60, 64), UsageError);
  EXPECT_THROW(check_latent_size(settings, "The latent", 4, 64, 64), UsageError);
}

TEST(SampleSettings, RefusesConstantsOfAnotherPredictionAndBadDevices) {
  EXPECT_THROW(decide_settings(tensors_with({"--shift", "3"}), nullptr), UsageError);
  EXPECT_THROW(decide_settings(tensors_with({"--sigma-data", "1"}), nullptr), UsageError);
  EXPECT_THROW(decide_settings(tensors_with({"--device", "tpu"}), nullptr), UsageError);
  EXPECT_THROW(decide_settings(tensors_with({"--device", "cuda:99"}), nullptr), UsageError);
  EXPECT_THROW(decide_settings(tensors_with({"--device", "cuda:x"}), nullptr), UsageError);
  EXPECT_THROW(decide_settings(tensors_with({"--sag-start", "1", "--sag-end", "2"}), nullptr),
               UsageError);
}

TEST(SamplePictures, EqualPromptsGetConsecutiveSeeds) {
  const auto pictures = list_pictures(parse_more({"--prompt", "a", "--prompt", "b", "--prompt", "a",
                                                  "--batch", "2", "--seed", "5"}),
                                      1);
  std::vector<std::uint64_t> seeds;
  for (const auto& picture : pictures) seeds.push_back(picture.seed);
  EXPECT_THAT(seeds, ElementsAre(5, 6, 5, 6, 7, 8));
  EXPECT_EQ(pictures[2].label, "b, seed 5");
}

TEST(SamplePictures, EmptyPromptsAreUnconditionalUnlessThereIsANegativeOne) {
  const auto pictures =
      list_pictures(parse_more({"--prompt", "", "--prompt", "a", "--unconditional", "2"}), 1);
  ASSERT_EQ(pictures.size(), 4u);
  EXPECT_TRUE(pictures[0].unconditional);
  EXPECT_EQ(pictures[0].label, "seed 0");
  EXPECT_FALSE(pictures[1].unconditional);
  EXPECT_EQ(pictures[1].label, "a");
  EXPECT_EQ(pictures[3].label, "seed 2");
  EXPECT_FALSE(
      list_pictures(parse_more({"--prompt", "", "--negative", "b"}), 1).front().unconditional);
}

}  // namespace
}  // namespace sag_sample

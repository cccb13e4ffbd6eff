// The command line of sag-sample, and what it and a model directory decide together.
#include <limits>
#include <set>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "command_line.h"
#include "errors.h"
#include "further_inputs.h"
#include "inputs.h"
#include "model_directory.h"
#include "options.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "settings.h"

namespace sag_sample {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

Choices parse(std::vector<std::string> arguments) {
  std::ostringstream out;
  return parse_command_line(arguments, out).value();
}

// The arguments after a model and an output.
Choices parse_more(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {"--model", "m", "--out", "o.png"});
  return parse(arguments);
}

PictureOptions pictures_of(std::vector<std::string> arguments) {
  return picture_options().decide(parse_more(std::move(arguments)));
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

Choices tensors_with(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(),
                   {"--unet", SAG_SOURCE_DIR "/CMakeLists.txt", "--save-latent", "l.pt"});
  return parse(arguments);
}

// An option of a guidance, as the report shows it.
Value option_of(const Guidance& guidance, const std::string& key) {
  for (const auto& [name, value] : guidance.options) {
    if (name == key) return value;
  }
  ADD_FAILURE() << key;
  return {};
}

// Of the only guidance.
Value sag_option(const Settings& settings, const std::string& key) {
  return option_of(settings.guidances.at(0), key);
}

TEST(SampleOptions, LeavesOpenWhatIsNotGiven) {
  const auto choices = parse_more({});
  EXPECT_FALSE(choices.contains("--steps"));
  EXPECT_FALSE(choices.contains("--sag-scale"));
  EXPECT_FALSE(choices.contains("--sampler"));
  EXPECT_EQ(choices.size(), 2u) << "--model and --out";
  EXPECT_EQ(picture_options().decide(choices).seed, 0u);
}

TEST(SampleOptions, ReadsNegativeNumbersAndInfinity) {
  const auto settings =
      decide_settings(tensors_with({"--cond", "c.pt", "--uncond", "u.pt", "--sag-scale", "-1",
                                    "--cfg=-2.5", "--sag-start", "inf"}),
                      nullptr);
  EXPECT_EQ(sag_option(settings, "scale"), Value(-1.0));
  EXPECT_EQ(settings.guider.cond_scale, -2.5);
  EXPECT_EQ(sag_option(settings, "sigma_start"), Value(std::numeric_limits<double>::infinity()));
}

TEST(SampleOptions, KeepsEveryPromptAlsoEmptyOnes) {
  const auto pictures = pictures_of(
      {"--prompt", "red heart", "--prompt", "", "--prompt=", "--prompt=a=", "--prompt", "-x"});
  EXPECT_THAT(pictures.prompts, ElementsAre("red heart", "", "", "a=", "-x"));
}

TEST(SampleOptions, LaterValuesReplaceEarlierOnes) {
  const auto choices = parse_more({"--steps", "3", "--steps", "4"});
  EXPECT_EQ(sampling_options().decide(choices).steps, 4);
}

TEST(SampleOptions, TakesTheLargestSeed) {
  EXPECT_EQ(pictures_of({"--seed", "18446744073709551615"}).seed, 18446744073709551615u);
}

TEST(SampleOptions, SaysWhatANumberMustBe) {
  EXPECT_EQ(mistake_in_more({"--steps", "0"}),
            "--steps must be a whole number between 1 and 10000, got 0.");
  EXPECT_EQ(mistake_in_more({"--steps", "1.5"}),
            "--steps must be a whole number between 1 and 10000, got 1.5.");
  EXPECT_EQ(mistake_in_more({"--cfg", "nan"}), "--cfg must be a finite number, got nan.");
  EXPECT_EQ(mistake_in_more({"--sag-blur", "-1"}),
            "--sag-blur must be a number of at least 0, got -1.");
  EXPECT_EQ(mistake_in_more({"--sag-start", "-1"}),
            "--sag-start must be a number of at least 0, or inf, got -1.");
  EXPECT_EQ(mistake_in_more({"--seed", "-1"}),
            "--seed must be a whole number between 0 and 18446744073709551615, got -1.");
  EXPECT_EQ(mistake_in_more({"--denoise", "0"}),
            "--denoise must be a number greater than 0 and at most 1, got 0.");
  EXPECT_EQ(mistake_in_more({"--sag-kernel", "4"}),
            "--sag-kernel must be an odd whole number, or 0, got 4.");
  EXPECT_EQ(mistake_in_more({"--out", ""}), "--out must not be empty.");
}

TEST(SampleOptions, SayWhereThePicturesTokensAre) {
  const auto settings =
      decide_settings(tensors_with({"--sag-tokens-before", "1", "--sag-tokens-after", "-1",
                                    "--sag-reduction", "2"}),
                      nullptr);
  EXPECT_EQ(sag_option(settings, "tokens_before"), Value(std::int64_t{1}));
  EXPECT_EQ(sag_option(settings, "tokens_after"), Value(std::int64_t{-1}));
  EXPECT_EQ(sag_option(settings, "reduction"), Value(std::int64_t{2}));

  const auto refused = [](const std::vector<std::string>& arguments) {
    try {
      decide_settings(tensors_with(arguments), nullptr);
    } catch (const UsageError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(refused({"--sag-tokens-before", "-1"}),
            "--sag-tokens-before -1, the rest, needs --sag-reduction, which says how many tokens "
            "the picture has.");
  EXPECT_EQ(
      refused({"--sag-tokens-before", "-1", "--sag-tokens-after", "-1", "--sag-reduction", "2"}),
      "Only one of --sag-tokens-before and --sag-tokens-after can be -1, the rest.");
  EXPECT_THAT(mistake_in_more({"--sag-tokens-before", "-2"}), HasSubstr("between -1 and"));
}

// A name that is given twice would be one option on the command line and in `Choices`.
TEST(SampleOptions, AreStatedOnce) {
  std::set<std::string> seen;
  for (const auto* group : all_options()) {
    for (const auto& option : group->options) {
      EXPECT_TRUE(seen.insert(option.id()).second) << option.id();
      EXPECT_FALSE(option.help.empty()) << option.id();
    }
  }
}

TEST(SampleOptions, NamesUnknownAndIncompleteOptions) {
  EXPECT_EQ(mistake_in_more({"--stepz", "3"}), "There is no option --stepz; do you mean --steps?");
  EXPECT_EQ(mistake_in_more({"heart"}), "\"heart\" belongs to no option.");
  EXPECT_EQ(mistake_in_more({"--steps"}), "--steps needs a value.");
  EXPECT_THAT(mistake_in_more({"--sampler", "plms"}), HasSubstr("--sampler must be one of euler"));
}

TEST(SampleOptions, RefusesWhatDoesNotGoTogether) {
  EXPECT_EQ(mistake({"--out", "x.png"}), "One of --checkpoint, --model and --unet is needed.");
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

TEST(SampleOptions, RefusesWhatTensorsDecide) {
  EXPECT_EQ(mistake_in_more({"--noise", "n.pt", "--width", "16"}),
            "--channels, --height and --width cannot be given together with --noise.");
  EXPECT_EQ(mistake_in_more({"--cond", "c.pt", "--cfg", "3"}), "--cfg 3 needs --uncond.");
  EXPECT_EQ(mistake_in_more({"--cond", "c.pt", "--cfg", "1"}), "");
}

TEST(SampleOptions, RefusesScalesWithoutTwoPredictions) {
  using Arguments = std::vector<std::string>;
  const auto mistake_with = [](const std::string& option, Arguments more) {
    more.insert(more.end(), {"--image", "a.png", option, "3"});
    return mistake_in_more(std::move(more));
  };
  const std::string texts = "a --prompt, or --cond and --uncond";
  const std::vector<std::pair<Arguments, std::string>> alone = {
      {{"--cond", "c.pt"}, "--uncond"},
      {{"--class", "1"}, "--uncond-class"},
      {{"--class", "1", "--uncond", "u.pt"}, texts},
      {{"--class", "1", "--unconditional", "2"}, texts},
      {{"--unconditional", "2"}, texts},
      {{"--uncond", "u.pt"}, texts},
      {{}, texts}};
  const std::vector<Arguments> both = {{"--prompt", "a"},
                                       {"--prompt", "a", "--unconditional", "2"},
                                       {"--prompt", "a", "--class", "1"},
                                       {"--cond", "c.pt", "--uncond", "u.pt"},
                                       {"--class", "1", "--uncond-class", "2"}};
  for (const std::string option : {"--cfg", "--image-cfg"}) {
    for (const auto& [more, missing] : alone) {
      EXPECT_EQ(mistake_with(option, more), option + " 3 needs " + missing + ".");
    }
    for (const auto& more : both) EXPECT_EQ(mistake_with(option, more), "");
  }
}

TEST(SampleOptions, ListSitesNeedsNoOutput) {
  const auto choices = parse({"--model", "m", "--list-sites"});
  EXPECT_TRUE(source_options().decide(choices).list_sites);
}

TEST(SampleOptions, HelpShowsGroupsDefaultsAndChoices) {
  std::ostringstream out;
  EXPECT_FALSE(parse_command_line({"--help"}, out));
  EXPECT_THAT(out.str(), HasSubstr("Self-attention guidance:"));
  EXPECT_THAT(out.str(), HasSubstr("[the model's, else 20]"));
  EXPECT_THAT(out.str(), HasSubstr("--sampler help lists them"));
  EXPECT_THAT(out.str(), HasSubstr("[the model's, else 7.5; 1 without an"));
  EXPECT_THAT(out.str(), Not(HasSubstr("--sag-shuffle"))) << "a control for developers";
}

TEST(SampleOptions, ListsSamplersAndSchedules) {
  for (const auto& arguments : std::vector<std::vector<std::string>>{
           {"--sampler", "help"}, {"--model", "m", "--sampler=help"}}) {
    std::ostringstream out;
    EXPECT_FALSE(parse_command_line(arguments, out));
    EXPECT_EQ(out.str(), fmt::format("{}\n", fmt::join(sag::sampler_names(), "\n")));
  }
  std::ostringstream out;
  EXPECT_FALSE(parse_command_line({"--schedule", "help"}, out));
  EXPECT_EQ(out.str(), fmt::format("{}\n", fmt::join(sag::schedule_names(), "\n")));
}

TEST(SampleOptions, VersionIsOneLine) {
  std::ostringstream out;
  EXPECT_FALSE(parse_command_line({"--version"}, out));
  EXPECT_THAT(out.str(), testing::StartsWith("sag-sample "));
}

TEST(SampleSettings, DefaultsAreTheLibrarys) {
  const auto settings = decide_settings(tensors_with({"--device", "cpu"}), nullptr);
  const sag::SelfAttentionGuidanceOptions defaults;
  EXPECT_EQ(sag_option(settings, "scale"), Value(defaults.scale));
  EXPECT_EQ(sag_option(settings, "blur_sigma"), Value(defaults.blur_sigma));
  EXPECT_EQ(sag_option(settings, "threshold"), Value(defaults.threshold));
  EXPECT_EQ(sag_option(settings, "kernel_size"), Value(defaults.kernel_size));
  EXPECT_EQ(sag_option(settings, "site"), Value(defaults.site.name()));
  EXPECT_EQ(settings.network.prediction, "eps");
  EXPECT_NEAR(settings.network.noise_levels.sigma_max(), 14.6146, 1e-3);
  const sag::SampleOptions sampling;
  EXPECT_EQ(settings.sampling.sampler, sampling.sampler);
  EXPECT_EQ(settings.sampling.schedule, sampling.schedule);
  EXPECT_EQ(settings.sampling.steps, sampling.steps);
}

TEST(SampleSettings, CommandLineCountsBeforeTheModel) {
  // What model.json says, here in the words of the command line.
  ModelDirectory model;
  model.multiple = 8;
  model.choices =
      parse_more({"--prompt", "a", "--prediction", "edm", "--sigma-max", "60", "--steps", "12",
                  "--cfg", "2", "--sag-scale", "1", "--channels", "3"});
  const auto settings = decide_settings(parse_more({"--prompt", "a", "--device", "cpu", "--cfg",
                                                    "4", "--width", "96", "--sag-blur", "3"}),
                                        &model);
  EXPECT_EQ(settings.guider.cond_scale, 4.0);
  EXPECT_EQ(settings.sampling.steps, 12);
  EXPECT_EQ(sag_option(settings, "scale"), Value(1.0));
  EXPECT_EQ(sag_option(settings, "blur_sigma"), Value(3.0));
  const auto& network = settings.network;
  EXPECT_EQ(network.size.channels, 3);
  EXPECT_EQ(network.size.height, 64);
  EXPECT_EQ(network.size.width, 96);
  EXPECT_NEAR(network.noise_levels.sigma_max(), 60.0, 1e-3);
  EXPECT_THROW(check_latent_size(network, "The latent", {3, 60, 64}), UsageError);
  EXPECT_THROW(check_latent_size(network, "The latent", {4, 64, 64}), UsageError);
}

// diffusers' inpainting pipeline with a UNet of nine channels does not blend, and starts from
// noise.
TEST(FurtherInputs, AnInpaintingNetworkKeepsTheRestByItself) {
  const auto settings = [](const char* kind, std::vector<std::string> more) {
    ModelDirectory model;
    model.inputs.concat = {.channels = 5, .kind = kind};
    more.insert(more.begin(), {"--prompt", "a", "--image", "a.png", "--mask", "m.png"});
    return decide_settings(parse_more(std::move(more)), &model);
  };
  const auto painting = settings("inpaint", {});
  check_further_inputs(painting);
  EXPECT_TRUE(sees_picture(painting));
  EXPECT_FALSE(blends_mask(painting));
  EXPECT_FALSE(starts_from_picture(painting));
  EXPECT_TRUE(starts_from_picture(settings("inpaint", {"--denoise", "0.5"})));
  EXPECT_FALSE(blends_mask(settings("inpaint", {"--denoise", "0.5"})));

  const auto by_tensor = settings("inpaint", {"--concat", "t.pt"});
  check_further_inputs(by_tensor);
  EXPECT_FALSE(sees_picture(by_tensor));
  EXPECT_TRUE(blends_mask(by_tensor));
  EXPECT_TRUE(starts_from_picture(by_tensor));

  const auto editing = settings("edit", {});
  EXPECT_TRUE(sees_picture(editing));
  EXPECT_TRUE(blends_mask(editing));
  EXPECT_TRUE(starts_from_picture(editing)) << "what is blended";
  EXPECT_THROW(check_further_inputs(settings("inpaint", {"--inpaint-noise", "n.pt"})), UsageError);
}

TEST(FurtherInputs, EachConditioningGetsItsOwn) {
  ModelDirectory model;
  model.inputs = {.concat = ConcatInput{.channels = 2, .kind = "edit"},
                  .takes_class = true,
                  .classes = 3,
                  .guidance_size = 6};
  const auto batch_with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--prompt", "a", "--image", "a.png", "--class", "1"});
    const auto settings = decide_settings(parse_more(std::move(more)), &model);
    check_further_inputs(settings);
    Batch batch{.positive = {{}}, .negative = {{}}, .cfg = settings.guider.cond_scale};
    add_further_inputs(batch, torch::ones({1, 2, 4, 4}), settings);
    return batch;
  };
  const auto plain = batch_with({"--uncond-class", "2", "--embedded-guidance", "3"});
  ASSERT_EQ(plain.negative.size(), 1u);
  EXPECT_TRUE(plain.positive[0].concat.equal(plain.negative[0].concat));
  EXPECT_EQ(plain.positive[0].extra.at("class_labels").scalar_type(), torch::kLong);
  EXPECT_EQ(plain.positive[0].extra.at("class_labels").item<int>(), 1);
  EXPECT_EQ(plain.negative[0].extra.at("class_labels").item<int>(), 2);
  EXPECT_TRUE(
      plain.positive[0].extra.at("timestep_cond").equal(sag::guidance_scale_embedding(3, 6)));

  const auto three = batch_with({"--cfg", "5", "--image-cfg", "2"});
  EXPECT_EQ(three.negative[0].extra.at("class_labels").item<int>(), 1);
  ASSERT_EQ(three.negative.size(), 2u);
  EXPECT_EQ(three.negative[0].strength, 3);
  EXPECT_EQ(three.negative[1].strength, 1);
  EXPECT_EQ(three.negative[0].concat.sum().item<int>(), 32);
  EXPECT_EQ(three.negative[1].concat.abs().sum().item<int>(), 0);
  EXPECT_EQ(batch_with({"--cfg", "5", "--image-cfg", "5"}).negative.size(), 1u);
}

TEST(SampleSettings, RefusesConstantsOfAnotherPredictionAndBadDevices) {
  const auto mistake = [](std::vector<std::string> arguments) -> std::string {
    try {
      decide_settings(tensors_with(std::move(arguments)), nullptr);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(mistake({"--shift", "3"}),
            "--shift is for flow models, but this one's prediction is eps.");
  EXPECT_EQ(mistake({"--sigma-min", "1", "--prediction", "flow"}),
            "--sigma-min is for edm models, but this one's prediction is flow.");
  EXPECT_EQ(mistake({"--shift", "3", "--prediction", "flow"}), "");
  EXPECT_EQ(mistake({"--device", "tpu"}), "--device must be cpu, cuda or cuda:N, got tpu.");
  EXPECT_NE(mistake({"--device", "cuda:99"}), "");
  EXPECT_EQ(mistake({"--device", "cuda:x"}), "--device must be cpu, cuda or cuda:N, got cuda:x.");
  EXPECT_EQ(mistake({"--sag-start", "1", "--sag-end", "2"}),
            "--sag-start must be at least --sag-end (2), got 1.");
}

TEST(SampleSettings, TextOptionsNeedATextOfTheRightKind) {
  for (const std::string option : {"--prompt-weights", "--clip-skip"}) {
    EXPECT_EQ(mistake_in_more({option, option == "--clip-skip" ? "2" : "off"}),
              option + " needs a --prompt or --unconditional.");
  }
  EXPECT_THAT(mistake_in_more({"--prompt", "a", "--clip-skip", "0"}),
              HasSubstr("--clip-skip must be a whole number between 1 and"));
  EXPECT_THAT(mistake_in_more({"--prompt", "a", "--prompt-weights", "yes"}),
              HasSubstr("--prompt-weights must be one of on, off"));
  EXPECT_FALSE(pictures_of({"--unconditional", "1", "--prompt-weights", "off"}).prompt_weights);
  EXPECT_EQ(pictures_of({"--prompt", "a", "--clip-skip", "2"}).clip_skip, 2);
  EXPECT_TRUE(pictures_of({"--prompt", "a"}).prompt_weights);
}

TEST(SampleSettings, GuidancesAreAList) {
  const auto settings = decide_settings(tensors_with({}), nullptr);
  ASSERT_EQ(settings.guidances.size(), 1u);
  EXPECT_EQ(settings.guidances[0].key, "sag");
  EXPECT_TRUE(decide_settings(tensors_with({"--no-sag"}), nullptr).guidances.empty());
}

TEST(SampleSettings, GuidanceSaysWhatGuidesAndInWhichOrder) {
  const auto settings = decide_settings(
      tensors_with({"--sag-blur", "3", "--site", "output.1.0", "--guidance",
                    "pag:scale=2,sites=middle+output.3.0,end_percent=0.5", "--guidance", "apg",
                    "--guidance", "sag:scale=0.25,one_pass", "--guidance", "seg:blur_sigma=10"}),
      nullptr);
  const auto& guidances = settings.guidances;
  ASSERT_EQ(guidances.size(), 4u);
  EXPECT_EQ(guidances[0].key, "pag");
  EXPECT_EQ(option_of(guidances[0], "scale"), Value(2.0));
  EXPECT_EQ(option_of(guidances[0], "sites"), Value("middle+output.3.0"));
  EXPECT_EQ(option_of(guidances[0], "end_percent"), Value(0.5));
  EXPECT_THAT(guidances[0].sites, ElementsAre("middle", "output.3.0"));
  EXPECT_EQ(guidances[1].key, "apg");
  EXPECT_EQ(option_of(guidances[1], "norm_threshold"), Value(15.0)) << "its default";
  EXPECT_EQ(guidances[2].key, "sag");
  EXPECT_EQ(option_of(guidances[2], "scale"), Value(0.25));
  EXPECT_EQ(option_of(guidances[2], "blur_sigma"), Value(3.0)) << "the command line's";
  EXPECT_EQ(option_of(guidances[2], "one_pass"), Value(true));
  EXPECT_EQ(option_of(guidances[3], "blur_sigma"), Value(10.0));
  EXPECT_THAT(guidances[3].sites, ElementsAre("output.1.0")) << "the run's site";
  const auto rescaled =
      decide_settings(tensors_with({"--guidance", "cfg_zero", "--guidance", "rescale"}), nullptr);
  EXPECT_EQ(rescaled.guidances.at(1).summary, "rescale 0.7");
  const auto further =
      decide_settings(tensors_with({"--guidance", "momentum:momentum=0.25,ema=0.9", "--guidance",
                                    "self_guidance:scale=3,start_percent=0.5", "--guidance",
                                    "dynamic_threshold:mimic_scale=5,threshold_percentile=0.95"}),
                      nullptr)
          .guidances;
  ASSERT_EQ(further.size(), 3u);
  EXPECT_EQ(further[0].summary, "momentum 0.25");
  EXPECT_EQ(option_of(further[0], "ema"), Value(0.9));
  EXPECT_EQ(further[1].summary, "SG-prev scale 3");
  EXPECT_EQ(option_of(further[1], "start_percent"), Value(0.5));
  EXPECT_EQ(further[2].summary, "dynamic threshold 5");
  EXPECT_EQ(option_of(further[2], "threshold_percentile"), Value(0.95));
  const auto inside =
      decide_settings(tensors_with({"--guidance", "nag:scale=4,tau=1.5,alpha=0.25", "--guidance",
                                    "tpg:blocks=middle+input.8.0,seed=7", "--guidance", "slg"}),
                      nullptr)
          .guidances;
  ASSERT_EQ(inside.size(), 3u);
  EXPECT_TRUE(inside[0].needs_cross_attention);
  EXPECT_EQ(option_of(inside[0], "tau"), Value(1.5));
  EXPECT_THAT(inside[1].blocks, ElementsAre("middle", "input.8.0"));
  EXPECT_EQ(option_of(inside[1], "seed"), Value(std::uint64_t{7}));
  EXPECT_EQ(option_of(inside[2], "end_percent"), Value(0.15)) << "its default";
  EXPECT_TRUE(decide_settings(tensors_with({"--guidance", "none"}), nullptr).guidances.empty());
  const auto by_level =
      decide_settings(tensors_with({"--guidance", "slg:sigma_end=2"}), nullptr).guidances;
  EXPECT_EQ(option_of(by_level.at(0), "sigma_end"), Value(2.0));
  EXPECT_EQ(option_of(by_level[0], "end_percent"), Value()) << "a level takes the share's place";
  EXPECT_EQ(option_of(by_level[0], "start_percent"), Value(0.01));
}

TEST(SampleSettings, GuidanceRefusesWhatItDoesNotKnow) {
  const auto said = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--unet", "u", "--save-latent", "l"});
    return mistake(arguments);
  };
  EXPECT_EQ(said({"--guidance", "pagg"}),
            "--guidance must be none or of sag, pag, seg, tpg, slg, nag, apg, cfg_zero, rescale, "
            "dynamic_threshold, momentum, self_guidance, got \"pagg\"; do you mean pag?");
  EXPECT_EQ(said({"--guidance", "pag:scalee=2"}),
            "--guidance pag has no option \"scalee\"; do you mean scale?");
  EXPECT_THAT(said({"--guidance", "pag:scale=much"}),
              HasSubstr("--guidance pag:scale must be a finite number"));
  EXPECT_EQ(said({"--guidance", "pag:scale"}), "--guidance pag:scale needs a value.");
  EXPECT_EQ(said({"--guidance", "sag:one_pass=1"}), "--guidance sag:one_pass takes no value.");
  EXPECT_THAT(said({"--guidance", "pag:"}), HasSubstr("has no option \"\""));
  EXPECT_THAT(said({"--guidance", "rescale:strength=2"}),
              HasSubstr("has no option \"strength\"; it has multiplier, sigma_start"));
  EXPECT_THAT(said({"--guidance", "slg:blocks=7,8"}), HasSubstr("have + between them"));
  for (const auto& [node, key] : {std::pair("PerturbedAttentionGuidance", "pag"),
                                  {"NAGuidance", "nag"},
                                  {"stg", "slg"},
                                  {"CFGZeroStar", "cfg_zero"},
                                  {"SelfAttentionGuidance", "sag"},
                                  {"sg_prev", "self_guidance"}})
    EXPECT_THAT(said({"--guidance", node}), HasSubstr(std::string("do you mean ") + key + "?"));
  EXPECT_EQ(
      said({"--guidance", "slg:start_percent=0.9"}),
      "--guidance slg:start_percent: start_percent and end_percent must enclose a noise level, "
      "got 0.9 and 0.15.");
  EXPECT_EQ(said({"--guidance", "sag:scale=2", "--sag-scale", "3"}),
            "--guidance sag:scale and --sag-scale cannot be given together.");
  EXPECT_THAT(said({"--guidance", "sag:sigma_start=4,start_percent=0.5"}),
              HasSubstr("cannot be given together"));
  EXPECT_EQ(said({"--guidance", "seg:sigma_end=1,end_percent=0.5"}),
            "--guidance seg:sigma_end and end_percent cannot be given together.");
  EXPECT_EQ(said({"--cfg-start", "1", "--cfg-end", "2"}),
            "--cfg-start must be at least --cfg-end (2), got 1.");
  EXPECT_EQ(said({"--cfg-end", "1", "--cfg-end-percent", "0.5"}),
            "--cfg-end and --cfg-end-percent cannot be given together.");
  EXPECT_THAT(said({"--prompt", "a", "--cfg-end", "1", "--image-cfg", "2"}),
              HasSubstr("with --image-cfg"));
  EXPECT_EQ(said({"--guidance", "seg:scale=1,scale=2"}), "--guidance seg: scale is given twice.");
  EXPECT_THAT(said({"--guidance", "seg:sites=middle+"}), HasSubstr("with + between them"));
  EXPECT_EQ(said({"--guidance", "apg", "--guidance", "apg:eta=1"}),
            "--guidance apg is given twice.");
  EXPECT_EQ(said({"--guidance", "apg", "--sag-scale", "1"}),
            "--sag-scale needs --guidance sag, as --guidance says what guides.");
  EXPECT_EQ(said({"--guidance", "apg", "--no-sag"}),
            "--no-sag and --guidance, which says what guides, cannot be given together.");
}

TEST(SampleSettings, GuidanceHelpListsAllWithTheirOptions) {
  std::ostringstream out;
  EXPECT_FALSE(parse_command_line({"--guidance", "help"}, out));
  for (const auto& kind : guidance_kinds()) {
    EXPECT_THAT(out.str(), HasSubstr(fmt::format("\n{:<20}", kind.key).substr(kind.off ? 1 : 0)));
    for (const auto& option : kind.options->options) {
      if (option.key.empty()) continue;
      EXPECT_THAT(out.str(), HasSubstr("\n    " + option.key));
    }
  }
  EXPECT_THAT(out.str(), HasSubstr("blur_sigma=SIGMA"));
  EXPECT_THAT(out.str(), HasSubstr("2403.17377"));
}

TEST(SamplePictures, EqualPromptsGetConsecutiveSeeds) {
  const auto pictures = list_pictures(pictures_of({"--prompt", "a", "--prompt", "b", "--prompt",
                                                   "a", "--batch", "2", "--seed", "5"}),
                                      1);
  std::vector<std::uint64_t> seeds;
  for (const auto& picture : pictures) seeds.push_back(picture.seed);
  EXPECT_THAT(seeds, ElementsAre(5, 6, 5, 6, 7, 8));
  EXPECT_EQ(pictures[2].label, "b, seed 5");
}

TEST(SamplePictures, EmptyPromptsAreUnconditionalUnlessThereIsANegativeOne) {
  const auto pictures =
      list_pictures(pictures_of({"--prompt", "", "--prompt", "a", "--unconditional", "2"}), 1);
  ASSERT_EQ(pictures.size(), 4u);
  EXPECT_TRUE(pictures[0].unconditional);
  EXPECT_EQ(pictures[0].label, "seed 0");
  EXPECT_FALSE(pictures[1].unconditional);
  EXPECT_EQ(pictures[1].label, "a");
  EXPECT_EQ(pictures[3].label, "seed 2");
  EXPECT_FALSE(
      list_pictures(pictures_of({"--prompt", "", "--negative", "b"}), 1).front().unconditional);
}

}  // namespace
}  // namespace sag_sample

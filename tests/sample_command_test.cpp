// The command sag-sample as its users run it: arguments in, files and exit codes out.
#include <sys/wait.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "files/tensor_file.h"
#include "picture/pictures.h"
#include "picture/png_file.h"
#include "support/files.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;
using sag::test::kGoldenDir;
using sag::test::read_bytes;
using testing::ContainsRegex;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

struct Finished {
  int code = 0;
  std::string out, err;
};

std::string quoted(const std::string& argument) {
  return "'" + argument + "'";
}

class SampleCommand : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.path(name); }

  /// Runs the command on the CPU, on one thread: tests run side by side.
  Finished run(const std::vector<std::string>& arguments) const {
    std::string line = quoted(SAG_SAMPLE_COMMAND);
    for (const auto& argument : arguments) line += ' ' + quoted(argument);
    line += " --device cpu --threads 1 >" + quoted(path("stdout")) + " 2>" + quoted(path("stderr"));
    const int status = std::system(line.c_str());
    Finished finished = {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_bytes(path("stdout")),
                         read_bytes(path("stderr"))};
    fs::remove(path("stdout"));
    fs::remove(path("stderr"));
    return finished;
  }

  /// Runs it in the expectation of one sentence on stderr and nothing else.
  std::string sentence(int code, const std::vector<std::string>& arguments) const {
    const auto finished = run(arguments);
    EXPECT_EQ(finished.code, code) << finished.err;
    EXPECT_THAT(finished.err, testing::StartsWith("sag-sample: "));
    EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
    EXPECT_THAT(finished.out, IsEmpty());
    return finished.err;
  }

  /// The arguments that draw a case's pictures, without the model and guidance's own.
  static std::vector<std::string> golden_tensors(const std::string& run) {
    const std::string file = kGoldenDir + "runs/" + run + ".pt:";
    return {"--cond",        file + "cond", "--uncond",     file + "uncond", "--sigmas",
            file + "sigmas", "--noise",     file + "noise", "--quiet"};
  }
  static std::vector<std::string> golden(const std::string& unet, const std::string& run) {
    auto arguments = golden_tensors(run);
    arguments.insert(arguments.end(), {"--unet", kGoldenDir + unet});
    return arguments;
  }

  /// A model directory around the UNet of a reference run, for constants that only model.json says.
  std::string make_golden_model(const nlohmann::json& run) const {
    const std::string directory = path("golden");
    fs::create_directories(directory);
    fs::create_symlink(kGoldenDir + run["unet"].get<std::string>(), directory + "/unet.ts");
    nlohmann::json model = {{"format", 1},
                            {"prediction", run["prediction"]},
                            {"latent_scale", run["latent_scale_factor"]},
                            {"sample", {{"shape", {4, 16, 16}}}},
                            {"files", {{"unet", "unet.ts"}}}};
    if (run["prediction"] == "flow") {
      model["shift"] = run["flow"]["shift"];
      model["timestep_multiplier"] = run["flow"]["multiplier"];
    }
    std::ofstream(directory + "/model.json") << model;
    return directory;
  }

  /// The arguments that repeat a reference run: everything comes from its tensors and parameters.
  std::vector<std::string> golden(const nlohmann::json& run) const {
    auto arguments = golden_tensors(run["case"]);
    const auto add = [&](const char* option, const std::string& value) {
      arguments.insert(arguments.end(), {option, value});
    };
    const auto add_number = [&](const char* option, const nlohmann::json& value) {
      add(option, value.dump());
    };
    if (run["prediction"] == "flow" || run["latent_scale_factor"] != 1.0) {
      add("--model", make_golden_model(run));
    } else {
      add("--unet", kGoldenDir + run["unet"].get<std::string>());
      add("--prediction", run["prediction"]);
    }
    const auto file = kGoldenDir + run["file"].get<std::string>();
    const auto tensors = run["tensors"].get<std::set<std::string>>();
    for (const auto& [key, option] :
         {std::pair{"y_cond", "--cond-y"}, std::pair{"y_uncond", "--uncond-y"},
          std::pair{"latent", "--latent"}, std::pair{"denoise_mask", "--mask"},
          std::pair{"inpaint_noise", "--inpaint-noise"}}) {
      if (tensors.contains(key)) add(option, file + ":" + key);
    }
    add("--sampler", run["sampler"]);
    add_number("--cfg", run["cfg"]);
    if (run["variant"] == "no_sag") {
      arguments.push_back("--no-sag");
      return arguments;
    }
    add_number("--sag-scale", run["sag"]["scale"]);
    add_number("--sag-blur", run["sag"]["blur_sigma"]);
    if (run["variant"] == "windowed") {
      add_number("--sag-start", run["window"]["sigma_start"]);
      add_number("--sag-end", run["window"]["sigma_end"]);
    }
    return arguments;
  }

  /// A model directory around a golden UNet: a text encoder that maps a text to its bytes, and a
  /// decoder that takes the first three channels, twice as large.
  std::string make_model() const {
    const std::string directory = path("model");
    fs::create_directories(directory);
    fs::copy_file(kGoldenDir + "comfy_sd15_tiny.ts", directory + "/unet.ts");
    torch::jit::Module encoder("TextEncoder");
    encoder.register_buffer("scale", torch::full({1}, 0.1));
    encoder.define(R"(
def encode(self, text: str):
    values: List[float] = []
    for i in range(4):
        for j in range(32):
            character = ord(text[i % len(text)]) if len(text) > 0 else 7
            values.append(float((character * (i + 1) * (j + 3)) % 17) - 8.0)
    return torch.tensor(values).reshape(1, 4, 32) * self.scale
def forward(self, text: str):
    return self.encode(text)
)");
    encoder.save(directory + "/text_encoder.ts");
    torch::jit::Module decoder("Decoder");
    decoder.define(R"(
def forward(self, latent):
    return torch.tanh(latent[:, :3] * 0.05).repeat_interleave(2, 2).repeat_interleave(2, 3)
)");
    decoder.save(directory + "/decoder.ts");
    std::ofstream(directory + "/model.json")
        << R"({"format": 1, "name": "tiny", "prediction": "eps",
      "sample": {"shape": [4, 16, 16], "multiple": 8},
      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts", "decoder": "decoder.ts"},
      "defaults": {"schedule": "karras", "steps": 3, "cfg": 3.0, "sag": {"scale": 0.75}}})";
    return directory;
  }

  /// The model above with an encoder that makes four channels out of the means of 2 x 2 pixels.
  std::string make_model_with_encoder() const {
    const auto directory = make_model();
    torch::jit::Module encoder("Encoder");
    encoder.define(R"(
def forward(self, picture):
    cells = torch.avg_pool2d(picture, [2, 2])
    return torch.cat([cells, cells[:, :1]], 1)
)");
    encoder.save(directory + "/encoder.ts");
    std::ofstream(directory + "/model.json")
        << R"({"format": 1, "prediction": "eps", "sample": {"shape": [4, 16, 16], "multiple": 8},
      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts", "decoder": "decoder.ts",
                "encoder": "encoder.ts"}, "defaults": {"steps": 4}})";
    return directory;
  }

  /// A model directory of SDXL's form: its text encoder is told the latent's size, and reads eight
  /// characters of a text. It looks up rows by index, as text encoders do.
  std::string make_sdxl_model() const {
    const std::string directory = path("sdxl");
    fs::create_directories(directory);
    fs::copy_file(kGoldenDir + "comfy_sdxl_tiny.ts", directory + "/unet.ts");
    torch::jit::Module encoder("TextEncoder");
    encoder.register_buffer("rows", torch::arange(10));
    encoder.register_parameter(
        "table", torch::linspace(-1, 1, 320).to(torch::kHalf).reshape({10, 32}), false);
    encoder.define(R"(
def encode(self, text: str, height: int, width: int):
    y = torch.zeros([1, 48])
    y[0, 0] = float(height)
    y[0, 1] = float(width)
    y[0, 2] = float(len(text))
    return torch.embedding(self.table, self.rows).unsqueeze(0) * float(1 + len(text)), y
def cut(self, text: str) -> str:
    return text[8:]
)");
    encoder.save(directory + "/text_encoder.ts");
    std::ofstream(directory + "/model.json")
        << R"({"format": 1, "prediction": "eps", "sample": {"shape": [4, 16, 16]},
      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts"}, "defaults": {"steps": 2}})";
    return directory;
  }

  std::string save(const std::string& name, const torch::Tensor& tensor) const {
    folder_.write(name, tensor_file_bytes(tensor));
    return path(name);
  }

  std::string save_png(const std::string& name, int width, int height) const {
    Image image(width, height);
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        image.at(x, y) = {static_cast<std::uint8_t>(x * 7), static_cast<std::uint8_t>(y * 5),
                          static_cast<std::uint8_t>((x * y) % 256)};
      }
    }
    folder_.write(name, encode_png(image));
    return path(name);
  }

  Image picture(const std::string& name) const { return decode_png(read_bytes(path(name))); }
  torch::Tensor latent(const std::string& name) const { return read_tensor("latent", path(name)); }
  nlohmann::json report(const std::string& name) const {
    return nlohmann::json::parse(read_bytes(path(name)));
  }

 private:
  sag::test::TemporaryFolder folder_;
};

class SampleGolden : public SampleCommand, public testing::WithParamInterface<const char*> {};

// Runs of the references, from their tensors alone.
TEST_P(SampleGolden, RepeatsAReferenceRun) {
  const auto index = nlohmann::json::parse(std::ifstream(kGoldenDir + "index.json"));
  const auto& runs = index["comfyui_runs"];
  const auto found = std::find_if(runs.begin(), runs.end(),
                                  [](const auto& run) { return run["id"] == GetParam(); });
  ASSERT_NE(found, runs.end());
  auto arguments = golden(*found);
  arguments.insert(arguments.end(), {"--save-latent", path("latent.pt")});
  const auto finished = run(arguments);
  ASSERT_EQ(finished.code, 0) << finished.err;
  EXPECT_THAT(finished.out + finished.err, IsEmpty()) << "--quiet";
  const auto got = read_tensor("got", path("latent.pt"));
  const auto wanted = read_tensor("wanted", kGoldenDir + (*found)["file"].get<std::string>() + ":" +
                                                (*found)["samples"].get<std::string>());
  ASSERT_EQ(got.sizes(), wanted.sizes());
  EXPECT_LE((got - wanted).abs().max().item<double>(), 2e-5 * wanted.abs().max().item<double>());
}

INSTANTIATE_TEST_SUITE_P(
    Golden, SampleGolden,
    testing::Values("eps_euler_normal/reference", "eps_euler_normal/no_sag",
                    "sdxl_euler_normal/reference", "eps_inpaint_ddim/reference",
                    "eps_euler_window/windowed", "eps_euler_cfg1/reference",
                    "eps_scale_factor/reference", "eps_img2img_unipc/reference",
                    "eps_dpm2_karras_neg/reference", "eps_dpmpp2mcfgpp_karras/reference",
                    "v_deis_beta_b2/reference", "flow_aura_dpmpp2m_sgm/alpha_corrected",
                    "flow_img2img_euler/alpha_corrected", "grid_24x17/true_grid"),
    [](const auto& info) {
      std::string name = info.param;
      std::replace(name.begin(), name.end(), '/', '_');
      return name;
    });

TEST_F(SampleCommand, ListsTheSites) {
  const auto finished = run({"--unet", kGoldenDir + "comfy_sd15_tiny.ts", "--list-sites"});
  EXPECT_EQ(finished.code, 0) << finished.err;
  EXPECT_THAT(finished.out, HasSubstr("middle.0.0"));
  EXPECT_THAT(finished.out, HasSubstr("#6"));
  EXPECT_THAT(finished.out, HasSubstr("middle_block.1.transformer_blocks.0.attn1"));
  EXPECT_THAT(finished.out, ContainsRegex("Cross-attentions, [^\n]*nag[^\n]*:\n(  [^\n]*\n)*  "
                                          "middle.0.0 +#7 [^\n]*attn2\n"));
  EXPECT_THAT(finished.out,
              ContainsRegex("Transformer blocks, [^\n]*:\n(  [^\n]*\n)*  middle.0.0 "));
  EXPECT_THAT(finished.out,
              HasSubstr("did not run: The file's argument \"context\" must be given"));
}

TEST_F(SampleCommand, ListsTheSizesOfTheSites) {
  const auto cond = kGoldenDir + "runs/eps_euler_normal.pt:cond";
  const auto finished = run({"--unet", kGoldenDir + "comfy_sd15_tiny.ts", "--list-sites", "--cond",
                             cond, "--height", "16", "--width", "24"});
  EXPECT_EQ(finished.code, 0) << finished.err;
  EXPECT_THAT(finished.out,
              ContainsRegex("middle.0.0 +#6 +[0-9]+ heads x +[0-9]+ tokens x +[0-9]+  fewest"));
  EXPECT_THAT(finished.out, ContainsRegex("input.1.0 +#0 +[0-9]+ heads x +384 tokens"));
  const auto of_model = run({"--model", make_model(), "--list-sites"});
  EXPECT_EQ(of_model.code, 0) << of_model.err;
  EXPECT_THAT(of_model.out, HasSubstr("fewest"));
  EXPECT_THAT(of_model.out, ContainsRegex("\n\\* middle.0.0 "));
  EXPECT_THAT(of_model.out, HasSubstr("\n* what --site middle chooses: "));
}

TEST_F(SampleCommand, DrawsASheetOfPromptsAndUnconditionalPictures) {
  const auto finished =
      run({"--model", make_model(), "--prompt", "cat", "--prompt", "", "--unconditional", "1",
           "--compare", "--columns", "1", "--zoom", "1", "--out", path("sheet.png"), "--json",
           path("report.json"), "--save-latent", path("latent.pt")});
  ASSERT_EQ(finished.code, 0) << finished.err;
  EXPECT_THAT(finished.out, HasSubstr("3 pictures on cpu"));
  EXPECT_THAT(finished.out, HasSubstr("evaluations guided"));
  const auto sheet = picture("sheet.png");
  EXPECT_GT(sheet.width, 3 * 32);
  EXPECT_GT(sheet.height, 3 * 32);
  EXPECT_THAT(latent("latent.pt").sizes(), testing::ElementsAre(3, 4, 16, 16));

  const auto json = report("report.json");
  EXPECT_EQ(json["options"]["sag"]["scale"], 0.75);
  EXPECT_EQ(json["options"]["cfg"], 3.0);
  ASSERT_EQ(json["pictures"].size(), 3u);
  EXPECT_EQ(json["pictures"][2]["seed"], 1);
  ASSERT_EQ(json["runs"].size(), 4u) << "prompts and the rest, unguided and guided";
  for (const auto& run : json["runs"]) {
    ASSERT_EQ(run["steps"].size(), 3u);
    ASSERT_EQ(run["sites"].size(), run["kind"] == "guided" ? 1u : 0u);
    if (run["kind"] == "guided") {
      EXPECT_EQ(run["sites"][0]["asked"], "middle");
      EXPECT_EQ(run["sites"][0]["site"], "middle.0.0");
      EXPECT_NE(run["sites"][0]["reason"], "");
    }
    for (const auto& step : run["steps"]) {
      const bool guided = run["kind"] == "guided";
      EXPECT_EQ(step["guided"], guided);
      EXPECT_EQ(step["evaluations"], guided ? 2 : 1);
      EXPECT_EQ(step["masked"].is_number(), guided);
      ASSERT_EQ(step["guidances"].size(), guided ? 1u : 0u);
      if (guided) {
        EXPECT_EQ(step["guidances"][0]["guidance"], "self_attention_guidance");
      }
    }
  }
}

TEST_F(SampleCommand, ComparesEachGuidanceAloneAndAllTogether) {
  const auto model = make_model();
  const auto draw = [&](const std::string& name, std::vector<std::string> more) {
    more.insert(more.begin(), {"--model", model, "--prompt", "cat", "--zoom", "1", "--out",
                               path(name + ".png"), "--json", path(name + ".json")});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
  };
  draw("one", {"--compare", "--guidance", "pag"});
  draw("two", {"--compare", "--guidance", "pag", "--guidance", "rescale"});
  const auto runs = report("two.json")["runs"];
  ASSERT_EQ(runs.size(), 4u);
  const auto name_of = [](const char* key) { return std::vector<std::string>{key}; };
  EXPECT_EQ(runs[0]["guidances"], std::vector<std::string>());
  EXPECT_EQ(runs[1]["guidances"], name_of("perturbed_attention_guidance"));
  EXPECT_EQ(runs[2]["guidances"], name_of("rescale_cfg"));
  EXPECT_EQ(runs[3]["guidances"].size(), 2u);
  // Two pictures of 32 pixels more than the sheet with "unguided" and "guided by PAG".
  EXPECT_GE(picture("two.png").width, picture("one.png").width + 2 * 32);
}

TEST_F(SampleCommand, TakesTheGuidancesOfAModel) {
  const auto model = make_model();
  const auto describe = [&](const std::string& list) {
    std::ofstream(model + "/model.json")
        << R"({"format": 1, "prediction": "eps", "sample": {"shape": [4, 16, 16], "multiple": 8},
      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts", "decoder": "decoder.ts"},
      "defaults": {"steps": 3, "cfg": 3.0, "sag": {"scale": 0.5}, "guidance": )"
        << list << "}}";
  };
  const auto guided_by = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--model", model, "--prompt", "cat", "--save-latent", path("l.pt"),
                               "--json", path("report.json")});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
    return report("report.json")["runs"][0]["guidances"].get<std::vector<std::string>>();
  };
  const std::string sag = "self_attention_guidance", pag = "perturbed_attention_guidance";
  describe(R"(["pag:scale=2", "sag"])");
  EXPECT_EQ(guided_by({}), (std::vector<std::string>{pag, sag}));
  EXPECT_EQ(report("report.json")["options"]["sag"]["scale"], 0.5);
  EXPECT_EQ(guided_by({"--no-sag"}), std::vector<std::string>{pag});
  EXPECT_EQ(guided_by({"--guidance", "rescale"}), std::vector<std::string>{"rescale_cfg"});
  describe(R"(["pag"])");
  EXPECT_EQ(guided_by({}), std::vector<std::string>{pag});
  const auto fails = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--model", model, "--prompt", "cat", "--save-latent", path("l.pt")});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 1);
    return finished.err;
  };
  EXPECT_THAT(fails({"--sag-scale", "1"}), HasSubstr("--sag-scale needs --guidance sag"));
  describe(R"(["pagg"])");
  EXPECT_THAT(fails({}),
              HasSubstr("model.json: \"defaults\": \"guidance\" must be none or of sag"));
  for (const auto* wrong : {R"("pag")", "[]", "[1]", R"({"pag": 1})"}) {
    describe(wrong);
    EXPECT_THAT(fails({}), HasSubstr("must be an array of one text or more")) << wrong;
  }
}

TEST_F(SampleCommand, SteersAwayFromTheNegativeInOneRow) {
  const auto model = make_model();
  const auto draw = [&](const std::string& name, std::vector<std::string> more) {
    more.insert(more.begin(),
                {"--model", model, "--prompt", "cat", "--negative", "dog", "--cfg", "1",
                 "--save-latent", path(name + ".pt"), "--json", path(name + ".json")});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
    EXPECT_EQ(report(name + ".json")["rows"], 3) << "one a step";
    return latent(name + ".pt");
  };
  const auto plain = draw("plain", {"--no-sag"});
  const auto guided = draw("nag", {"--guidance", "nag:scale=4"});
  EXPECT_GT((guided - plain).abs().max().item<double>(), 1e-3);
  EXPECT_EQ(report("nag.json")["guided_steps"], 3);
}

TEST_F(SampleCommand, KeepsCfgInsideItsWindow) {
  const auto model = make_model();
  const auto rows = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--model", model, "--prompt", "cat", "--no-sag", "--save-latent",
                               path("l.pt"), "--json", path("report.json")});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
    std::vector<int> rows_of;
    const auto json = report("report.json");
    for (const auto& step : json["runs"][0]["steps"]) rows_of.push_back(step["rows"]);
    return rows_of;
  };
  EXPECT_EQ(rows({}), (std::vector<int>{2, 2, 2}));
  EXPECT_EQ(rows({"--cfg-start", "5"}), (std::vector<int>{1, 2, 2}));
  EXPECT_EQ(rows({"--cfg-end", "5"}), (std::vector<int>{2, 1, 1}));
  EXPECT_EQ(rows({"--cfg-start-percent", "0.5"})[0], 1);
}

TEST_F(SampleCommand, AppliesGuidancesInTheirOrder) {
  const auto model = make_model();
  const auto draw = [&](const std::string& name, std::vector<std::string> guidances) {
    guidances.insert(guidances.begin(), {"--model", model, "--prompt", "cat", "--save-latent",
                                         path(name + ".pt"), "--json", path(name + ".json")});
    const auto finished = run(guidances);
    EXPECT_EQ(finished.code, 0) << finished.err;
    return finished.out;
  };
  const auto said = draw("both", {"--guidance", "pag:scale=2", "--guidance", "rescale"});
  EXPECT_THAT(said, HasSubstr("perturbed-attention guidance: 3 of 3 evaluations guided"));
  EXPECT_THAT(said, HasSubstr("CFG rescale: 3 of 3 evaluations guided"));
  const auto json = report("both.json");
  EXPECT_EQ(json["options"]["guidance"], "pag:scale=2, rescale");
  EXPECT_EQ(json["options"]["pag"]["scale"], 2.0);
  EXPECT_EQ(json["options"]["sag"], nullptr);
  for (const auto& step : json["runs"][0]["steps"]) {
    EXPECT_EQ(step["evaluations"], 1) << "the perturbed row is in the main call";
    ASSERT_EQ(step["guidances"].size(), 2u);
    EXPECT_EQ(step["guidances"][0]["guidance"], "perturbed_attention_guidance");
    EXPECT_EQ(step["guidances"][1]["guidance"], "rescale_cfg");
  }
  draw("turned", {"--guidance", "rescale", "--guidance", "pag:scale=2"});
  EXPECT_FALSE(torch::equal(latent("both.pt"), latent("turned.pt")));
  draw("sag", {"--guidance", "sag"});
  draw("usual", {});
  EXPECT_TRUE(torch::equal(latent("sag.pt"), latent("usual.pt")));
}

TEST_F(SampleCommand, APictureDependsOnItsOwnSeedOnly) {
  const auto model = make_model();
  const auto draw = [&](std::vector<std::string> more, const std::string& name) {
    more.insert(more.begin(), {"--model", model, "--quiet", "--sampler", "euler_ancestral",
                               "--save-latent", path(name)});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
    return latent(name);
  };
  const auto batch = draw({"--prompt", "cat", "--batch", "3", "--seed", "4"}, "batch.pt");
  const auto alone = draw({"--prompt", "cat", "--seed", "6"}, "alone.pt");
  const auto split =
      draw({"--prompt", "cat", "--batch", "3", "--seed", "4", "--max-rows", "2"}, "split.pt");
  const auto mixed = draw(
      {"--prompt", "dog", "--prompt", "cat", "--unconditional", "2", "--seed", "6"}, "mixed.pt");
  const double tolerance = 2e-5 * batch.abs().max().item<double>();
  EXPECT_LE((batch[2] - alone[0]).abs().max().item<double>(), tolerance);
  EXPECT_LE((batch - split).abs().max().item<double>(), tolerance);
  EXPECT_LE((mixed[1] - alone[0]).abs().max().item<double>(), tolerance);
  EXPECT_GT((batch[0] - batch[1]).abs().max().item<double>(), 0.1);
}

TEST_F(SampleCommand, OnePictureIsThePictureAlone) {
  const auto model = make_model();
  ASSERT_EQ(run({"--model", model, "--prompt", "cat", "--out", path("one.png")}).code, 0);
  EXPECT_EQ(picture("one.png").width, 32);
  EXPECT_EQ(picture("one.png").height, 32);
  ASSERT_EQ(run({"--model", model, "--prompt", "cat", "--width", "24", "--zoom", "2", "--out",
                 path("wide.png")})
                .code,
            0);
  EXPECT_EQ(picture("wide.png").width, 96);
}

TEST_F(SampleCommand, TextEncodersMayGiveAVectorForTheLatentsSize) {
  const auto model = make_sdxl_model();
  const auto finished =
      run({"--model", model, "--prompt", "cat", "--prompt", "fox!!", "--negative", "a", "--height",
           "24", "--save-latent", path("texts.pt"), "--json", path("report.json")});
  ASSERT_EQ(finished.code, 0) << finished.err;
  EXPECT_THAT(report("report.json")["notes"], IsEmpty());
  const auto table =
      torch::linspace(-1, 1, 320).to(torch::kHalf).to(torch::kFloat).reshape({1, 10, 32});
  const auto y = [](double length) {
    auto vector = torch::zeros({1, 48});
    vector.slice(1, 0, 3) = torch::tensor({24.0, 16.0, length});
    return vector;
  };
  const auto by_tensors =
      run({"--unet", model + "/unet.ts", "--steps", "2", "--height", "24", "--width", "16",
           "--cond", save("cond.pt", torch::cat({table * 4, table * 6})), "--uncond",
           save("uncond.pt", table * 2), "--cond-y", save("cond_y.pt", torch::cat({y(3), y(5)})),
           "--uncond-y", save("uncond_y.pt", y(1)), "--save-latent", path("tensors.pt")});
  ASSERT_EQ(by_tensors.code, 0) << by_tensors.err;
  // Without prompts, the second picture has the next seed.
  const auto got = latent("texts.pt"), expected = latent("tensors.pt");
  EXPECT_LE((got[0] - expected[0]).abs().max().item<double>(),
            2e-5 * expected[0].abs().max().item<double>());
}

TEST_F(SampleCommand, SaysWhatOfAPromptIsLeftOut) {
  const auto finished = run({"--model", make_sdxl_model(), "--prompt", "cat", "--prompt",
                             "a cat and a dog", "--json", path("report.json")});
  ASSERT_EQ(finished.code, 0) << finished.err;
  const std::string note =
      "the prompt \"a cat and a dog\" is longer than the text encoder reads (10 tokens); left out: "
      "d "
      "a dog";
  EXPECT_THAT(finished.out, HasSubstr("note: " + note + "\n"));
  EXPECT_EQ(report("report.json")["notes"], nlohmann::json::array({note}));
}

TEST_F(SampleCommand, WeighsPartsOfPromptsAndChoosesTheLayer) {
  const auto model = make_model();
  torch::jit::Module encoder("TextEncoder");
  // Row i of the context is that of the i-th piece.
  encoder.define(R"(
def encode(self, text: str):
    return torch.zeros([1, 1])
def encode_pieces(self, pieces: List[str], weights: List[float], clip_skip: int):
    context = torch.zeros([1, 4, 32])
    for i in range(min(len(pieces), 4)):
        context[0, i] = torch.linspace(-1., 1., 32) * weights[i] * float(len(pieces[i]))
    return context + 0.1 * float(clip_skip)
def cut_pieces(self, pieces: List[str]):
    return " ".join(pieces[4:])
def clip_skip_range(self):
    return 1, 5
)");
  encoder.save(model + "/text_encoder.ts");
  // Pieces by length and weight.
  const auto context = [](const std::vector<std::pair<double, double>>& pieces, double clip_skip) {
    auto tensor = torch::zeros({1, 4, 32});
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      tensor[0][static_cast<std::int64_t>(i)] =
          torch::linspace(-1, 1, 32) * pieces[i].second * pieces[i].first;
    }
    return tensor + 0.1 * clip_skip;
  };
  const auto expect = [&](std::vector<std::string> texts, const torch::Tensor& cond,
                          const torch::Tensor& uncond) {
    texts.insert(texts.end(), {"--model", model, "--save-latent", path("texts.pt")});
    const auto finished = run(texts);
    ASSERT_EQ(finished.code, 0) << finished.err;
    const auto by_tensors = run({"--model", model, "--cond", save("cond.pt", cond), "--uncond",
                                 save("uncond.pt", uncond), "--save-latent", path("tensors.pt")});
    ASSERT_EQ(by_tensors.code, 0) << by_tensors.err;
    EXPECT_TRUE(latent("texts.pt").equal(latent("tensors.pt")));
  };
  const auto empty = context({}, 0);
  expect({"--prompt", "a (red:1.5) cat"}, context({{2, 1}, {3, 1.5}, {4, 1}}, 0), empty);
  expect({"--prompt", "cat", "--negative", "(red) \\(x\\)", "--clip-skip", "3"},
         context({{3, 1}}, 3), context({{3, 1.1}, {4, 1}}, 3));
  expect({"--prompt", "a (red:1.5) cat", "--prompt-weights", "off"}, context({{15, 1}}, 0), empty);
  EXPECT_THAT(sentence(1, {"--model", model, "--prompt", "x", "--clip-skip", "6", "--json",
                           path("report.json")}),
              HasSubstr("--clip-skip must be between 1 and 5 for this model, got 6."));
  const auto cut = run({"--model", model, "--prompt", "a(b)c(d)e(f)", "--json", path("json")});
  ASSERT_EQ(cut.code, 0) << cut.err;
  EXPECT_THAT(cut.out, HasSubstr("left out: e f\n"));

  std::ofstream(model + "/model.json")
      << R"({"format": 1, "prediction": "eps", "sample": {"shape": [4, 16, 16]},
      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts"},
      "defaults": {"steps": 2, "clip_skip": 2}})";
  expect({"--prompt", "cat"}, context({{3, 1}}, 2), context({}, 2));
  expect({"--prompt", "cat", "--clip-skip", "1"}, context({{3, 1}}, 1), context({}, 1));
}

TEST_F(SampleCommand, TextEncodersThatTakeATextOnlySayWhatTheyCannot) {
  const auto model = make_model();
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), {"--model", model, "--json", path("report.json")});
    return more;
  };
  EXPECT_THAT(sentence(1, with({"--prompt", "a (red:1.3) cat"})),
              HasSubstr("cannot weigh parts of a prompt, as the parentheses around \"red\" ask"));
  EXPECT_THAT(sentence(1, with({"--prompt", "cat", "--clip-skip", "2"})),
              HasSubstr("gives no other layer, as --clip-skip asks for"));
  EXPECT_FALSE(fs::exists(path("report.json")));
  const auto latent_of = [&](const std::string& prompt, const std::string& weights) {
    const auto finished = run({"--model", model, "--prompt", prompt, "--prompt-weights", weights,
                               "--save-latent", path("latent.pt")});
    EXPECT_EQ(finished.code, 0) << finished.err;
    return latent("latent.pt");
  };
  const auto expected = latent_of("a (red) cat", "off");
  EXPECT_TRUE(latent_of("a \\(red\\) cat", "on").equal(expected));
  EXPECT_TRUE(latent_of("a (x", "on").equal(latent_of("a (x", "off")));
}

TEST_F(SampleCommand, TextEncodersOfAnotherFormAreRefused) {
  const auto model = make_sdxl_model();
  const auto with = [&](const char* code) {
    torch::jit::Module encoder("TextEncoder");
    encoder.define(code);
    encoder.save(model + "/text_encoder.ts");
    return std::vector<std::string>{"--model", model,    "--prompt",
                                    "x",       "--json", path("report.json")};
  };
  EXPECT_THAT(sentence(1, with("def encode(self, text: str, height: int):\n    return text\n")),
              HasSubstr("must have a method encode(str) or encode(str, int, int)"));
  EXPECT_THAT(sentence(2, with("def encode(self, text: str, h: int, w: int):\n"
                               "    return torch.zeros([1, 10, 32])\n")),
              HasSubstr("must return a tensor [1, tokens, width] and a tensor [1, features]"));
  EXPECT_THAT(sentence(2, with("def encode(self, text: str):\n    return torch.zeros([10, 32])\n")),
              HasSubstr("must return a tensor [1, tokens, width]."));
  EXPECT_FALSE(fs::exists(path("report.json")));
}

TEST_F(SampleCommand, StartsFromAPicture) {
  const auto model = make_model_with_encoder();
  const auto draw = [&](std::vector<std::string> more, const std::string& name) {
    more.insert(more.begin(), {"--model", model, "--prompt", "cat", "--denoise", "0.5", "--quiet",
                               "--batch", "2", "--save-latent", path(name)});
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
    return latent(name);
  };
  const auto png = save_png("photo.png", 48, 32);
  const auto got = draw({"--image", png}, "picture.pt");
  EXPECT_THAT(got.sizes(), testing::ElementsAre(2, 4, 16, 24));
  const auto cells = torch::avg_pool2d(from_image(decode_png(read_bytes(png))), {2, 2});
  const auto clean = save("clean.pt", torch::cat({cells, cells.slice(1, 0, 1)}, 1));
  EXPECT_TRUE(got.equal(draw({"--latent", clean}, "latent.pt")));
  EXPECT_FALSE(got.equal(
      draw({"--latent", save("other.pt", torch::zeros({1, 4, 16, 24}))}, "other_drawn.pt")));
}

TEST_F(SampleCommand, PicturesOfModelsWithoutLatentsAreUsedAsTheyAre) {
  const std::string model = sag::test::kModelDir;
  const auto png = save_png("photo.png", 32, 24);
  const auto finished = run({"--model", model, "--prompt", "cat", "--image", png, "--denoise",
                             "0.01", "--steps", "1", "--save-latent", path("latent.pt")});
  ASSERT_EQ(finished.code, 0) << finished.err;
  const auto expected = from_image(decode_png(read_bytes(png)));
  EXPECT_LE((latent("latent.pt") - expected).abs().mean().item<double>(), 0.2);
}

TEST_F(SampleCommand, PicturesMustFitTheModel) {
  const auto model = make_model_with_encoder();
  const auto with = [&](const std::string& image, std::vector<std::string> more = {}) {
    more.insert(more.begin(), {"--model", model, "--prompt", "x", "--image", image, "--save-latent",
                               path("latent.pt")});
    return more;
  };
  EXPECT_THAT(sentence(1, with(path("nowhere.png"))), HasSubstr("--image: there is no file"));
  EXPECT_THAT(sentence(1, with(model + "/model.json")),
              HasSubstr("is not a picture that can be used"));
  EXPECT_THAT(sentence(1, with(save_png("odd.png", 33, 32))),
              HasSubstr("made a latent of 16 x 16 out of 32 x 33 pixels"));
  EXPECT_THAT(
      sentence(1, with(save_png("small.png", 24, 32))),
      HasSubstr("The latent of --image must have a height and width that are multiples of 8"));
  const auto good = save_png("good.png", 32, 32);
  EXPECT_THAT(sentence(1, with(good, {"--latent", good})), HasSubstr("cannot be given together"));
  EXPECT_THAT(sentence(1, with(good, {"--width", "16"})), HasSubstr("--image"));
  EXPECT_THAT(sentence(1, {"--model", make_sdxl_model(), "--prompt", "x", "--image", good,
                           "--save-latent", path("latent.pt")}),
              HasSubstr("--image needs a model with an encoder"));
  // A header that promises 65536 x 65536 pixels.
  auto bytes = read_bytes(good);
  bytes.replace(16, 8, std::string("\0\1\0\0\0\1\0\0", 8));
  std::ofstream(path("huge.png"), std::ios::binary) << bytes;
  EXPECT_THAT(sentence(1, with(path("huge.png"))), HasSubstr("is not a picture that can be used"));
  EXPECT_FALSE(fs::exists(path("latent.pt")));
}

TEST_F(SampleCommand, OutsideTheWindowNothingIsGuided) {
  auto arguments = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
  arguments.insert(arguments.end(), {"--sag-start", "0.001", "--json", path("report.json")});
  ASSERT_EQ(run(arguments).code, 0);
  const auto json = report("report.json");
  EXPECT_EQ(json["guided_steps"], 0);
  EXPECT_EQ(json["evaluations"], 8);
  EXPECT_FALSE(json["skipped"].empty());
}

TEST_F(SampleCommand, ShufflingMovesTheMaskAndNothingElse) {
  const auto draw = [this](std::vector<std::string> more) {
    auto arguments = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
    arguments.insert(arguments.end(), more.begin(), more.end());
    arguments.insert(arguments.end(),
                     {"--save-latent", path("latent.pt"), "--json", path("report.json")});
    const auto finished = run(arguments);
    EXPECT_EQ(finished.code, 0) << finished.err;
    return latent("latent.pt");
  };
  const auto none = draw({"--no-sag"});
  const auto unguided = draw({"--sag-scale", "0", "--sag-shuffle"});
  const auto guided = draw({"--sag-scale", "2"});
  const double masked = report("report.json")["runs"][0]["steps"][0]["masked"];
  const auto shuffled = draw({"--sag-scale", "2", "--sag-shuffle"});
  EXPECT_TRUE(report("report.json")["options"]["sag"]["shuffle"]);
  EXPECT_EQ(report("report.json")["runs"][0]["steps"][0]["masked"], masked) << "as many tokens";
  const double largest = none.abs().max().item<double>();
  EXPECT_LE((unguided - none).abs().max().item<double>(), 2e-5 * largest);
  EXPECT_GT((shuffled - guided).abs().max().item<double>(), 1e-2 * largest);
  EXPECT_TRUE(shuffled.equal(draw({"--sag-scale", "2", "--sag-shuffle"}))) << "no chance in it";
}

TEST_F(SampleCommand, MistakesAreOneSentence) {
  const auto model = make_model();
  const std::string out = path("out.png");
  EXPECT_EQ(sentence(1, {"--model", model, "--prompt", "x", "--out", out, "--steps", "0"}),
            "sag-sample: --steps must be a whole number between 1 and 10000, got 0.\n");
  sentence(1, {});
  sentence(1, {"--model", path("nowhere"), "--prompt", "x", "--out", out});
  sentence(1, {"--unet", path("nowhere.ts"), "--out", out});
  sentence(1, {"--unet", kGoldenDir + "toy.json", "--save-latent", out});
  sentence(1, {"--unet", kGoldenDir + "unet_io.pt", "--save-latent", out});
  sentence(1, {"--model", model, "--prompt", "x", "--out", path("nowhere/out.png")});
  sentence(1, {"--model", model, "--prompt", "x", "--out", out, "--width", "20"});
  sentence(1, {"--model", model, "--prompt", "x", "--out", out, "--noise",
               kGoldenDir + "runs/eps_euler_normal.pt:cond"});
  EXPECT_FALSE(fs::exists(out));

  const auto no_site =
      run({"--model", model, "--prompt", "x", "--out", out, "--site", "middle.7.0"});
  EXPECT_EQ(no_site.code, 1);
  EXPECT_THAT(no_site.err, HasSubstr("middle.0.0")) << "what there is";
  sentence(1,
           {"--model", model, "--prompt", "x", "--out", out, "--site", std::string(100000, ' ')});
  sentence(1, {"--model", model, "--prompt", "x", "--out", out, "--site",
               "a:" + std::string(50000, '\n') + "b" + std::string(50000, '\n') + "c"});

  EXPECT_THAT(sentence(1, {"--model", model, "--prompt", "x", "--out", path("out.JPG")}),
              HasSubstr("--out writes PNG"));

  auto no_decoder = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
  no_decoder.insert(no_decoder.end(), {"--out", out});
  EXPECT_THAT(sentence(1, no_decoder), HasSubstr("decoder"));
}

TEST_F(SampleCommand, TensorsMustFitTheirPlace) {
  const auto with = [this](std::vector<std::string> more) {
    auto arguments = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
    arguments.insert(arguments.end(), more.begin(), more.end());
    arguments.insert(arguments.end(), {"--save-latent", path("latent.pt")});
    return arguments;
  };
  const auto latent = save("ok.pt", torch::zeros({1, 4, 16, 16}));
  EXPECT_THAT(sentence(1, with({"--noise", save("nan.pt", torch::full({1, 4, 16, 16}, NAN))})),
              HasSubstr("Noise must be finite"));
  EXPECT_THAT(sentence(1, with({"--latent", save("size.pt", torch::zeros({1, 4, 8, 16}))})),
              HasSubstr("--latent"));
  EXPECT_THAT(
      sentence(1, with({"--latent", latent, "--mask", save("mask.pt", torch::zeros({8, 8}))})),
      HasSubstr("--mask"));
  EXPECT_THAT(sentence(1, with({"--cond", save("cond.pt", torch::zeros({3, 4, 32}))})),
              HasSubstr("--cond"));
  EXPECT_THAT(sentence(1, with({"--sigmas", save("up.pt", torch::tensor({1.0, 2.0, 3.0}))})),
              HasSubstr("Sigmas must fall strictly"));
  EXPECT_FALSE(fs::exists(path("latent.pt")));
}

TEST_F(SampleCommand, SaysWhatARunDoesThatMayNotBeMeant) {
  const std::string file = kGoldenDir + "runs/eps_euler_normal.pt:";
  const std::vector<std::string> start = {"--latent",
                                          save("start.pt", torch::zeros({1, 4, 16, 16}))};
  const auto notes = [&](std::vector<std::string> more) {
    const std::vector<std::string> common = {"--unet",  kGoldenDir + "comfy_sd15_tiny.ts",
                                             "--cond",  file + "cond",
                                             "--steps", "1",
                                             "--json",  path("report.json")};
    more.insert(more.begin(), common.begin(), common.end());
    const auto finished = run(more);
    EXPECT_EQ(finished.code, 0) << finished.err;
    return report("report.json")["notes"].dump();
  };
  const std::vector<std::string> uncond = {"--uncond", file + "uncond"};
  const auto both = [](std::vector<std::string> a, const std::vector<std::string>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  EXPECT_THAT(notes(start), AllOf(HasSubstr("give --uncond"), HasSubstr("nothing is left")));
  EXPECT_THAT(notes(both(start, {"--denoise", "0.6", "--no-sag"})), "[]");
  EXPECT_THAT(notes(both(start, uncond)), Not(HasSubstr("give --uncond")));
  EXPECT_THAT(notes(both(uncond, {"--height", "16", "--width", "16"})), "[]");
  EXPECT_THAT(notes({"--cond", file + "uncond", "--uncond", file + "cond", "--no-sag", "--height",
                     "16", "--width", "16"}),
              HasSubstr("swapped"));
}

TEST_F(SampleCommand, FailedRunsLeaveNothingBehind) {
  const auto huge = path("huge.pt");
  std::ofstream(huge, std::ios::binary) << tensor_file_bytes(torch::full({1, 10, 32}, 3e38));
  auto arguments = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
  arguments.insert(arguments.end(), {"--cond", huge, "--save-latent", path("latent.pt"), "--json",
                                     path("report.json")});
  EXPECT_THAT(sentence(2, arguments), HasSubstr("The final latent must be finite, got NaN"));
  EXPECT_EQ(std::distance(fs::directory_iterator(path("")), {}), 1) << "only the input";
}

// Files with a number of rows written into them cost rows, and the report says how many.
TEST_F(SampleCommand, SaysWhatFillingCallsUpCosts) {
  auto arguments = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
  arguments.insert(arguments.end(), {"--save-latent", path("free.pt")});
  ASSERT_EQ(run(arguments).code, 0);
  arguments.insert(arguments.end(), {"--save-latent", path("latent.pt"), "--json",
                                     path("report.json"), "--unet-rows", "4"});
  const auto finished = run(arguments);
  ASSERT_EQ(finished.code, 0) << finished.err;
  const auto said = report("report.json");
  const std::int64_t rows = said["rows"], fillers = said["filler_rows"];
  // Two rows of CFG and one of SAG, each in a call of four.
  EXPECT_EQ(fillers * 8, rows * 5);
  EXPECT_THAT(said["notes"].dump(), HasSubstr("only filled calls of the UNet up"));
  EXPECT_TRUE(torch::allclose(latent("latent.pt"), latent("free.pt"), 1e-3, 1e-3));
}

TEST_F(SampleCommand, AFullDiskLeavesNothingBehind) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "there is no /dev/full";
  auto arguments = golden("comfy_sd15_tiny.ts", "eps_euler_normal");
  arguments.insert(arguments.end(), {"--save-latent", "/dev/full"});
  EXPECT_THAT(sentence(2, arguments), HasSubstr("No space left on device"));
}

TEST_F(SampleCommand, WhatNeedsTooMuchMemorySaysWhatNeedsLess) {
  auto arguments = golden_tensors("eps_euler_normal");
  // The contexts alone.
  arguments.resize(4);
  arguments.insert(arguments.end(), {"--unet", kGoldenDir + "comfy_sd15_tiny.ts", "--channels", "3",
                                     "--height", "65536", "--width", "65536", "--batch", "4096",
                                     "--save-latent", path("latent.pt")});
  EXPECT_THAT(sentence(2, arguments), AllOf(HasSubstr("memory"), HasSubstr("--max-rows")));
  EXPECT_FALSE(fs::exists(path("latent.pt")));
}

TEST_F(SampleCommand, AnInterruptedRunLeavesNothingBehind) {
  const auto model = make_model();
  const std::string line = quoted(SAG_SAMPLE_COMMAND) + " --model " + quoted(model) +
                           " --device cpu --threads 1 --prompt x --batch 16 --steps 10000 --out " +
                           quoted(path("out.png")) + " 2>" + quoted(path("stderr")) +
                           " & pid=$!; sleep 3; kill -INT $pid; wait $pid";
  // A shell starts background commands with SIGINT ignored; the command asks for it again.
  const int status = std::system(line.c_str());
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 2);
  EXPECT_THAT(read_bytes(path("stderr")),
              testing::EndsWith("\nsag-sample: stopping after this evaluation; once more stops at "
                                "once\nsag-sample: Interrupted; nothing was written.\n"));
  EXPECT_FALSE(fs::exists(path("out.png")));
}

}  // namespace
}  // namespace sag_sample

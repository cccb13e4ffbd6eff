// The mistakes of a first hour: each is one sentence with the way out, and nothing is written.
#include <filesystem>
#include <iterator>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <png.h>
#include <torch/torch.h>

#include "command.h"
#include "command_line.h"
#include "errors.h"
#include "files/tensor_file.h"
#include "messages.h"
#include "support/error.h"
#include "support/files.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;
using sag::test::kGoldenDir;
using testing::Each;
using testing::HasSubstr;

using Arguments = std::vector<std::string>;

// What the command says before it exits with 1; empty: it says nothing, or something else.
std::string mistake(const Arguments& arguments) {
  std::ostringstream out;
  try {
    const auto choices = parse_command_line(arguments, out);
    if (choices) run_command(*choices, out);
  } catch (const UsageError& error) {
    return error.what();
  } catch (const c10::ValueError& error) {
    return sentence_of(error);
  } catch (const c10::TypeError& error) {
    return sentence_of(error);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "not the user's mistake: " << error.what();
  }
  return {};
}

// A safetensors file of one empty tensor.
std::string safetensors(const std::string& name) {
  const auto header =
      fmt::format(R"({{"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}})", name);
  return std::string(1, static_cast<char>(header.size())) + std::string(7, '\0') + header;
}

// A PNG of 16 x 16 equal pixels, in libpng's format.
std::string png_of(png_uint_32 format, const std::vector<png_byte>& pixel) {
  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  image.width = image.height = 16;
  image.format = format;
  std::vector<png_byte> pixels;
  for (int i = 0; i < 256; ++i) pixels.insert(pixels.end(), pixel.begin(), pixel.end());
  std::string bytes(4096, '\0');
  png_alloc_size_t size = bytes.size();
  const auto written =
      png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels.data(), 0, nullptr);
  EXPECT_NE(written, 0) << image.message;
  bytes.resize(size);
  return bytes;
}

class SampleMistakes : public testing::Test {
 protected:
  SampleMistakes() {
    folder_.write("sd.safetensors", safetensors("model.diffusion_model.out.0.bias"));
    folder_.write("lora.safetensors", safetensors("lora_unet_down.lora_up.weight"));
    folder_.write("comfy.latent", safetensors("latent_tensor"));
    folder_.write("sd.gguf", "GGUF and more");
    folder_.write("sd.onnx", "\x08\x07 and more");
    folder_.write("old.ckpt", "\x80\x02 and more");
    folder_.write("empty.ts", "");
    folder_.write("empty.pt", "");
    folder_.write("empty.png", "");
    folder_.write("photo.jpg", "\xFF\xD8\xFF\xE0 and more");
    folder_.write("photo.webp", "RIFF\x24\x01\x01\x01WEBPVP8 and more");
    folder_.write("photo.gif", "GIF89a and more");
    folder_.write("photo.avif", std::string(3, '\0') +
                                    "\x1C"
                                    "ftypavif and more");
    folder_.write("alpha.png", png_of(PNG_FORMAT_RGBA, {0, 0, 0, 254}));
    folder_.write("grey_alpha.png", png_of(PNG_FORMAT_GA, {0, 0}));
    for (const char* name : {"diffusers", "lora", "packages", "pipeline/unet"})
      fs::create_directories(folder_.path(name));
    folder_.write("pipeline/model_index.json", "{}");
    folder_.write("pipeline/unet/config.json", "{}");
    folder_.write("diffusers/model_index.json", "{}");
    folder_.write("lora/adapter_config.json", "{}");
    folder_.write("noise.pt", tensor_file_bytes(torch::zeros({1, 4, 16, 16})));
    folder_.write("nan.pt", tensor_file_bytes(torch::full({1, 4, 16, 16}, NAN)));
  }

  std::string path(const std::string& name) const { return folder_.path(name); }

  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(folder_.path()))
      names.push_back(entry.path().string());
    return names;
  }

  sag::test::TemporaryFolder folder_;
};

// The arguments of a run that works, but for what is added to them.
const std::string kUNet = kGoldenDir + "comfy_sd15_tiny.ts",
                  kRun = kGoldenDir + "runs/eps_euler_normal.pt";

TEST_F(SampleMistakes, AreOneSentenceWithTheWayOut) {
  const Arguments write = {"--save-latent", path("out.pt"), "--device", "cpu"};
  const auto unet = [&](const std::string& file) { return Arguments{"--unet", file}; };
  const auto model = [&](const std::string& directory) {
    return Arguments{"--model", directory, "--prompt", "x"};
  };
  const auto checkpoint = [&](const std::string& file, const Arguments& more = {}) {
    Arguments all = {"--checkpoint", file, "--prompt", "x"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  // A small run that works, and what spoils it.
  const auto run = [&](const Arguments& more) {
    Arguments all = {"--unet", kUNet, "--cond", kRun + ":cond", "--uncond", kRun + ":uncond"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const auto sized = [&](Arguments more) {
    more.insert(more.end(), {"--height", "16", "--width", "16"});
    return run(more);
  };
  const auto repaint = [&](const std::string& mask) {
    return run({"--latent", path("noise.pt"), "--mask", path(mask)});
  };
  struct Row {
    Arguments arguments;
    // What the sentence must say.
    std::vector<std::string> words;
  };
  const std::vector<Row> table = {
      // Files of another kind.
      {unet(path("sd.safetensors")), {"safetensors", "--checkpoint FILE", "sag-export"}},
      {unet(path("lora.safetensors")), {"LoRA", "--lora FILE", "fuse_lora", "sag-export"}},
      {unet(path("sd.gguf")), {"GGUF", "sag-export"}},
      {unet(path("sd.onnx")), {"ONNX", "sag-export"}},
      {unet(path("old.ckpt")), {"checkpoint", "sag-export"}},
      {unet(kGoldenDir + "unet_io.pt"), {"torch.save", "sag-export"}},
      {unet(path("comfy.latent")), {"latent", "ComfyUI"}},
      {unet(path("empty.ts")), {"empty"}},
      {unet(path("diffusers")), {"diffusers folder", "sag-export"}},
      {unet(path("lora")), {"LoRA", "sag-export"}},
      {unet(path("packages")), {"packages (*.pt2)", "has none"}},
      {model(path("diffusers")), {"diffusers folder", "sag-export", "--out DIR"}},
      {model(path("pipeline/unet")),
       {"part of a diffusers pipeline", "sag-export", "pipeline --out"}},
      {model(sag::test::kModelDir + "model.json"),
       {"got the file", "give --model", "models/emoji"}},
      {model(path("packages")), {"no model.json"}},
      {model(path("sd.safetensors")), {"directory", "--checkpoint", "sag-export"}},
      {model(kUNet), {"directory", "--unet"}},
      {run({"--latent", path("comfy.latent")}), {"latent_tensor", "0.18215", "python3 -c"}},
      {run({"--latent", path("sd.safetensors") + ":x"}),
       {"--latent", "no tensor \"x\"", "out.0.bias"}},
      {run({"--noise", path("empty.pt")}), {"--noise", "is empty"}},
      {run({"--noise", kUNet}), {"--noise", "TorchScript model, not tensors"}},
      {run({"--image", path("empty.png")}), {"--image", "empty.png", "is empty"}},
      {run({"--image", path("photo.jpg")}), {"--image", "JPEG", "save it as PNG"}},
      {repaint("photo.jpg"), {"--mask", "JPEG", "save it as PNG"}},
      {repaint("photo.webp"), {"--mask", "WebP", "save it as PNG"}},
      {repaint("photo.gif"), {"--mask", "GIF", "save it as PNG"}},
      {repaint("photo.avif"), {"--mask", "AVIF", "save it as PNG"}},
      {repaint("alpha.png"), {"--mask", "transparent", "save it without"}},
      {repaint("grey_alpha.png"), {"--mask", "transparent", "save it without"}},
      {checkpoint(path("lora.safetensors")), {"--checkpoint must name", "LoRA", "--lora"}},
      {checkpoint(path("sd.gguf")), {"--checkpoint must name", "GGUF", "not read"}},
      {checkpoint(path("old.ckpt")), {"pickle", "program", "save_file"}},
      {checkpoint(kGoldenDir + "unet_io.pt"), {"pickle", "program", "save_file"}},
      {checkpoint(kUNet), {"--checkpoint must name"}},
      {checkpoint(path("empty.ts")), {"--checkpoint must name", "is empty"}},
      {checkpoint(path("diffusers")), {"--checkpoint", "is a folder", "sag-export", "--model"}},
      {checkpoint(path("sd.safetensor")), {"no file", "do you mean", "sd.safetensors\""}},
      {checkpoint(path("sd.safetensors"), {"--vae", path("sd.gguf")}), {"--vae must name", "GGUF"}},
      {checkpoint(path("sd.safetensors"), {"--vae", path("none")}), {"--vae", "no file"}},
      {checkpoint(path("sd.safetensors"), {"--lora", path("none:0.5")}), {"--lora", "no file"}},
      {checkpoint(path("sd.safetensors"), {"--lora", path("sd.safetensors:strong")}),
       {"--lora: the strength", "strong"}},
      {checkpoint(path("sd.safetensors"), {"--embedding", path("sd.gguf")}),
       {"--embedding must be NAME=FILE"}},
      {checkpoint(path("sd.safetensors"), {"--lora", path("sd.gguf")}),
       {"--lora must name", "GGUF"}},
      {checkpoint(path("sd.safetensors"), {"--embedding", "(a)=" + path("sd.gguf")}),
       {"--embedding", "parentheses"}},
      {checkpoint(path("sd.safetensors"), {"--embedding", "a=" + path("sd.gguf")}),
       {"--embedding must name", "GGUF"}},
      {checkpoint(path("sd.safetensors"), {"--skeleton", path("none")}), {"--skeleton must be"}},
      {checkpoint(path("sd.safetensors"), {"--prediction", "flow"}),
       {"--prediction must be eps, v or x0"}},
      {checkpoint(path("sd.safetensors"), {"--describe"}), {"--describe", "--save-latent"}},
      {sized({"--vae", path("sd.safetensors")}), {"--vae needs a --checkpoint"}},
      {sized({"--lora", path("sd.safetensors")}), {"--lora needs a --checkpoint"}},
      {sized({"--describe"}), {"--describe needs a --checkpoint"}},
      {{"--checkpoint", path("sd.safetensors"), "--unet", kUNet}, {"together"}},
      // Files that are not there.
      {unet(kGoldenDir + "comfy_sd15_tiny.tss"),
       {"no file", "do you mean", "comfy_sd15_tiny.ts\""}},
      {unet(path("nowhere/unet.ts")), {"no file"}},
      {model(path("diffuser")), {"no directory", "do you mean", "diffusers\""}},
      {run({"--noise", path("noise.tp")}), {"no file", "do you mean", "noise.pt\""}},
      {run({"--noise", path("noises.pt") + ":key"}), {"no file", "do you mean", "noise.pt\""}},
      {run({"--cond", kRun + ":cnod"}), {"no tensor \"cnod\"", "do you mean cond?"}},
      {run({"--cond", kRun}), {"one of its tensors", "KEY"}},
      // Names with a typo.
      {sized({"--stesp", "3"}), {"no option --stesp", "do you mean --steps?"}},
      {sized({"--Cfg=3"}), {"no option --Cfg", "do you mean --cfg?"}},
      {sized({"--quality", "high"}), {"no option --quality", "--help"}},
      {sized({"--sampler", "eular"}), {"--sampler", "do you mean euler?"}},
      {sized({"--schedule", "Karras"}), {"--schedule", "do you mean karras?"}},
      {sized({"--prediction", "epsilon"}), {"--prediction must be one of eps"}},
      {sized({"--site", "midle.0.0"}), {"self-attention", "do you mean middle.0.0?"}},
      // Numbers that cannot be meant.
      {run({"--height", "512", "--width", "512"}), {"pixels", "64 x 64", "--noise"}},
      {sized({"--steps", "0"}), {"--steps must be", "got 0"}},
      {sized({"--steps", "20", "--denoise", "0.02"}), {"--denoise", "--latent"}},
      {run({"--steps", "20", "--denoise", "0.02", "--schedule", "ddim_uniform", "--latent",
            path("noise.pt")}),
       {"steps / denoise", "fewer steps", "another schedule"}},
      {run({"--noise", path("nan.pt")}), {"must be finite"}},
      {run({"--noise", path("noise.pt"), "--cond", path("noise.pt")}), {"--cond", "shape"}},
      // What does not go together, or is missing.
      {{"--unet", kUNet, "--prompt", "a fox"}, {"--prompt", "text encoder", "--cond"}},
      {{"--unet", kUNet, "--cond", kRun + ":cond", "--cfg", "7"}, {"--cfg", "--uncond"}},
      {{"--unet", kUNet, "--model", path("diffusers")}, {"--model", "--unet", "together"}},
      {run({"--prompt", "a fox"}), {"--prompt", "--cond", "together"}},
      {run({"--noise", path("noise.pt"), "--height", "16"}), {"--height", "--noise", "together"}},
      {{"--prompt", "a fox"}, {"--checkpoint", "--model", "--unet"}},
      {sized({"--sag-one-pass", "--no-sag"}), {"--sag-one-pass", "--no-sag", "together"}},
      // Places that cannot be written to.
      {sized({"--json", path("nowhere/report.json")}), {"--json", "no directory"}},
      {sized({"--json", path("diffusers")}), {"--json", "is a directory"}},
      {sized({"--out", path("out.jpg")}), {"--out", ".png"}},
      {sized({"--out", path("model.safetensors")}), {"--out", ".png"}},
      {sized({"--out", path("same.png"), "--json", path("same.png")}),
       {"--json must not take the place of --out"}},
      {sized({"--out", path("same.png"), "--json", path("./same.png")}),
       {"--json must not take the place of --out"}},
      {sized({"--json", kUNet}), {"--json must not take the place of --unet"}},
      {{"--model", sag::test::kModelDir, "--prompt", "x", "--json",
        sag::test::kModelDir + "model.json"},
       {"--json must not take the place of --model"}},
      {run({"--noise", path("noise.pt"), "--json", path("noise.pt")}),
       {"--json must not take the place of --noise"}},
      {run({"--image", path("diffusers")}), {"--image", "is a folder"}},
      {sized({"--out", path("out.png")}), {"--out", "decoder", "--save-latent"}},
  };
  const auto before = files();
  for (auto row : table) {
    row.arguments.insert(row.arguments.end(), write.begin(), write.end());
    const auto sentence = mistake(row.arguments);
    SCOPED_TRACE(fmt::format("{}", fmt::join(row.arguments, " ")));
    for (const auto& word : row.words) EXPECT_THAT(sentence, HasSubstr(word));
    EXPECT_THAT(sentence, sag::test::one_sentence());
    EXPECT_TRUE(sentence.ends_with('.') || sentence.ends_with('?') || sentence.ends_with(')'));
    EXPECT_EQ(files(), before) << "nothing is written";
  }
}

TEST_F(SampleMistakes, AnAlphaChannelWithoutTransparencyIsNone) {
  folder_.write("opaque.png", png_of(PNG_FORMAT_RGBA, {255, 255, 255, 255}));
  EXPECT_EQ(mistake({"--unet", kUNet, "--cond", kRun + ":cond", "--latent", path("noise.pt"),
                     "--mask", path("opaque.png"), "--steps", "1", "--no-sag", "--device", "cpu",
                     "--quiet", "--save-latent", path("out.pt")}),
            "");
}

TEST_F(SampleMistakes, ADeviceThatIsNotThereLeavesTheCpu) {
  if (torch::cuda::device_count() > 0) GTEST_SKIP() << "there is one";
  EXPECT_THAT(mistake({"--unet", kUNet, "--device", "cuda", "--save-latent", path("out.pt")}),
              testing::AllOf(HasSubstr("no CUDA device"), HasSubstr("--device cpu")));
}

TEST(SampleNearest, NamesAreNearByLetters) {
  const std::vector<std::string> names = {"euler", "euler_ancestral", "heun", "dpmpp_2m"};
  EXPECT_EQ(suggestion("eluer", names), "; do you mean euler?");
  EXPECT_EQ(suggestion("Euler", names), "; do you mean euler?");
  EXPECT_EQ(suggestion("dpmpp2m", names), "; do you mean dpmpp_2m?");
  EXPECT_EQ(suggestion("euler_ancestrall", names), "; do you mean euler_ancestral?");
  EXPECT_EQ(suggestion("plms", names), ".");
  EXPECT_EQ(suggestion("", names), ".");
  EXPECT_EQ(suggestion(std::string(100000, 'e'), names), ".");
  EXPECT_EQ(suggestion("euler", {}), ".");
}

}  // namespace
}  // namespace sag_sample

// Checkpoints in one file: skeletons that are filled, and what is refused.

#include "sag/checkpoint.h"

#include <functional>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/script.h>
#include <nlohmann/json.hpp>

#include "sag/unet.h"
#include "support/error.h"
#include "support/files.h"
#include "support/safetensors_file.h"
#include "support/torchscript_fixture.h"

namespace sag {
namespace {

using nlohmann::json;
using test::error_of;
using test::one_sentence;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using torch::jit::Module;
using Tensors = std::map<std::string, torch::Tensor>;

constexpr const char* kUNet = "model.diffusion_model.";
const std::string kInput = std::string(kUNet) + "input_blocks.0.0.weight";
const std::string kFused = std::string(kUNet) + "middle.qkv";

Module make_text_encoder() {
  Module encoder("TextEncoder");
  encoder.register_parameter("table", torch::randn({256, 6}), false);
  encoder.define(R"(
def encode(self, text: str):
    ids = [ord(c) for c in text + " "]
    return torch.unsqueeze(torch.embedding(self.table, torch.tensor(ids)), 0)
)");
  return encoder;
}

// Between four channels and three.
Module make_vae(const std::string& half, std::int64_t to, std::int64_t from) {
  Module network("Vae");
  Module vae("Inner");
  vae.register_parameter(half, torch::randn({to, from, 1, 1}), false);
  network.register_module("vae", vae);
  network.define("def forward(self, x):\n    return torch.conv2d(x, self.vae." + half + ")\n");
  return network;
}

// A folder with a skeleton of small networks, and a checkpoint that fits.
class CheckpointFile : public testing::Test {
 protected:
  CheckpointFile() {
    unet_ = test::make_torchscript_unet();
    text_ = make_text_encoder();
    decoder_ = make_vae("decoder", 3, 4);
    encoder_ = make_vae("encoder", 4, 3);
    std::filesystem::create_directories(path("tiny"));
    json names = {{"unneeded", {"model_ema.*", "betas"}}};
    for (const auto& [name, parameter] : unet_.named_parameters()) {
      store(names, name, kUNet + name, parameter);
    }
    store_specially(names);
    save(unet_, "unet.ts", names);
    names = {{"spellings", json::array({json::array({"text.long.", "text."})})}};
    store(names, "table", "text.long.table", text_.attr("table").toTensor());
    save(text_, "text_encoder.ts", names);
    for (const auto& [module, half] : {std::pair(&decoder_, "decoder"), {&encoder_, "encoder"}}) {
      names = {{"unneeded", {"first_stage_model.loss.*"}}};
      const auto name = std::string("vae.") + half;
      store(names, name, std::string("first_stage_model.") + half + ".weight",
            module->attr("vae").toModule().attr(half).toTensor());
      save(*module, half + std::string(".ts"), names);
    }
    test::write_bytes(path("tiny/model.json"), R"({"prediction": "v"})");
  }

  std::string path(const std::string& name) const { return folder_.path(name); }

  // Puts a parameter into the checkpoint, and its name into names.json.
  void store(json& names, const std::string& name, const std::string& key,
             const torch::Tensor& value) {
    names["parameters"][name] = {{"key", key}, {"shape", value.sizes().vec()}};
    tensors_[key] = value.detach().clone();
  }

  // The channels of the input are free; time is transposed; an attention's q, k and v are rows of
  // one tensor; and the last convolution's is followed by a side of 1.
  void store_specially(json& names) {
    auto& all = names["parameters"];
    tensors_.erase(kUNet + std::string("conv_in"));
    store(names, "conv_in", kInput, unet_.attr("conv_in").toTensor());
    all["conv_in"]["free"] = {1};
    auto& time = tensors_[kUNet + std::string("time")];
    time = time.t().contiguous();
    all["time"]["transposed"] = true;
    std::vector<torch::Tensor> rows;
    for (const char* part : {"q", "k", "v"}) {
      const auto name = std::string("middle_block.1.transformer_blocks.0.attn1.") + part;
      const auto begin = static_cast<std::int64_t>(rows.size()) * test::kWidth;
      all[name]["key"] = kFused;
      all[name]["rows"] = {begin, begin + test::kWidth};
      rows.push_back(tensors_.at(kUNet + name));
      tensors_.erase(kUNet + name);
    }
    tensors_[kFused] = torch::cat(rows);
    auto& out = tensors_[kUNet + std::string("middle_block.1.transformer_blocks.0.attn1.out")];
    out = out.unsqueeze(-1).unsqueeze(-1);
  }

  void save(const Module& module, const std::string& name, const json& names) const {
    auto hollow = module.clone();
    for (auto parameter : hollow.parameters())
      parameter.set_data(torch::zeros({1}).expand(parameter.sizes()));
    hollow.save(path("tiny/" + name), {{"names.json", names.dump()}});
  }

  Checkpoint open(CheckpointOptions options = {}) const {
    test::write_bytes(path("a.safetensors"), test::safetensors_bytes(tensors_, metadata_));
    options.skeleton = path("tiny");
    return Checkpoint::open(path("a.safetensors"), options);
  }

  std::string refusal(const CheckpointOptions& options = {}) const {
    const auto message = error_of<c10::ValueError>([&] { open(options); });
    EXPECT_THAT(message, one_sentence());
    return message;
  }

  UNetInput input(std::int64_t channels = 4) const {
    torch::manual_seed(3);
    return {.x = torch::randn({2, channels, 5, 7}),
            .timesteps = torch::tensor({3.0f, 700.0f}),
            .context = torch::randn({2, 3, test::kContextWidth})};
  }

  test::TemporaryFolder folder_;
  Module unet_{"UNet"}, text_{"Text"}, decoder_{"Decoder"}, encoder_{"Encoder"};
  Tensors tensors_;
  std::map<std::string, std::string> metadata_;
};

TEST_F(CheckpointFile, FillsEveryParameterOfTheUNet) {
  const auto checkpoint = open();
  const auto& info = checkpoint.info();
  EXPECT_EQ(info.family, "tiny");
  EXPECT_EQ(info.prediction, Prediction::v);
  EXPECT_EQ(info.in_channels, 4);
  EXPECT_EQ(info.dtype, torch::kFloat);
  unet_.eval();
  const auto expected = TorchScriptUNet::from_module(unet_);
  const auto got = checkpoint.load_unet();
  EXPECT_TRUE(got->forward(input()).equal(expected->forward(input())));
  EXPECT_EQ(got->attention_sites().size(), expected->attention_sites().size());
  EXPECT_EQ(got->attention_sites().front().name, "input.1.0");
  EXPECT_EQ(info.unet_parameters, [&] {
    std::int64_t count = 0;
    for (const auto& parameter : unet_.parameters()) count += parameter.numel();
    return count;
  }());
}

TEST_F(CheckpointFile, KeepsItsOwnValuesWhenAUNetIsConverted) {
  const auto checkpoint = open();
  const auto first = checkpoint.load_unet()->forward(input());
  const auto half = checkpoint.load_unet({.dtype = torch::kBFloat16});
  EXPECT_EQ(half->dtype(), torch::kBFloat16);
  EXPECT_TRUE(checkpoint.load_unet({.channels_last = true})->forward(input()).defined());
  EXPECT_TRUE(checkpoint.load_unet()->forward(input()).equal(first));
}

TEST_F(CheckpointFile, RunsHalvesInFp32OnTheCpu) {
  for (auto& [name, tensor] : tensors_) tensor = tensor.to(torch::kHalf);
  for (auto parameter : unet_.parameters())
    parameter.set_data(parameter.to(torch::kHalf).to(torch::kFloat));
  unet_.eval();
  const auto checkpoint = open();
  EXPECT_EQ(checkpoint.info().dtype, torch::kHalf);
  const auto unet = checkpoint.load_unet();
  EXPECT_EQ(unet->dtype(), torch::kFloat);
  EXPECT_TRUE(unet->forward(input()).equal(TorchScriptUNet::from_module(unet_)->forward(input())));
}

TEST_F(CheckpointFile, DecidesTheChannelsOfTheInput) {
  tensors_[kInput] = torch::randn({test::kWidth, 9, 3, 3});
  const auto checkpoint = open();
  EXPECT_EQ(checkpoint.info().in_channels, 9);
  auto wide = input(9);
  unet_.setattr("conv_in", tensors_[kInput]);
  unet_.eval();
  const auto expected = unet_.forward({wide.x, wide.timesteps, wide.context}).toTensor();
  EXPECT_TRUE(checkpoint.load_unet()->forward(wide).equal(expected));
}

TEST_F(CheckpointFile, HasItsTextEncoderAndVae) {
  const auto checkpoint = open();
  const auto& info = checkpoint.info();
  EXPECT_TRUE(info.has_text_encoder && info.has_decoder && info.has_encoder);
  EXPECT_EQ(info.text_parameters, 256 * 6);
  EXPECT_EQ(info.vae_parameters, 24);
  const auto text = checkpoint.load_text_encoder().encode("fox", 8, 8);
  EXPECT_TRUE(text.context.equal(text_.get_method("encode")({"fox"}).toTensor()));
  const auto latent = torch::randn({2, 4, 6, 5});
  const auto picture = checkpoint.load_decoder().run(latent);
  EXPECT_TRUE(picture.equal(torch::cat({decoder_.forward({latent.slice(0, 0, 1)}).toTensor(),
                                        decoder_.forward({latent.slice(0, 1, 2)}).toTensor()})));
  EXPECT_TRUE(checkpoint.load_encoder()
                  .run(picture.slice(0, 0, 1))
                  .equal(encoder_.forward({picture.slice(0, 0, 1)}).toTensor()));
}

TEST_F(CheckpointFile, LoadsAllAtOnce) {
  open();
  const auto loaded = load_checkpoint(path("a.safetensors"), {.skeleton = path("tiny")});
  EXPECT_TRUE(loaded.unet->forward(input()).defined());
  EXPECT_EQ(loaded.model_sampling.prediction(), Prediction::v);
  EXPECT_TRUE(loaded.text_encoder && loaded.decoder && loaded.encoder);
}

TEST_F(CheckpointFile, MayBeAUNetAlone) {
  for (const char* name :
       {"text.long.table", "first_stage_model.decoder.weight", "first_stage_model.encoder.weight"})
    tensors_.erase(name);
  const auto checkpoint = open();
  EXPECT_FALSE(checkpoint.info().has_text_encoder || checkpoint.info().has_decoder);
  EXPECT_THAT(error_of<c10::ValueError>([&] { checkpoint.load_text_encoder(); }),
              HasSubstr("must have a text encoder"));
  EXPECT_THAT(error_of<c10::ValueError>([&] { checkpoint.load_decoder(); }),
              HasSubstr("must have a VAE"));
}

TEST_F(CheckpointFile, KnowsOtherSpellings) {
  tensors_["text.table"] = tensors_["text.long.table"];
  tensors_.erase("text.long.table");
  EXPECT_TRUE(open().info().has_text_encoder);
}

TEST_F(CheckpointFile, MayHoldAParameterInAnotherWay) {
  save(text_, "text_encoder.ts",
       {{"parameters",
         {{"table",
           {{"key", "text.long.table"},
            {"shape", {256, 6}},
            {"also", json::array({{{"key", "other"}, {"transposed", true}}})}}}}}});
  tensors_["other"] = tensors_["text.long.table"].t().contiguous();
  EXPECT_THAT(refusal(), HasSubstr("nothing is known about: \"other\""));
  tensors_.erase("text.long.table");
  const auto text = open().load_text_encoder().encode("fox", 8, 8);
  EXPECT_TRUE(text.context.equal(text_.get_method("encode")({"fox"}).toTensor()));
}

TEST_F(CheckpointFile, CountsWhatNobodyNeeds) {
  tensors_["betas"] = torch::zeros({3});
  tensors_["model_ema.a"] = torch::zeros({3});
  tensors_["model_ema.b"] = torch::zeros({3}, torch::kLong);
  tensors_["first_stage_model.loss.logvar"] = torch::zeros({1});
  EXPECT_THAT(
      open().info().skipped,
      ElementsAre(Pair("betas", 1), Pair("first_stage_model.loss.*", 1), Pair("model_ema.*", 2)));
}

TEST_F(CheckpointFile, NotesANoiseTableOfItsOwn) {
  save(unet_, "unet.ts", [&] {
    torch::jit::ExtraFilesMap notes = {{"names.json", ""}};
    torch::jit::load(path("tiny/unet.ts"), torch::kCPU, notes);
    auto names = json::parse(notes["names.json"]);
    names["unneeded"].push_back("alphas_cumprod");
    return names;
  }());
  const auto betas = torch::linspace(std::sqrt(0.00085), std::sqrt(0.012), 1000, torch::kDouble);
  tensors_["alphas_cumprod"] = (1 - betas * betas).cumprod(0).to(torch::kHalf);
  EXPECT_TRUE(open().info().notes.empty());
  tensors_["alphas_cumprod"] = torch::linspace(1, 0, 1000);
  EXPECT_THAT(open().info().notes, ElementsAre(HasSubstr("alphas_cumprod")));
}

TEST_F(CheckpointFile, RefusesWhatDoesNotFit) {
  const auto whole = tensors_;
  const auto with = [&](const std::function<void()>& change) {
    tensors_ = whole;
    change();
    return refusal();
  };
  EXPECT_THAT(with([&] {
                tensors_["what"] = tensors_["is"] = tensors_["this"] = tensors_["one"] =
                    torch::zeros({1});
              }),
              HasSubstr("4 tensors that nothing is known about: \"is\", \"one\", \"this\" and 1 "
                        "more"));
  EXPECT_THAT(with([&] { tensors_.erase(kFused); }),
              HasSubstr("1 tensor is missing: \"model.diffusion_model.middle.qkv\""));
  EXPECT_THAT(with([&] {
                tensors_[kFused] = torch::zeros({32, 8});
              }),
              HasSubstr("has 32 rows in place of 24"));
  EXPECT_THAT(with([&] { tensors_[kFused] = torch::zeros({16, 8}); }), HasSubstr("some rows of"));
  EXPECT_THAT(with([&] {
                tensors_[kInput] = torch::zeros({9, 4, 3, 3});
              }),
              HasSubstr("has the shape [9, 4, 3, 3] in place of [8, 4, 3, 3]"));
  EXPECT_THAT(with([&] { tensors_[kInput] = tensors_[kInput].to(torch::kChar); }),
              HasSubstr("is Char: quantized weights are not read"));
  EXPECT_THAT(with([&] {
                for (const auto& [name, tensor] : whole)
                  if (name.starts_with(kUNet)) tensors_.erase(name);
              }),
              HasSubstr("none of the tensors of the skeleton's UNet"));
}

TEST_F(CheckpointFile, RefusesWeightsThatAreNotFinite) {
  tensors_[kFused][3][2] = std::numeric_limits<float>::quiet_NaN();
  const auto checkpoint = open();
  EXPECT_THAT(
      error_of<c10::ValueError>([&] { checkpoint.load_unet(); }),
      AllOf(one_sentence(), HasSubstr("must be finite in Float, got NaN or infinity in 1")));
  tensors_[kFused][3][2] = 1e6;
  const auto large = open();
  EXPECT_NO_THROW(large.load_unet());
  EXPECT_THAT(error_of<c10::ValueError>([&] { large.load_unet({.dtype = torch::kHalf}); }),
              HasSubstr("must be finite in Half"));
}

TEST_F(CheckpointFile, TakesAVaeFromAnotherFile) {
  const Tensors own = {{"decoder", torch::randn({3, 4, 1, 1})},
                       {"encoder", torch::randn({4, 3, 1, 1})}};
  const auto vae = [&](const std::function<std::string(const std::string&)>& name,
                       const Tensors& more = {}) {
    Tensors file = more;
    for (const auto& [half, value] : own) file[name(half)] = value;
    test::write_bytes(path("vae.safetensors"), test::safetensors_bytes(file));
    return CheckpointOptions{.vae = path("vae.safetensors")};
  };
  const auto latent = torch::randn({1, 4, 6, 5});
  const auto expected = torch::conv2d(latent, own.at("decoder"));
  const auto ldm = [](const std::string& half) { return "first_stage_model." + half + ".weight"; };
  const auto bare = [](const std::string& half) { return half + ".weight"; };
  EXPECT_TRUE(open(vae(ldm)).load_decoder().run(latent).equal(expected));
  EXPECT_TRUE(open(vae(bare, {{"loss.logvar", torch::zeros({1})}}))
                  .load_decoder()
                  .run(latent)
                  .equal(expected));
  // With diffusers' names; one of them tells.
  EXPECT_THAT(refusal(vae([](const std::string& half) { return half; })),
              HasSubstr("has no tensor of its decoder"));
  EXPECT_THAT(refusal(vae(bare, {{"other", torch::zeros({1})}})),
              AllOf(HasSubstr("vae.safetensors"), HasSubstr("nothing is known about: \"other\"")));
  for (const char* half : {"decoder", "encoder"})
    tensors_.erase(std::string("first_stage_model.") + half + ".weight");
  EXPECT_TRUE(open(vae(ldm)).info().has_decoder);
}

TEST_F(CheckpointFile, NeedsNothingOfItsOwnVaeBesideAnother) {
  tensors_["first_stage_model.decoder.weight"] = torch::zeros({7}, torch::kChar);
  tensors_.erase("first_stage_model.encoder.weight");
  tensors_["first_stage_model.other"] = torch::zeros({1});
  refusal();
  test::write_bytes(path("vae.safetensors"),
                    test::safetensors_bytes({{"decoder.weight", torch::ones({3, 4, 1, 1})}}));
  const auto checkpoint = open({.vae = path("vae.safetensors")});
  EXPECT_EQ(checkpoint.info().skipped.at("first_stage_model.*"), 2);
  EXPECT_FALSE(checkpoint.info().has_encoder);
  EXPECT_TRUE(checkpoint.load_decoder()
                  .run(torch::ones({1, 4, 2, 2}))
                  .equal(torch::full({1, 3, 2, 2}, 4.0)));
}

TEST_F(CheckpointFile, TakesEmbeddingsForATextEncoderOnly) {
  test::write_bytes(path("word.safetensors"),
                    test::safetensors_bytes({{"emb_params", torch::ones({2, 5})}}));
  const CheckpointOptions options = {.embeddings = {{"word", path("word.safetensors")}}};
  EXPECT_THAT(refusal(options), AllOf(HasSubstr("word.safetensors"), HasSubstr("vectors of 5")));
  tensors_.erase("text.long.table");
  EXPECT_THAT(refusal(options), HasSubstr("must have a text encoder for textual inversions"));
}

TEST_F(CheckpointFile, ReadsWhatItPredicts) {
  EXPECT_EQ(open({.prediction = Prediction::x0}).info().prediction, Prediction::x0);
  metadata_["modelspec.prediction_type"] = "epsilon";
  EXPECT_EQ(open().info().prediction, Prediction::eps);
  EXPECT_THAT(open().info().prediction_reason, HasSubstr("modelspec.prediction_type"));
  EXPECT_THAT(error_of<c10::ValueError>([&] { open({.prediction = Prediction::flow}); }),
              HasSubstr("prediction must be eps, v or x0, got flow"));
}

TEST_F(CheckpointFile, RefusesSkeletonsThatAreNone) {
  open();
  unet_.save(path("tiny/unet.ts"));
  EXPECT_THAT(refusal(), HasSubstr("which has no names.json"));
  const auto one =
      R"({"parameters": {"conv_in": {"key": ")" + kInput + R"(", "shape": [8, 4, 3, 3]}},
                       "unneeded": ["model.*"]})";
  unet_.save(path("tiny/unet.ts"), {{"names.json", one}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { open().load_unet(); }),
              AllOf(one_sentence(), HasSubstr("names.json must say what checkpoints call every")));
  unet_.save(path("tiny/unet.ts"), {{"names.json", "{\"parameters\": {\"a\": 1}}"}});
  EXPECT_THAT(refusal(), HasSubstr("names.json is damaged"));
  test::write_bytes(path("tiny/model.json"), "{}");
  EXPECT_THAT(refusal(), HasSubstr("whose model.json has the prediction"));
}

// ---- the families

// What the skeletons that sag brings say that a checkpoint of a family holds.
test::TensorShapes tensors_of(const std::string& family, std::int64_t in_channels = 4) {
  test::TensorShapes tensors;
  for (const char* name : {"unet.ts", "text_encoder.ts", "decoder.ts", "encoder.ts"}) {
    torch::jit::ExtraFilesMap notes = {{"names.json", ""}};
    torch::jit::load(test::kSourceDir + "models/skeletons/" + family + "/" + name, torch::kCPU,
                     notes);
    const auto names = json::parse(notes["names.json"]);
    for (const auto& stored : names["parameters"]) {
      auto shape = stored["shape"].get<std::vector<std::int64_t>>();
      if (stored.value("transposed", false)) std::swap(shape[0], shape[1]);
      if (stored.contains("free")) shape[1] = in_channels;
      auto& known = tensors[stored["key"]];
      if (stored.contains("rows"))
        shape[0] = std::max<std::int64_t>(stored["rows"][1].get<std::int64_t>(),
                                          known.second.empty() ? 0 : known.second[0]);
      known = {torch::kHalf, shape};
    }
  }
  return tensors;
}

class Families : public testing::Test {
 protected:
  CheckpointInfo info(const test::TensorShapes& tensors,
                      const std::map<std::string, std::string>& metadata = {}) const {
    test::write_zeros(path_, tensors, metadata);
    return Checkpoint::open(path_, {.skeletons = test::kSourceDir + "models/skeletons"}).info();
  }

  std::string refusal(const test::TensorShapes& tensors) const {
    const auto message = error_of<c10::ValueError>([&] { info(tensors); });
    EXPECT_THAT(message, one_sentence());
    return message;
  }

  test::TemporaryFolder folder_;
  std::string path_ = folder_.path("a.safetensors");
};

TEST_F(Families, AreRecognised) {
  const auto one = info(tensors_of("sd1"));
  EXPECT_EQ(one.family, "sd1");
  EXPECT_EQ(one.prediction, Prediction::eps);
  EXPECT_EQ(one.unet_parameters, 859'520'964);
  EXPECT_EQ(one.text_parameters, 123'060'480);
  EXPECT_EQ(one.vae_parameters, 83'653'863);
  EXPECT_TRUE(one.has_text_encoder && one.has_decoder && one.has_encoder);
  const auto two = info(tensors_of("sd2"));
  EXPECT_EQ(two.family, "sd2");
  EXPECT_EQ(two.unet_parameters, 865'910'724);
  const auto xl = info(tensors_of("sdxl"));
  EXPECT_EQ(xl.family, "sdxl");
  EXPECT_EQ(xl.unet_parameters, 2'567'463'684);
  EXPECT_EQ(xl.text_parameters, 123'060'480 + 694'659'840);
}

TEST_F(Families, MayTakeFurtherChannels) {
  EXPECT_EQ(info(tensors_of("sd1", 9)).in_channels, 9);
  EXPECT_EQ(info(tensors_of("sd1", 8)).in_channels, 8);
  EXPECT_EQ(info(tensors_of("sd2", 9)).in_channels, 9);
  EXPECT_EQ(info(tensors_of("sdxl", 9)).in_channels, 9);
  EXPECT_THAT(refusal(tensors_of("sd2", 5)), HasSubstr("depth"));
  EXPECT_THAT(refusal(tensors_of("sd1", 6)), HasSubstr("takes 6 channels"));
}

TEST_F(Families, TellWhatTheyPredict) {
  auto xl = tensors_of("sdxl");
  xl["v_pred"] = {torch::kFloat, {}};
  EXPECT_EQ(info(xl).prediction, Prediction::v);
  EXPECT_FALSE(info(xl).zero_terminal_snr);
  xl["ztsnr"] = {torch::kFloat, {}};
  EXPECT_TRUE(info(xl).zero_terminal_snr);
  xl["edm_vpred.sigma_max"] = {torch::kFloat, {}};
  EXPECT_THAT(refusal(xl), HasSubstr("EDM"));
  xl.erase("edm_vpred.sigma_max");
  xl["edm_mean"] = xl["edm_std"] = {torch::kFloat, {1, 4, 1, 1}};
  EXPECT_THAT(refusal(xl), HasSubstr("Playground"));
  EXPECT_EQ(info(tensors_of("sd2")).prediction, Prediction::eps);
  // kohya's merge_lora.py writes v into every file of Stable Diffusion 2.
  const auto noted = info(tensors_of("sd2"), {{"modelspec.prediction_type", "v"}});
  EXPECT_EQ(noted.prediction, Prediction::eps);
  EXPECT_THAT(noted.notes, ElementsAre(HasSubstr("says v, but a weight says eps")));
}

TEST_F(Families, NoteMarkersThatSayNothing) {
  auto xl = tensors_of("sdxl");
  xl["ztsnr"] = {torch::kFloat, {}};
  EXPECT_FALSE(info(xl).zero_terminal_snr);
  EXPECT_THAT(info(xl).notes, ElementsAre(HasSubstr("ztsnr")));
  EXPECT_THAT(info(tensors_of("sd1"), {{"modelspec.prediction_type", "sample"}}).notes,
              ElementsAre(HasSubstr("prediction_type is unknown: \"sample\"")));
  EXPECT_EQ(info(tensors_of("sd1"), {{"modelspec.prediction_type", "v"}}).prediction,
            Prediction::v);
  xl.erase("ztsnr");
  for (const char* marker : {"edm_mean", "edm_std", "edm_vpred.sigma_min"}) {
    auto marked = xl;
    marked[marker] = {torch::kFloat, {1}};
    EXPECT_THAT(refusal(marked), HasSubstr(marker));
  }
}

// Of this tensor ComfyUI asks for the spread.
TEST_F(Families, TellVOfStableDiffusion2ByAWeight) {
  constexpr const char* kTelling =
      "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";
  auto tensors = tensors_of("sd2");
  ASSERT_TRUE(tensors.contains(kTelling));
  test::write_zeros(path_, tensors);
  const auto values = torch::randn({320}).mul(0.2).to(torch::kHalf);
  // Where the tensor lies in the file.
  std::uint64_t offset = 8 + test::safetensors_header(tensors).first.size();
  for (const auto& [name, tensor] : tensors) {
    if (name == kTelling) break;
    offset += 2 * static_cast<std::uint64_t>(c10::multiply_integers(tensor.second));
  }
  std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(static_cast<const char*>(values.const_data_ptr()), 640);
  file.close();
  const auto info =
      Checkpoint::open(path_, {.skeletons = test::kSourceDir + "models/skeletons"}).info();
  EXPECT_EQ(info.prediction, Prediction::v);
  EXPECT_THAT(info.prediction_reason, HasSubstr("as ComfyUI does"));
}

// What people may hold for a checkpoint, told by its names.
TEST_F(Families, RefusesOthersByName) {
  const auto with = [](const std::vector<std::string>& names) {
    test::TensorShapes tensors;
    for (const auto& name : names) tensors[name] = {torch::kHalf, {4, 4}};
    return tensors;
  };
  const std::string unet = kUNet;
  const std::vector<std::pair<test::TensorShapes, const char*>> others = {
      {with({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"}), "--lora"},
      {with({"double_blocks.0.img_attn.norm.key_norm.scale"}), "Flux"},
      {with({unet + "double_blocks.0.img_attn.norm.key_norm.scale"}), "Flux"},
      {with({unet + "joint_blocks.0.context_block.attn.qkv.weight"}), "Stable Diffusion 3"},
      {with({"emb_params"}), "--embedding"},
      {with({"control_model.input_blocks.0.0.weight"}), "ControlNet"},
      {with({"down_blocks.0.resnets.0.conv1.weight"}), "diffusers"},
      {with({"input_blocks.0.0.weight"}), "UNet alone"},
      {with({"decoder.conv_in.weight"}), "--vae"},
      {with({"text_model.encoder.layers.0.mlp.fc1.weight"}), "text encoder"},
      {with({"whatever"}), "has no UNet"}};
  for (const auto& [tensors, word] : others) EXPECT_THAT(refusal(tensors), HasSubstr(word));
}

TEST_F(Families, RefusesSmallerAndRefiningOnes) {
  auto refiner = tensors_of("sdxl");
  refiner[kInput].second[0] = 384;
  refiner[std::string(kUNet) + "label_emb.0.0.weight"].second[1] = 2560;
  EXPECT_THAT(refusal(refiner), HasSubstr("refiner"));
  auto smaller = tensors_of("sdxl");
  std::erase_if(smaller, [](const auto& tensor) {
    return tensor.first.find("middle_block.1.transformer_blocks.9") != std::string::npos;
  });
  EXPECT_THAT(refusal(smaller), HasSubstr("SSD-1B"));
  auto upscaler = tensors_of("sd2");
  upscaler[kInput].second = {256, 7, 3, 3};
  EXPECT_THAT(refusal(upscaler), HasSubstr("upscaling"));
  auto video = tensors_of("sd2");
  video[std::string(kUNet) + "input_blocks.1.0.time_stack.in_layers.0.bias"] = {torch::kHalf, {1}};
  EXPECT_THAT(refusal(video), HasSubstr("video"));
  auto other = tensors_of("sd1");
  other[kInput].second[0] = 192;
  EXPECT_THAT(refusal(other), HasSubstr("no known family"));
}

TEST_F(Families, RefusesSkeletonsThatAreNotThere) {
  test::write_zeros(path_, tensors_of("sd1"));
  EXPECT_THAT(error_of<c10::ValueError>(
                  [&] { Checkpoint::open(path_, {.skeletons = folder_.path("none")}); }),
              AllOf(one_sentence(), HasSubstr("SAG_SKELETONS"), HasSubstr("none/sd1")));
}

}  // namespace
}  // namespace sag

// LoRAs: by which names a weight is found, what is added to it, and what is refused.

#include "checkpoint/lora.h"

#include <cmath>
#include <limits>
#include <utility>

#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/error.h"
#include "support/files.h"
#include "support/safetensors_file.h"

namespace sag {
namespace {

using test::error_of;
using test::TemporaryFolder;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using Tensors = std::map<std::string, torch::Tensor>;
using Metadata = std::map<std::string, std::string>;

const LoraTarget kQuery = {
    "unet", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_q"};
const LoraTarget kOut = {
    "unet", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_out.0"};
const LoraTarget kTextKey = {
    "unet", "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k"};
const LoraTarget kConv = {"unet", "down_blocks.0.resnets.0.conv1",
                          "model.diffusion_model.input_blocks.1.0.in_layers.2"};
const LoraTarget kTextQuery = {
    "text_encoder", "text_model.encoder.layers.0.self_attn.q_proj",
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"};
const LoraTarget kTextOut = {
    "text_encoder", "text_model.encoder.layers.0.self_attn.out_proj",
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.out_proj"};
const LoraTarget kTextMlp = {"text_encoder", "text_model.encoder.layers.0.mlp.fc1",
                             "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1"};
// OpenCLIP's: some rows of a tensor.
const LoraTarget kTextQuery2 = {"text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj",
                                ""};

std::vector<LoraTarget> sd1() {
  return {kQuery, kOut, kTextKey, kConv, kTextQuery, kTextOut, kTextMlp};
}

std::vector<LoraTarget> sdxl() {
  auto all = sd1();
  all.push_back(kTextQuery2);
  return all;
}

torch::Tensor noise(torch::IntArrayRef sizes, int seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return torch::randn(sizes, generator);
}

// A folder with one LoRA in it.
class File {
 public:
  explicit File(const Tensors& tensors, const Metadata& metadata = {})
      : path_(folder_.write("a.safetensors", test::safetensors_bytes(tensors, metadata))) {}

  const std::string& path() const { return path_; }
  const TemporaryFolder& folder() const { return folder_; }
  Lora open(double strength = 1) const { return Lora::open(path_, strength); }
  std::string refusal() const {
    return error_of<c10::ValueError>([&] { open(); });
  }

 private:
  TemporaryFolder folder_;
  std::string path_;
};

// A pair of rank 2 for a weight [6, 4], with these ends of its names.
Tensors pair_named(const std::string& module, const std::string& down = ".lora_down.weight",
                   const std::string& up = ".lora_up.weight") {
  return {{module + down, noise({2, 4}, 1)}, {module + up, noise({6, 2}, 2)}};
}

torch::Tensor change_of_pair() {
  return noise({6, 2}, 2).matmul(noise({2, 4}, 1));
}

struct Spelling {
  LoraTarget target;
  std::string module, down, up;
};

TEST(Lora, KnowsAWeightByAllItsNames) {
  const std::string kohya = ".lora_down.weight", kohya_up = ".lora_up.weight";
  const std::string a = ".lora_A.weight", b = ".lora_B.weight";
  const std::string unet = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.";
  const std::string text = "text_model.encoder.layers.0.";
  const std::vector<Spelling> spellings = {
      // kohya's scripts: diffusers' names, and LDM's for SDXL
      {kQuery, "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", kohya,
       kohya_up},
      {kOut, "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0", kohya,
       kohya_up},
      {kQuery, "lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q", kohya, kohya_up},
      {kConv, "lora_unet_down_blocks_0_resnets_0_conv1", kohya, kohya_up},
      {kConv, "lora_unet_input_blocks_1_0_in_layers_2", kohya, kohya_up},
      {kTextQuery, "lora_te_text_model_encoder_layers_0_self_attn_q_proj", kohya, kohya_up},
      {kTextQuery, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", kohya, kohya_up},
      {kTextQuery2, "lora_te2_text_model_encoder_layers_0_self_attn_q_proj", kohya, kohya_up},
      // LyCORIS, ComfyUI
      {kQuery, "lycoris_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", kohya,
       kohya_up},
      {kQuery, "diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_q", kohya, kohya_up},
      {kTextQuery, "text_encoders.clip_l.transformer." + text + "self_attn.q_proj", kohya,
       kohya_up},
      {kTextQuery2, "text_encoders.clip_g.transformer." + text + "self_attn.q_proj", kohya,
       kohya_up},
      // diffusers: attention processors, layers, PEFT
      {kQuery, unet + "processor.to_q", "_lora.down.weight", "_lora.up.weight"},
      {kOut, unet + "processor.to_out", "_lora.down.weight", "_lora.up.weight"},
      {kOut, "unet." + unet + "processor.to_out", "_lora.down.weight", "_lora.up.weight"},
      {kOut, "unet." + unet + "to_out.0", ".lora.down.weight", ".lora.up.weight"},
      {kQuery, "unet." + unet + "to_q", a, b},
      {kConv, "unet.down_blocks.0.resnets.0.conv1", a, b},
      {kTextQuery, "text_encoder." + text + "self_attn.to_q", "_lora.down.weight",
       "_lora.up.weight"},
      {kTextOut, "text_encoder." + text + "self_attn.to_out", "_lora.down.weight",
       "_lora.up.weight"},
      {kTextOut, "text_encoder." + text + "self_attn.out_proj", ".lora_linear_layer.down.weight",
       ".lora_linear_layer.up.weight"},
      {kTextMlp, "text_encoder." + text + "mlp.fc1", ".lora_linear_layer.down.weight",
       ".lora_linear_layer.up.weight"},
      {kTextQuery, "text_encoder." + text + "self_attn.q_proj", a, b},
      {kTextQuery2, "text_encoder_2." + text + "self_attn.q_proj", a, b},
      // PEFT alone
      {kQuery, unet + "to_q", a, b},
      {kQuery, unet + "to_q", ".lora_A.default.weight", ".lora_B.default.weight"},
      {kQuery, unet + "to_q", ".lora_A.my-style_2.weight", ".lora_B.my-style_2.weight"},
  };
  const auto weight = noise({6, 4}, 3);
  for (const auto& [target, module, down, up] : spellings) {
    SCOPED_TRACE(module + down);
    const auto lora = File(pair_named(module, down, up)).open(0.5);
    lora.check_targets(sdxl());
    for (const auto& other : sdxl()) {
      const auto merged = lora.merged(other, weight);
      const bool is_it = other.part == target.part && other.path == target.path;
      if (is_it)
        EXPECT_TRUE(torch::allclose(merged, weight + 0.5 * change_of_pair()));
      else
        EXPECT_TRUE(merged.is_same(weight)) << other.path;
    }
  }
}

TEST(Lora, AddsTheProductTimesStrengthAndAlphaByRank) {
  auto tensors = pair_named("unet.down_blocks.0.resnets.0.conv1");
  const auto weight = noise({6, 4}, 3);
  const auto add = [&](double strength) {
    return File(tensors).open(strength).merged(kConv, weight);
  };
  EXPECT_TRUE(torch::allclose(add(1), weight + change_of_pair()));
  for (const auto& alpha : {torch::tensor(3.), torch::tensor({3}), torch::tensor(3, torch::kHalf),
                            torch::tensor(3, torch::kBFloat16)}) {
    tensors["unet.down_blocks.0.resnets.0.conv1.alpha"] = alpha;
    EXPECT_TRUE(torch::allclose(add(1), weight + 1.5 * change_of_pair()));
    EXPECT_TRUE(torch::allclose(add(-0.5), weight - 0.75 * change_of_pair()));
    EXPECT_TRUE(torch::equal(add(0), weight));
    EXPECT_TRUE(torch::equal(add(0.7), add(0.7)));
  }
}

TEST(Lora, ReadsHalfPrecisionAndAddsInFp32) {
  const auto weight = noise({6, 4}, 3);
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kDouble}) {
    auto tensors = pair_named("unet.down_blocks.0.resnets.0.conv1");
    for (auto& [name, tensor] : tensors) tensor = tensor.to(dtype);
    const auto change =
        tensors["unet.down_blocks.0.resnets.0.conv1.lora_up.weight"]
            .to(torch::kFloat)
            .matmul(
                tensors["unet.down_blocks.0.resnets.0.conv1.lora_down.weight"].to(torch::kFloat));
    for (const auto stored : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      const auto merged = File(tensors).open().merged(kConv, weight.to(stored));
      EXPECT_EQ(merged.scalar_type(), torch::kFloat);
      EXPECT_TRUE(torch::allclose(merged, weight.to(stored).to(torch::kFloat) + change));
    }
  }
}

TEST(Lora, AddsInFp32WhateverTheProcessSets) {
  const File file({{"unet." + kConv.path + ".lora_A.weight", noise({32, 64}, 1)},
                   {"unet." + kConv.path + ".lora_B.weight", noise({48, 32}, 2)}});
  const auto weight = noise({48, 64}, 3);
  const auto expected = file.open().merged(kConv, weight);
  at::autocast::set_autocast_enabled(torch::kCPU, true);
  const auto under_autocast = file.open().merged(kConv, weight);
  at::autocast::set_autocast_enabled(torch::kCPU, false);
  EXPECT_TRUE(torch::equal(under_autocast, expected));

  auto& context = at::globalContext();
  context.setFloat32MatmulPrecision("medium");
  const auto with_rounded_products = file.open().merged(kConv, weight);
  context.setFloat32MatmulPrecision("highest");
  EXPECT_TRUE(torch::allclose(with_rounded_products, expected, 1e-5, 1e-5));
}

// What the trained layers do to a picture, one after the other, is what the merged weight does.
torch::Tensor run(const torch::Tensor& picture, const torch::Tensor& weight) {
  return torch::conv2d(picture, weight, {}, 1, weight.size(2) / 2);
}

TEST(Lora, MergesConvolutions) {
  const std::string module = "lora_unet_down_blocks_0_resnets_0_conv1";
  const auto picture = noise({1, 4, 7, 5}, 4), weight = noise({6, 4, 3, 3}, 5);
  const auto down = noise({2, 4, 3, 3}, 6), up = noise({6, 2, 1, 1}, 7);
  const auto merged = File({{module + ".lora_down.weight", down}, {module + ".lora_up.weight", up}})
                          .open()
                          .merged(kConv, weight);
  EXPECT_EQ(merged.sizes(), weight.sizes());
  EXPECT_TRUE(torch::allclose(run(picture, merged),
                              run(picture, weight) + run(run(picture, down), up), 1e-4, 1e-4));
}

TEST(Lora, MergesConvolutionsWithAKernelBetween) {
  const std::string module = "lora_unet_down_blocks_0_resnets_0_conv1";
  const auto picture = noise({1, 4, 7, 5}, 4), weight = noise({6, 4, 3, 3}, 5);
  const auto down = noise({2, 4, 1, 1}, 6), mid = noise({2, 2, 3, 3}, 8),
             up = noise({6, 2, 1, 1}, 7);
  const auto merged = File({{module + ".lora_down.weight", down},
                            {module + ".lora_mid.weight", mid},
                            {module + ".lora_up.weight", up},
                            {module + ".alpha", torch::tensor(1.)}})
                          .open()
                          .merged(kConv, weight);
  const auto change = run(run(run(picture, down), mid), up);
  EXPECT_TRUE(
      torch::allclose(run(picture, merged), run(picture, weight) + 0.5 * change, 1e-4, 1e-4));
}

TEST(Lora, TakesALinearLayerForAOneByOneConvolution) {
  const auto weight = noise({6, 4}, 3);
  auto tensors = pair_named("unet.down_blocks.0.resnets.0.conv1");
  EXPECT_TRUE(torch::allclose(File(tensors).open().merged(kConv, weight.view({6, 4, 1, 1})),
                              (weight + change_of_pair()).view({6, 4, 1, 1})));
  for (auto& [name, tensor] : tensors) tensor = tensor.unsqueeze(-1).unsqueeze(-1);
  EXPECT_TRUE(
      torch::allclose(File(tensors).open().merged(kConv, weight), weight + change_of_pair()));
}

// diffusers notes the alpha in the header, since 0.34.
TEST(Lora, ReadsTheAlphaOfDiffusersNotes) {
  const std::string module = "unet." + kQuery.path;
  const auto weight = noise({6, 4}, 3);
  const auto times = [&](const std::string& notes, const std::string& named) {
    const File file(pair_named(named), {{"lora_adapter_metadata", notes}});
    const auto change = (file.open().merged(kQuery, weight) - weight) / change_of_pair();
    return change.mean().item<double>();
  };
  EXPECT_NEAR(times(R"({"unet.lora_alpha": 6, "unet.r": 2, "text_encoder.lora_alpha": 9})", module),
              3, 1e-3);
  EXPECT_NEAR(times(R"({"lora_alpha": 6, "alpha_pattern": {}})", kQuery.path), 3, 1e-3);
  EXPECT_NEAR(times(R"({"text_encoder.lora_alpha": 6})", module), 1, 1e-3);
  EXPECT_NEAR(times(R"({"unet.lora_alpha": 6, "unet.use_rslora": true})", module),
              6 / std::sqrt(2.), 1e-3);
  EXPECT_NEAR(times(R"({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 5, "to_k": 7}})",
                    module),
              2.5, 1e-3);
  EXPECT_NEAR(times(R"({"unet.lora_alpha": 6, "unet.alpha_pattern": {"tn1.to_q": 5}})", module), 3,
              1e-3);
}

TEST(Lora, PrefersTheAlphaAmongTheTensors) {
  auto tensors = pair_named("unet." + kQuery.path);
  tensors["unet." + kQuery.path + ".alpha"] = torch::tensor(4.);
  const auto weight = noise({6, 4}, 3);
  const File file(tensors, {{"lora_adapter_metadata", R"({"unet.lora_alpha": 6})"}});
  EXPECT_TRUE(torch::allclose(file.open().merged(kQuery, weight), weight + 2 * change_of_pair()));
}

TEST(Lora, ReadsTheAlphaOfPeftsConfiguration) {
  const File file(
      pair_named("base_model.model." + kQuery.path, ".lora_A.weight", ".lora_B.weight"));
  EXPECT_THAT(file.refusal(), HasSubstr("adapter_config.json, which must lie beside it"));
  file.folder().write("adapter_config.json", R"({"peft_type": "LORA", "r": 2, "lora_alpha": 8})");
  const auto weight = noise({6, 4}, 3);
  EXPECT_TRUE(torch::allclose(file.open().merged(kQuery, weight), weight + 4 * change_of_pair()));
}

TEST(Lora, RefusesNotesThatItCannotFollow) {
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "not a JSON object"},
      {"{", "not a JSON object"},
      {R"({"unet.lora_alpha": "8"})", "not a finite number"},
      {R"({"unet.lora_alpha": 1e999})", "not a JSON object"},
      {R"({"unet.lora_alpha": 8, "unet.fan_in_fan_out": true})", "transposed"},
      {R"({"unet.lora_alpha": 8, "unet.alpha_pattern": {".*to_q": 4}})", "regular expression"},
      {R"({"unet.lora_alpha": 8, "unet.alpha_pattern": [4]})", "not a JSON object"},
      {R"({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 4, "attn1.to_q": 5}})",
       "several fit"},
      {R"({"unet.use_rslora": true})", "lack \"lora_alpha\""},
  };
  for (const auto& [notes, says] : cases)
    EXPECT_THAT(
        File(pair_named("unet." + kQuery.path), {{"lora_adapter_metadata", notes}}).refusal(),
        AllOf(HasSubstr(says), test::one_sentence()));
}

TEST(Lora, NamesTheKindThatItRefuses) {
  const std::pair<const char*, const char*> cases[] = {
      {".hada_w1_a", "LoHa"},
      {".lokr_w1", "LoKr"},
      {".dora_scale", "DoRA"},
      {".lora_magnitude_vector.weight", "DoRA"},
      {".oft_blocks", "OFT"},
      {".on_input", "IA3"},
      {".a1.weight", "GLoRA"},
      {".diff", "differences of whole weights"},
      {".diff_b", "differences of biases"},
      {".w_norm", "differences of norms"},
      {".set_weight", "whole weights"},
      {".reshape_weight", "weights of another size"},
      {".scalar", "LyCORIS' scalar"},
      {".lora_B.bias", "biases"},
      {".lora_embedding_A", "a LoRA of the token embedding"},
  };
  for (const auto& [end, kind] : cases) {
    auto tensors = pair_named("lora_unet_a");
    tensors[std::string("lora_unet_a") + end] = tensors[std::string("lora_unet_b") + end] =
        torch::ones({2, 2});
    EXPECT_THAT(File(tensors).refusal(),
                AllOf(HasSubstr(fmt::format("holds {} ", kind)),
                      HasSubstr(fmt::format("(\"lora_unet_a{}\" and 1 more)", end)),
                      HasSubstr("with the program that made it"), test::one_sentence()))
        << end;
  }
}

TEST(Lora, RefusesWhatIsNoWholeLora) {
  const auto with = [](const std::string& name, const torch::Tensor& tensor) {
    auto tensors = pair_named("lora_unet_a");
    tensors.insert_or_assign(name, tensor);
    return tensors;
  };
  const auto nan = torch::full({6, 2}, std::numeric_limits<float>::quiet_NaN());
  const std::string up = "lora_unet_a.lora_up.weight", down = "lora_unet_a.lora_down.weight",
                    alpha = "lora_unet_a.alpha", mid = "lora_unet_a.lora_mid.weight";
  const std::pair<Tensors, const char*> cases[] = {
      {{}, "holds no tensors"},
      {with("first.weight", torch::ones(1)), "\"first.weight\" have no names of a LoRA"},
      {with(".alpha", torch::ones(1)), "\".alpha\" have no names of a LoRA"},
      {with("lora_unet_a.lora_A.weight", torch::ones(1)), "twice, by another name"},
      {with("lora_unet_b.alpha", torch::ones(1)), "lacks the down or the up of \"lora_unet_b\""},
      {with("b.lora_A.weight", torch::ones(1)), "lacks the down or the up of \"b\""},
      {with(up, torch::ones({6, 2}, torch::kByte)), "are not F16, BF16, F32 or F64"},
      {with(up, torch::ones({6, 2}).to(torch::kFloat8_e4m3fn)), "are not F16, BF16, F32 or F64"},
      {with(up, torch::ones({6, 3})), "shapes that do not fit each other"},
      {with(up, torch::ones({12})), "shapes that do not fit each other"},
      {with(up, torch::ones({6, 2, 3, 3})), "shapes that do not fit each other"},
      {with(down, torch::ones({0, 4})), "shapes that do not fit each other"},
      {with(down, torch::ones({2, 0})), "shapes that do not fit each other"},
      {with(mid, torch::ones({2, 3, 3, 3})), "shapes that do not fit each other"},
      {with(mid, torch::ones({2})), "shapes that do not fit each other"},
      {with(up, nan), "hold NaN or infinity"},
      {with(down, torch::full({2, 4}, 1e300, torch::kDouble)), "hold NaN or infinity"},
      {with(mid, nan.view({2, 2, 3}).clone()), "hold NaN or infinity"},
      {with(alpha, torch::ones(2)), "alpha that is not one finite number"},
      {with(alpha, torch::ones(0)), "alpha that is not one finite number"},
      {with(alpha, nan[0][0].clone()), "alpha that is not one finite number"},
  };
  for (const auto& [tensors, says] : cases)
    EXPECT_THAT(File(tensors).refusal(), AllOf(HasSubstr(says), test::one_sentence()));
  EXPECT_THAT(error_of<c10::ValueError>(
                  [&] { File(pair_named("a")).open(std::numeric_limits<double>::quiet_NaN()); }),
              HasSubstr("strength must be finite"));
}

TEST(Lora, CountsAllThatBreakARule) {
  auto tensors = pair_named("lora_unet_a");
  for (const char* name : {"c", "b", "d"}) tensors.merge(pair_named(name, ".lora_A.weight", ".x"));
  EXPECT_THAT(File(tensors).refusal(), HasSubstr("whose tensors \"b.x\" and 2 more have no names"));
}

std::string misfit(const Tensors& tensors, const std::vector<LoraTarget>& targets) {
  const File file(tensors);
  return error_of<c10::ValueError>([&] { file.open().check_targets(targets); });
}

TEST(Lora, MustFitTheModelByItsNames) {
  auto tensors = pair_named("lora_unet_down_blocks_0_resnets_0_conv1");
  tensors.merge(pair_named("lora_unet_down_blocks_9_resnets_0_conv1"));
  tensors.merge(pair_named("lora_unet_down_blocks_9_resnets_0_conv2"));
  EXPECT_THAT(misfit(tensors, sd1()),
              AllOf(HasSubstr("but \"lora_unet_down_blocks_9_resnets_0_conv1\" and 1 more are no "
                              "weights of it."),
                    test::one_sentence()));

  tensors = pair_named("unet." + kQuery.path);
  tensors.merge(pair_named("lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q"));
  EXPECT_THAT(misfit(tensors, sd1()), HasSubstr("is there twice, by different names"));

  // A tensor that OpenCLIP has in one piece.
  EXPECT_THAT(misfit(pair_named("lora_te2_text_model_encoder_layers_0_attn_in_proj"), sdxl()),
              HasSubstr("is no weight of it, and the LoRA has no other."));
}

TEST(Lora, AsksWhichTextEncoderABareNameMeans) {
  const File file(pair_named(kTextQuery.path, ".lora_A.weight", ".lora_B.weight"));
  file.open().check_targets(sd1());
  EXPECT_THAT(error_of<c10::ValueError>([&] { file.open().check_targets(sdxl()); }),
              HasSubstr("may be a weight of either text encoder"));
}

TEST(Lora, SaysWhichModelItIsFor) {
  for (const auto& [width, family] :
       {std::pair(768, "Stable Diffusion 1"), {1024, "Stable Diffusion 2"}, {2048, "SDXL"}}) {
    const std::string key = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k";
    Tensors tensors = {{key + ".lora_down.weight", torch::ones({2, width})},
                       {key + ".lora_up.weight", torch::ones({320, 2})}};
    const File file(tensors);
    EXPECT_THAT(
        error_of<c10::ValueError>([&] {
          file.open().merged(kTextKey, torch::ones({320, 512}));
        }),
        AllOf(HasSubstr(fmt::format("changes a weight [320, {}], which is [320, 512]; it is "
                                    "for {}.",
                                    width, family)),
              test::one_sentence()));
    tensors.merge(
        pair_named("lora_unet_down_blocks_1_attentions_0_transformer_blocks_9_attn1_to_q"));
    EXPECT_THAT(misfit(tensors, sd1()), HasSubstr(fmt::format("it is for {}.", family)));
  }
  for (const char* module :
       {"transformer.single_transformer_blocks.0.attn.to_q",
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_joint_blocks_0_context_block_attn_qkv",
        "diffusion_model.double_blocks.0.img_attn"})
    EXPECT_THAT(misfit(pair_named(module), sd1()), HasSubstr("for a transformer, such as Flux"));
}

TEST(Lora, LeavesNoWeightThatIsNotFinite) {
  const File file(pair_named("unet." + kQuery.path));
  for (const double strength : {3e38, 1e39})
    EXPECT_THAT(error_of<c10::ValueError>([&] {
                  file.open(strength).merged(kQuery, torch::ones({6, 4}));
                }),
                AllOf(HasSubstr("must leave the weights finite"), test::one_sentence()));
}

TEST(Lora, RefusesAPickleBeforeItIsRead) {
  const TemporaryFolder folder;
  EXPECT_THAT(error_of<c10::ValueError>(
                  [&] { Lora::open(folder.write("a.pt", "PK\x03\x04 and more"), 1); }),
              HasSubstr("pickles are programs that run when they are read"));
}

}  // namespace
}  // namespace sag

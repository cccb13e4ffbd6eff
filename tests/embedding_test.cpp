// Textual inversions: what a file holds, and text encoders that learn a word.
// text_encoder_fixture.py writes the encoders, some of them with the word.

#include "checkpoint/embedding.h"

#include <limits>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/script.h>
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
using torch::jit::Module;

const std::string kFolder = SAG_TEXT_ENCODERS "/";
constexpr std::int64_t kWidth = 16, kWidth2 = 24;

struct Encoder {
  std::string file;
  bool takes_size;

  Module load(const std::string& end = ".ts") const {
    // It would take far longer than these few calls.
    torch::jit::setGraphExecutorOptimize(false);
    auto module = torch::jit::load(kFolder + file + end);
    module.eval();
    return module;
  }
};

const Encoder kSd = {"sd", false}, kSdxl = {"sdxl", true};

std::vector<torch::Tensor> encode(const Encoder& encoder, const Module& module,
                                  const std::vector<std::string>& pieces,
                                  const std::vector<double>& weights, std::int64_t clip_skip) {
  const torch::NoGradGuard no_grad;
  std::vector<c10::IValue> arguments = {pieces, weights, clip_skip};
  if (encoder.takes_size) arguments.insert(arguments.end(), {64, 96});
  const auto result = module.get_method("encode_pieces")(arguments);
  if (result.isTensor()) return {result.toTensor()};
  return {result.toTupleRef().elements()[0].toTensor(),
          result.toTupleRef().elements()[1].toTensor()};
}

std::string cut(const Module& module, const std::string& text) {
  return module.get_method("cut_pieces")({std::vector<std::string>{text}}).toStringRef();
}

std::string repeated(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

// Whether two encoders are one for these texts.
void expect_same(const Encoder& encoder, const Module& one, const Module& other) {
  const std::vector<std::pair<std::vector<std::string>, std::vector<double>>> prompts = {
      {{""}, {1}},
      {{"a red cat"}, {1}},
      {{"<fox>"}, {1}},
      {{"a <FOX>, <fox><Fox>; foxes a<fox>b"}, {1}},
      {{"a ", "red <fox>", " in snow"}, {1, 1.4, 0.5}},
      {{repeated("x ", 73) + "<fox> end"}, {1}},
      {{repeated("<fox> ", 26)}, {1}},
  };
  for (const auto& [pieces, weights] : prompts) {
    SCOPED_TRACE(pieces[0]);
    for (const std::int64_t clip_skip : {0, 3}) {
      const auto ours = encode(encoder, one, pieces, weights, clip_skip);
      const auto theirs = encode(encoder, other, pieces, weights, clip_skip);
      ASSERT_EQ(ours.size(), theirs.size());
      for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_TRUE(torch::equal(ours[i], theirs[i]));
    }
    EXPECT_EQ(cut(one, pieces[0]), cut(other, pieces[0]));
  }
}

TEST(TextEmbedding, MakesTheEncoderOneThatWasExportedWithIt) {
  for (const auto& [encoder, files] :
       {std::pair(kSd, std::vector<std::string>{"a1111", "clip_l"}), {kSdxl, {"sdxl", "cog"}}})
    for (const auto& file : files) {
      SCOPED_TRACE(file);
      auto module = encoder.load();
      const auto before = encode(encoder, module, {"<fox>"}, {1}, 0)[0];
      add_embedding(module, read_embedding("<Fox>", kFolder + file + ".safetensors"));
      EXPECT_FALSE(torch::equal(encode(encoder, module, {"<fox>"}, {1}, 0)[0], before));
      expect_same(encoder, module, encoder.load("_fox.ts"));
    }
}

TEST(TextEmbedding, CutsWhatDoesNotFitBehindAllItsVectors) {
  auto module = kSd.load();
  add_embedding(module, read_embedding("<fox>", kFolder + "a1111.safetensors"));
  EXPECT_EQ(cut(module, repeated("<fox> ", 25)), "");
  EXPECT_EQ(cut(module, repeated("<fox> ", 25) + "End"), "end");
  EXPECT_EQ(cut(module, repeated("<fox> ", 24) + "x <fox> end"), "<fox> end");
}

TEST(TextEmbedding, TakesTheLongestOfSeveralNames) {
  const auto fox = torch::randn({1, kWidth}), foxes = torch::randn({2, kWidth}),
             owl = torch::randn({1, kWidth});
  auto one = kSd.load(), other = kSd.load();
  const auto add = [](Module& module, const std::string& name, const torch::Tensor& vectors) {
    add_embedding(module, {.name = name, .vectors = {{"text_encoder", vectors}}});
  };
  add(one, "<fox", fox);
  add(one, "<foxes", foxes);
  add(one, "ÜLÉ", owl);
  add(other, "x1", fox);
  add(other, "x2", foxes);
  add(other, "x3", owl);
  EXPECT_TRUE(torch::equal(encode(kSd, one, {"a <foxes <fox ülÉ b"}, {1}, 0)[0],
                           encode(kSd, other, {"a x2 x1 x3 b"}, {1}, 0)[0]));
}

TEST(TextEmbedding, KeepsTheDtypeOfTheEncoder) {
  auto module = kSd.load();
  module.to(torch::kDouble);
  add_embedding(module, read_embedding("<fox>", kFolder + "a1111.safetensors"));
  for (const auto& parameter : module.parameters()) EXPECT_EQ(parameter.dtype(), torch::kDouble);
}

TEST(TextEmbedding, ReadsOneVector) {
  const auto embedding = read_embedding("<fox>", kFolder + "diffusers.safetensors");
  ASSERT_EQ(embedding.vectors.size(), 1u);
  EXPECT_EQ(embedding.vectors.at("text_encoder").sizes(), (torch::IntArrayRef{1, kWidth}));
}

TEST(TextEmbedding, KnowsTheSecondEncoderByItsWidth) {
  const TemporaryFolder folder;
  const auto path =
      folder.write("a.safetensors",
                   test::safetensors_bytes({{"emb_params", torch::ones({2, 1280}, torch::kHalf)}}));
  const auto embedding = read_embedding("a", path);
  EXPECT_EQ(embedding.vectors.at("text_encoder_2").dtype(), torch::kFloat);
}

TEST(TextEmbedding, RefusesOtherFiles) {
  const TemporaryFolder folder;
  using Tensors = std::map<std::string, torch::Tensor>;
  const std::pair<Tensors, const char*> cases[] = {
      {{}, "holds no tensors"},
      {{{"a", torch::ones({1, 2, 3})}}, "\"a\" is not [width] or [vectors, width]"},
      {{{"a", torch::ones({})}}, "is not [width]"},
      {{{"a", torch::ones({0, 768})}}, "is not [width]"},
      {{{"a", torch::ones({768}, torch::kLong)}}, "floating point"},
      {{{"a", torch::full({768}, std::numeric_limits<float>::infinity())}}, "finite"},
      {{{"a", torch::ones(4)}, {"b", torch::ones(4)}}, "\"a\" among 2 tensors"},
      {{{"clip_l", torch::ones(4)}, {"t5xxl", torch::ones(4)}}, "\"t5xxl\" among 2 tensors"},
      {{{"clip_l", torch::ones(4)}, {"text_encoders_0", torch::ones(4)}}, "twice"},
  };
  for (const auto& [tensors, says] : cases)
    EXPECT_THAT(error_of<c10::ValueError>([&] {
                  read_embedding("a",
                                 folder.write("a.safetensors", test::safetensors_bytes(tensors)));
                }),
                AllOf(HasSubstr(says), test::one_sentence()));
  EXPECT_THAT(error_of<c10::ValueError>(
                  [&] { read_embedding("a", folder.write("a.pt", "PK\x03\x04 and more")); }),
              HasSubstr("pickles are programs that run when they are read"));
}

TEST(TextEmbedding, RefusesNamesThatNoPromptCanHave) {
  auto module = kSd.load();
  const auto refusal = [&](const std::string& name) {
    return error_of<c10::ValueError>([&] {
      add_embedding(module,
                    {.name = name, .vectors = {{"text_encoder", torch::ones({1, kWidth})}}});
    });
  };
  EXPECT_THAT(refusal(""), HasSubstr("its name is empty"));
  for (const char* name : {"a fox", " fox", "fox\n", "a\u3000b"})
    EXPECT_THAT(refusal(name), AllOf(HasSubstr("has a blank in it"), test::one_sentence()));
  EXPECT_THAT(refusal("<|EndOfText|>"), HasSubstr("is a token already"));
  add_embedding(module, read_embedding("<fox>", kFolder + "a1111.safetensors"));
  EXPECT_THAT(refusal("<FOX>"), HasSubstr("is a token already"));
}

TEST(TextEmbedding, RefusesVectorsOfAnotherModelAndChangesNothing) {
  using Vectors = std::map<std::string, torch::Tensor>;
  const auto first = torch::ones({1, kWidth}), second = torch::ones({1, kWidth2});
  const std::tuple<Encoder, Vectors, const char*> cases[] = {
      {kSd, {{"text_encoder", second}}, "are 24 wide, and the model's 16"},
      {kSd, {{"text_encoder_2", second}}, "has vectors for a second one"},
      {kSd, {{"text_encoder", first}, {"text_encoder_2", second}}, "has vectors for a second one"},
      {kSd, {}, "no vectors for its text_encoder;"},
      {kSd,
       {{"text_encoder", torch::ones({76, kWidth})}},
       "has 76 vectors for text_encoder, and a prompt has room for 75"},
      {kSdxl, {{"text_encoder", first}}, "no vectors for its text_encoder_2;"},
      {kSdxl, {{"text_encoder_2", second}}, "no vectors for its text_encoder;"},
      {kSdxl,
       {{"text_encoder", first}, {"text_encoder_2", first}},
       "are 16 wide, and the model's 24"},
  };
  auto sd = kSd.load(), sdxl = kSdxl.load();
  for (const auto& [encoder, vectors, says] : cases) {
    auto& module = encoder.takes_size ? sdxl : sd;
    EXPECT_THAT(error_of<c10::ValueError>([&module, given = vectors] {
                  add_embedding(module, {.name = "<fox>", .vectors = given});
                }),
                AllOf(HasSubstr(says), test::one_sentence()));
  }
  expect_same(kSd, sd, kSd.load());
  expect_same(kSdxl, sdxl, kSdxl.load());
  Module other("other");
  EXPECT_THAT(error_of<c10::ValueError>([&] {
                add_embedding(other, {.name = "a", .vectors = {{"text_encoder", first}}});
              }),
              HasSubstr("none that sag-export wrote"));
}

}  // namespace
}  // namespace sag

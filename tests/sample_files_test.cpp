// The files that sag-sample reads and writes: model directories, tensors, outputs.
#include <filesystem>
#include <iterator>

#include <caffe2/serialize/inline_container.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>

#include "errors.h"
#include "files/output_file.h"
#include "files/tensor_file.h"
#include "model_directory.h"
#include "options.h"
#include "support/files.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;
using sag::test::read_bytes;
using testing::HasSubstr;
using testing::Not;

class SampleFiles : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.path(name); }

  std::string write(const std::string& name, const std::string& content) const {
    return folder_.write(name, content);
  }

  std::size_t count_files() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_.path()), {}));
  }

  // What reading a model directory with this model.json says.
  std::string mistake(const std::string& json) const {
    write("model.json", json);
    try {
      read_model_directory(folder_.path());
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  }

 private:
  sag::test::TemporaryFolder folder_;
};

constexpr const char* kModel = R"({"format": 1, "name": "emoji", "prediction": "edm",
  "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 60.0,
  "sample": {"shape": [3, 64, 64], "multiple": 8}, "site": "middle.0.0",
  "files": {"unet": "unet.ts"},
  "defaults": {"sampler": "euler", "schedule": "karras", "steps": 20, "cfg": 2.0,
               "sag": {"scale": 1.0, "blur_sigma": 2.0}}})";

// The model above, with `from` replaced.
std::string model_with(const std::string& from, const std::string& to) {
  std::string json = kModel;
  const auto place = json.find(from);
  EXPECT_NE(place, std::string::npos) << from;
  return json.replace(place, from.size(), to);
}

std::string repeated(const std::string& text, int count) {
  std::string all;
  for (int i = 0; i < count; ++i) all += text;
  return all;
}

TEST_F(SampleFiles, ReadsAModelDirectory) {
  write("unet.ts", "x");
  write("model.json", kModel);
  const auto model = read_model_directory(path(""));
  EXPECT_EQ(model.name, "emoji");
  EXPECT_EQ(network_options().decide(model.choices).prediction, "edm");
  EXPECT_EQ(edm_options().decide(model.choices).sigma_max, 60.0);
  const auto size = latent_size_options().decide(model.choices);
  EXPECT_THAT((std::vector{size.channels, size.height, size.width}),
              testing::ElementsAre(3, 64, 64));
  EXPECT_EQ(model.multiple, 8);
  EXPECT_EQ(model.files.unet, path("unet.ts"));
  EXPECT_EQ(model.files.text_encoder, "");
  EXPECT_EQ(sampling_options().decide(model.choices).schedule, "karras");
  EXPECT_EQ(model.choices.at("--sag-scale").value, Value(1.0));
  EXPECT_FALSE(model.choices.contains("--sag-threshold"));
}

TEST_F(SampleFiles, SaysWhatIsWrongWithAModelDirectory) {
  write("unet.ts", "x");
  EXPECT_EQ(mistake(kModel), "");
  EXPECT_THAT(mistake("{"), HasSubstr("is not JSON"));
  EXPECT_THAT(mistake("[]"), HasSubstr("must be an object"));
  EXPECT_THAT(mistake("{}"), HasSubstr("\"format\" is missing"));
  EXPECT_THAT(mistake(model_with("\"format\": 1", "\"format\": 2")), HasSubstr("only format 1"));
  EXPECT_THAT(mistake(model_with("\"site\"", "\"sight\"")), HasSubstr("unknown key \"sight\""));
  EXPECT_THAT(mistake(model_with("\"multiple\"", "\"multiples\"")),
              HasSubstr("unknown key \"multiples\""));
  EXPECT_THAT(mistake(model_with("\"edm\"", "\"edn\"")), HasSubstr("one of eps, v, x0, edm, flow"));
  EXPECT_THAT(mistake(model_with("\"edm\"", "\"eps\"")), HasSubstr("unknown key \"sigma_data\""));
  EXPECT_THAT(mistake(model_with(R"("prediction": "edm",
  "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 60.0)",
                                 R"("prediction": "v", "zero_terminal_snr": 1)")),
              HasSubstr("\"zero_terminal_snr\" must be true or false"));
  EXPECT_THAT(mistake(model_with("20", "\"20\"")), HasSubstr("\"steps\" must be a whole number"));
  EXPECT_THAT(mistake(model_with("20", "2.5")), HasSubstr("\"steps\" must be a whole number"));
  EXPECT_THAT(mistake(model_with("0.02", "0")),
              HasSubstr("\"sigma_min\" must be a number greater than 0"));
  EXPECT_THAT(mistake(model_with("\"euler\"", "\"plms\"")),
              HasSubstr("\"sampler\" must be one of euler"));
  EXPECT_THAT(mistake(model_with("\"scale\": 1.0", "\"kernel_size\": 4")),
              HasSubstr("\"sag\": \"kernel_size\" must be an odd whole number, or 0, got 4."));
  EXPECT_THAT(mistake(model_with("\"scale\": 1.0", "\"sigma_start\": -1")),
              HasSubstr("\"sigma_start\" must be a number of at least 0, got -1."));
  EXPECT_THAT(mistake(model_with("\"scale\": 1.0", "\"interval\": 2")),
              HasSubstr("unknown key \"interval\""));
  EXPECT_THAT(mistake(model_with("[3, 64, 64]", "[3, 64]")),
              HasSubstr("\"shape\" must be three whole numbers"));
  EXPECT_THAT(mistake(model_with("[3, 64, 64]", "[3, 60, 64]")), HasSubstr("multiples of 8"));
}

TEST_F(SampleFiles, FileNamesStayInsideTheDirectory) {
  write("unet.ts", "x");
  for (const auto* name : {"../unet.ts", "/etc/passwd", "a/../../unet.ts", ""}) {
    EXPECT_THAT(mistake(model_with("\"unet.ts\"", '"' + std::string(name) + '"')),
                HasSubstr("\"unet\" must be"))
        << name;
  }
  EXPECT_THAT(mistake(model_with("\"unet.ts\"", "\"missing.ts\"")),
              HasSubstr("The model has no file"));
  EXPECT_THAT(mistake(model_with("\"unet.ts\"", R"("unet.ts", "encoder": "missing.ts")")),
              HasSubstr("names as \"encoder\""));
}

TEST_F(SampleFiles, DeeplyNestedModelDirectoriesAreRefused) {
  constexpr int kDeep = 2000000;
  const std::string arrays = repeated("[", kDeep), objects = repeated("{\"a\":", kDeep);
  for (const auto& json :
       {"{\"format\": " + arrays + repeated("]", kDeep) + "}", "{\"format\": " + arrays,
        "{\"format\": " + objects + "1" + repeated("}", kDeep + 1), arrays, objects}) {
    const auto file = path("model.json");
    EXPECT_EQ(mistake(json), file + " has values nested deeper than 100.");
  }
}

TEST_F(SampleFiles, MistakesInAModelDirectoryShowNoWholeArrays) {
  EXPECT_THAT(
      mistake(model_with("\"format\": 1", "\"format\": [[1], 2]")),
      HasSubstr("\"format\" must be a whole number between 1 and 65536, got an array of 2."));
  EXPECT_THAT(mistake(model_with("\"format\": 1", "\"format\": {\"a\": 1}")),
              HasSubstr("got an object."));
  EXPECT_THAT(mistake(model_with("[3, 64, 64]", "[3, 64]")), HasSubstr("got an array of 2."));
  EXPECT_THAT(mistake(model_with("[3, 64, 64]", "[3, 0, 64]")), HasSubstr("got 0."));
  EXPECT_THAT(mistake(model_with("[3, 64, 64]", "[3, 60, 64]")), HasSubstr("got 60 x 64."));
}

TEST_F(SampleFiles, NumbersBeyondDoublesAreTheUsersMistake) {
  EXPECT_EQ(mistake(model_with("60.0", "1e999")),
            path("model.json") + " holds a number that is too large.");
}

TEST_F(SampleFiles, MissingDirectoriesAndDescriptionsAreNamed) {
  EXPECT_THROW(read_model_directory(path("nowhere")), UsageError);
  EXPECT_THROW(read_model_directory(path("")), UsageError);
}

TEST_F(SampleFiles, ReadsWhatElseANetworkTakes) {
  write("unet.ts", "x");
  const std::string files = R"("files": {"unet": "unet.ts"})";
  const auto with = [&](const std::string& inputs) {
    return model_with(files, files + R"(, "inputs": )" + inputs);
  };
  write("model.json", with(R"({"concat": {"channels": 4, "kind": "inpaint", "scale": 2.5},
                               "class_labels": {"classes": 10}, "timestep_cond": {"size": 256}})"));
  const auto inputs = read_model_directory(path("")).inputs;
  ASSERT_TRUE(inputs.concat);
  EXPECT_EQ(inputs.concat->channels, 4);
  EXPECT_EQ(inputs.concat->kind, "inpaint");
  EXPECT_EQ(inputs.concat->scale, 2.5);
  EXPECT_TRUE(inputs.takes_class);
  EXPECT_EQ(inputs.classes, 10);
  EXPECT_EQ(inputs.guidance_size, 256);
  EXPECT_EQ(mistake(with(R"({"concat": {"channels": 7}, "class_labels": {}})")), "");

  EXPECT_THAT(mistake(with(R"({"concat": {"channels": 5, "kind": "inpaint"}})")),
              HasSubstr("must be 4 for \"inpaint\" and latents with 3 channels, got 5."));
  EXPECT_THAT(mistake(with(R"({"concat": {"channels": 4, "kind": "edit"}})")),
              HasSubstr("must be 3 for \"edit\""));
  EXPECT_THAT(mistake(with(R"({"concat": {"channels": 4, "kind": "depth"}})")),
              HasSubstr("must be one of inpaint, edit, got"));
  EXPECT_THAT(mistake(with(R"({"concat": {"kind": "edit"}})")), HasSubstr("\"channels\""));
  EXPECT_THAT(mistake(with(R"({"concat": {"channels": 5, "scale": 3.0}})")),
              AllOf(HasSubstr("scale"), HasSubstr("needs a \"kind\"")));
  EXPECT_THAT(mistake(with(R"({"timestep_cond": {"size": 2}})")), HasSubstr("between 4 and"));
  EXPECT_THAT(mistake(with(R"({"depth": {}})")), HasSubstr("unknown key \"depth\""));
}

TEST_F(SampleFiles, TensorsComeBackAsSaved) {
  const auto tensor = torch::arange(12, torch::kFloat).reshape({3, 4}).t().slice(0, 1, 3);
  const auto file = write("t.pt", tensor_file_bytes(tensor.to(torch::kDouble)));
  const auto back = read_tensor("--noise", file);
  EXPECT_EQ(back.scalar_type(), torch::kFloat);
  EXPECT_TRUE(back.is_contiguous());
  EXPECT_TRUE(torch::equal(back, tensor));
  EXPECT_LT(fs::file_size(file), 3000u) << "only the view is saved, not its storage";
}

TEST_F(SampleFiles, TensorsOfADictAreNamed) {
  const std::string file = sag::test::kGoldenDir + "runs/eps_euler_normal.pt";
  EXPECT_THAT(read_tensor("--noise", file + ":noise").sizes(), testing::ElementsAre(1, 4, 16, 16));
  try {
    read_tensor("--noise", file);
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("KEY one of"));
  }
  EXPECT_THROW(read_tensor("--noise", file + ":nothing"), UsageError);
  EXPECT_THROW(read_tensor("--noise", path("missing.pt")), UsageError);
}

// Gives an edited copy of a saved tensor: its pickle is stored as it is, so its bytes can be
// replaced by others of equal number.
std::string edited(std::string bytes, const std::string& from, const std::string& to) {
  const auto place = bytes.find(from);
  EXPECT_NE(place, std::string::npos);
  EXPECT_EQ(from.size(), to.size());
  return bytes.replace(place, from.size(), to);
}

TEST_F(SampleFiles, DamagedTensorsAreRefused) {
  const auto bytes = tensor_file_bytes(torch::ones({3, 4}));
  for (const std::size_t length : {0u, 3u, 10u, 100u, 300u}) {
    const auto file = write("short.pt", bytes.substr(0, length));
    EXPECT_THROW(read_tensor("--noise", file), UsageError) << length;
  }
  const auto half = write("half.pt", bytes.substr(0, bytes.size() / 2));
  EXPECT_THROW(read_tensor("--noise", half), UsageError);
}

TEST_F(SampleFiles, TensorsThatReachBeyondTheirDataAreRefused) {
  // BININT1 3, BININT1 4, TUPLE: the sizes. 3 → 200.
  const auto bytes = edited(tensor_file_bytes(torch::ones({3, 4})), "K\x03K\x04t", "K\xc8K\x04t");
  EXPECT_THROW(read_tensor("--noise", write("beyond.pt", bytes)), UsageError);
}

// A file like torch.save's, whose pickle has these opcodes between PROTO and STOP.
std::string file_with_pickle(const std::string& opcodes) {
  std::string bytes;
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* data, std::size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  const auto pickle = "\x80\x02" + opcodes + '.';
  writer.writeRecord("data.pkl", pickle.data(), pickle.size());
  writer.writeEndOfFile();
  return bytes;
}

// The opcode that pushes a text.
std::string pickled_text(const std::string& text) {
  std::string opcode = "X";
  for (int shift = 0; shift < 32; shift += 8) opcode += static_cast<char>(text.size() >> shift);
  return opcode + text;
}

TEST_F(SampleFiles, TensorsOfSafetensorsAreRead) {
  const auto cond = torch::arange(6, torch::kFloat).view({1, 2, 3});
  const std::string header = R"({"cond":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]},)"
                             R"("none":{"dtype":"F32","shape":[0],"data_offsets":[24,24]}})";
  const std::string data(static_cast<const char*>(cond.data_ptr()), 24);
  const auto bytes =
      std::string(1, static_cast<char>(header.size())) + std::string(7, '\0') + header + data;
  const auto file = write("text.safetensors", bytes);
  EXPECT_TRUE(torch::equal(read_tensor("--cond", file + ":cond"), cond));
  const auto says = [](const std::string& where) -> std::string {
    try {
      read_tensor("--cond", where);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(says(file), HasSubstr("name one of its tensors"));
  EXPECT_THAT(says(file + ":conf"), HasSubstr("do you mean"));
  EXPECT_THAT(says(write("cut.safetensors", bytes.substr(0, bytes.size() - 1))),
              testing::AllOf(HasSubstr("--cond"), HasSubstr("truncated")));
}

TEST_F(SampleFiles, DeeplyNestedTensorFilesAreRefused) {
  constexpr int kDeep = 2000000;
  const std::string type = repeated("List[", kDeep) + "int" + repeated("]", kDeep);
  const std::string restore = "ctorch.jit._pickle\nrestore_type_tag\n";
  // A list in the memo is put into the next one and only then given something to hold.
  const std::string through_the_memo = "]q\1" + repeated("h\1(]q\1e\x81", kDeep);
  const std::vector<std::pair<const char*, std::string>> pickles = {
      {"tuples", ")" + repeated("\x85", kDeep)},
      {"marked tuples", repeated("(", kDeep) + repeated("t", kDeep)},
      {"lists", repeated("](", kDeep) + repeated("e", kDeep)},
      {"dicts", repeated("}(K\1", kDeep) + "N" + repeated("u", kDeep)},
      {"an unfinished pickle", ")" + repeated("\x85", kDeep) + "?"},
      {"tuples in the memo", ")" + repeated("\x85q\1h\1\x86", kDeep)},
      {"lists in the memo", through_the_memo},
      {"lists in the memo, complete", "]q\1\x81" + repeated("](h\1eq\1\x81", kDeep) + "h\1"},
      {"a type", restore + "](K\1e" + pickled_text(type) + "\x86R"},
  };
  for (const auto& [what, pickle] : pickles) {
    const auto file = write("deep.pt", file_with_pickle(pickle));
    try {
      read_tensor("--cond", file);
      ADD_FAILURE() << what;
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), HasSubstr("holds something else than one tensor")) << what;
    }
  }
}

TEST_F(SampleFiles, DamagedPicklesAreRefused) {
  for (const std::string pickle :
       {"", "(u", "}(K\1u", "t", "(t(", "a", "h\x07", "r\xff\xff\xff\x7f", "Nr\xff\xff\xff\x7f",
        "X\xff\xff\xff\xff", "cno_end", "ctorch._tensor\n_rebuild_from_type_v2\n(NN)}tR"}) {
    EXPECT_THROW(read_tensor("--cond", write("bad.pt", file_with_pickle(pickle))), UsageError);
  }
}

TEST_F(SampleFiles, WhatLiesBesideTheTensorsMayNest) {
  c10::List<c10::List<std::int64_t>> sizes({c10::List<std::int64_t>({3, 4})});
  c10::impl::GenericDict values(c10::StringType::get(), c10::AnyType::get());
  values.insert("sizes", sizes);
  values.insert("noise", torch::ones({3, 4}));
  values.insert("again", values.at("noise"));
  values.insert("workflow", repeated("[1, [2]], ", 500));
  const auto bytes = torch::pickle_save(values);
  const auto file = write("dict.pt", {bytes.begin(), bytes.end()});
  EXPECT_TRUE(torch::equal(read_tensor("--noise", file + ":noise"), torch::ones({3, 4})));
  EXPECT_TRUE(torch::equal(read_tensor("--noise", file + ":again"), torch::ones({3, 4})));
  try {
    // {1: [2], 2: the same list}
    read_tensor("--noise", write("same.pt", file_with_pickle("}(K\1]q\1(K\2eK\2h\1u")));
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("must hold one tensor or a flat dict of tensors"))
        << "read";
  }
}

TEST_F(SampleFiles, OldFilesGetTheCommandThatSavesThemAnew) {
  const std::string magic("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
  try {
    read_tensor("--cond", write("old.pt", magic + "rest"));
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("torch before 1.6"));
    EXPECT_THAT(error.what(), HasSubstr("python3 -c"));
  }
  try {
    read_tensor("--cond", sag::test::kGoldenDir + "comfy_sd15_tiny.ts");
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("is a TorchScript model, not tensors"));
  }
}

TEST_F(SampleFiles, OutputsAppearWholeOrNotAtAll) {
  const auto file = write("out.png", "before");
  {
    OutputFile output("--out", file);
    output.write("half");
    EXPECT_EQ(read_bytes(file), "before");
  }
  EXPECT_EQ(read_bytes(file), "before");
  EXPECT_EQ(count_files(), 1u) << "no temporary file stays";
  OutputFile output("--out", file);
  output.write("after");
  output.commit();
  EXPECT_EQ(read_bytes(file), "after");
  EXPECT_EQ(count_files(), 1u);
}

TEST_F(SampleFiles, OutputsHaveTheUsualPermissions) {
  const auto mask = ::umask(022);
  OutputFile output("--out", path("out.png"));
  output.write("x");
  output.commit();
  ::umask(mask);
  EXPECT_EQ(fs::status(path("out.png")).permissions(), fs::perms(0644));
}

TEST_F(SampleFiles, OutputsFollowLinksAndLeaveDevicesAlone) {
  const auto file = write("real.png", "before");
  fs::create_symlink(file, path("link.png"));
  OutputFile link("--out", path("link.png"));
  link.write("after");
  link.commit();
  EXPECT_TRUE(fs::is_symlink(path("link.png")));
  EXPECT_EQ(read_bytes(file), "after");

  OutputFile null("--out", "/dev/null");
  null.write("x");
  null.commit();
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
}

TEST_F(SampleFiles, OutputsThatCannotBeAreRefusedAtOnce) {
  EXPECT_THROW(OutputFile("--out", path("")), UsageError);
  EXPECT_THROW(OutputFile("--out", path("nowhere/out.png")), UsageError);
}

}  // namespace
}  // namespace sag_sample

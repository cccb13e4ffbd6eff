// The safetensors reader: what it reads, and what it refuses.

#include "sag/safetensors.h"

#include <unistd.h>

#include <cstring>
#include <random>
#include <utility>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/error.h"
#include "support/files.h"
#include "support/safetensors_file.h"

namespace sag {
namespace {

using test::safetensors_file;
using test::TemporaryFolder;
using testing::HasSubstr;
using testing::Pair;
using testing::UnorderedElementsAre;

std::string object(const std::string& entries) {
  return fmt::format("{{{}}}", entries);
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{}]}})", name, dtype,
                     shape, offsets);
}

std::string floats(std::initializer_list<float> values) {
  return {reinterpret_cast<const char*>(values.begin()), values.size() * sizeof(float)};
}

TEST(Safetensors, ReadsNamesShapesAndValues) {
  const TemporaryFolder folder;
  const auto path = folder.write(
      "a.safetensors",
      safetensors_file(
          object(entry("b", "F32", "2,3", "0,24") + "," + entry("a", "I64", "", "24,32") +
                 R"(,"none":{"data_offsets":[32,32],"shape":[0,5],"dtype":"BF16"})" +
                 R"(,"__metadata__":{"format":"pt"})") +
              "  ",
          floats({1, 2, 3, 4, 5, 6}) + std::string("\x07\0\0\0\0\0\0\0", 8)));
  const auto file = Safetensors::open(path);
  EXPECT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.tensors().at("b").sizes, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(file.tensors().at("b").dtype, torch::kFloat);
  EXPECT_THAT(file.metadata(), UnorderedElementsAre(Pair("format", "pt")));
  EXPECT_TRUE(torch::equal(file.tensor("b"), torch::arange(1, 7, torch::kFloat).view({2, 3})));
  EXPECT_EQ(file.tensor("a").item<std::int64_t>(), 7);
  EXPECT_EQ(file.tensor("a").dim(), 0);
  EXPECT_EQ(file.tensor("none").sizes(), (torch::IntArrayRef{0, 5}));
}

TEST(Safetensors, CopiesNothingAndLeavesTheFileAlone) {
  const TemporaryFolder folder;
  // 8 + 56 bytes of header: the data are aligned.
  auto header = object(entry("a", "F32", "2", "0,8"));
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const auto bytes = safetensors_file(header, floats({1, 2}));
  const auto path = folder.write("a.safetensors", bytes);
  torch::Tensor tensor;
  {
    const auto file = Safetensors::open(path);
    tensor = file.tensor("a");
    EXPECT_EQ(tensor.data_ptr(), file.tensor("a").data_ptr());
  }
  tensor.fill_(5);
  EXPECT_EQ(tensor.sum().item<float>(), 10);
  EXPECT_EQ(test::read_bytes(path), bytes);
}

TEST(Safetensors, ForgetsTheMemoryOfATensorAlone) {
  const TemporaryFolder folder;
  auto header =
      object(entry("a", "F32", "3000", "0,12000") + "," + entry("b", "F32", "4000", "12000,28000") +
             "," + entry("c", "F32", "3000", "28000,40000"));
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const auto numbers = torch::arange(10000, torch::kFloat);
  const std::string data(static_cast<const char*>(numbers.const_data_ptr()), numbers.nbytes());
  const auto path = folder.write("a.safetensors", safetensors_file(header, data));
  const auto file = Safetensors::open(path);
  // What is written stays where it was, also in the pages that two tensors share.
  file.tensor("a").fill_(-1);
  file.tensor("c").fill_(-1);
  file.tensor("b").slice(0, 1500, 2500).fill_(-1);
  file.forget("b");
  EXPECT_TRUE(torch::equal(file.tensor("b").slice(0, 1500, 2500), numbers.slice(0, 4500, 5500)));
  EXPECT_TRUE(torch::equal(file.tensor("a"), torch::full({3000}, -1.0f)));
  EXPECT_TRUE(torch::equal(file.tensor("c"), torch::full({3000}, -1.0f)));
  EXPECT_THAT(test::error_of<c10::ValueError>([&] { file.forget("d"); }), HasSubstr("\"d\""));
}

TEST(Safetensors, ReadsWhatIsNotAligned) {
  const TemporaryFolder folder;
  for (int spaces = 0; spaces < 8; ++spaces) {
    const auto header = object(entry("a", "F64", "1", "0,8")) + std::string(spaces, ' ');
    const double value = 0.1 + spaces;
    const auto path = folder.write(
        "a.safetensors",
        safetensors_file(header, {reinterpret_cast<const char*>(&value), sizeof value}));
    const auto tensor = Safetensors::open(path).tensor("a");
    EXPECT_EQ(tensor.item<double>(), value);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) % 8, 0u);
  }
}

TEST(Safetensors, ReadsEveryDtype) {
  const TemporaryFolder folder;
  const std::vector<std::pair<std::string, torch::ScalarType>> dtypes = {
      {"F64", torch::kDouble},
      {"F32", torch::kFloat},
      {"F16", torch::kHalf},
      {"BF16", torch::kBFloat16},
      {"F8_E4M3", torch::kFloat8_e4m3fn},
      {"F8_E5M2", torch::kFloat8_e5m2},
      {"I64", torch::kLong},
      {"I32", torch::kInt},
      {"I16", torch::kShort},
      {"I8", torch::kChar},
      {"U64", torch::kUInt64},
      {"U32", torch::kUInt32},
      {"U16", torch::kUInt16},
      {"U8", torch::kByte},
      {"BOOL", torch::kBool},
      {"C64", torch::kComplexFloat}};
  for (const auto& [name, dtype] : dtypes) {
    const auto expected = torch::tensor({0, 1, 1}, torch::kFloat).to(dtype);
    const auto size = expected.nbytes();
    const auto path = folder.write(
        "a.safetensors", safetensors_file(object(entry("a", name, "3", fmt::format("0,{}", size))),
                                          {static_cast<const char*>(expected.data_ptr()), size}));
    const auto tensor = Safetensors::open(path).tensor("a");
    EXPECT_EQ(tensor.scalar_type(), dtype) << name;
    EXPECT_EQ(std::memcmp(tensor.data_ptr(), expected.data_ptr(), size), 0) << name;
  }
}

std::string repeated(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

// What is refused, and a part of the sentence.
struct Refusal {
  std::string name, bytes, says;
};

std::vector<Refusal> refusals() {
  const auto good = entry("a", "F32", "2", "0,8");
  const auto data = floats({1, 2});
  const auto nested = [](std::size_t depth) {
    return safetensors_file(R"({"a":)" + std::string(depth, '[') + std::string(depth, ']') + "}");
  };
  return {
      {"empty", "", "is empty"},
      {"short", "abc", "is not safetensors"},
      {"pickle", std::string("\x80\x02}q\0.aaaaaaaaa", 16), "is a pickle"},
      {"zip", "PK\x03\x04xxxxxxxxxxxx",
       "is a pickle (.ckpt, .pt, .pth, .bin), and pickles are programs"},
      {"gguf", "GGUF\x03xxxxxxxxxxxx", "GGUF"},
      {"lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"},
      {"html", "<!DOCTYPE html><html></html>", "is not safetensors"},
      {"header_cut", safetensors_file(object(good), data).substr(0, 30), "ends inside its header"},
      {"header_too_long", std::string("\xff\xff\xff\xff\xff\xff\xff\xff{", 9), "claims"},
      {"data_cut", safetensors_file(object(good), data.substr(1)), "truncated"},
      {"not_json", safetensors_file("{" + good, data), "is not JSON"},
      {"not_utf8", safetensors_file("{\"\xff\":1}"), "is not JSON"},
      {"after_the_object", safetensors_file("{} {}"), "is not JSON"},
      {"twice", safetensors_file(object(good + "," + good), data), "\"a\" twice"},
      {"key_twice",
       safetensors_file(R"({"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}})",
                        data),
       "\"dtype\" twice"},
      {"nested", nested(200'000), "nested too deeply"},
      {"not_an_object", safetensors_file(R"({"a":3})"), "dtype, shape and data_offsets"},
      {"unknown_key",
       safetensors_file(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"stride":[1]}})",
                        data),
       "nothing else"},
      {"unknown_dtype", safetensors_file(object(entry("a", "F4", "2", "0,8")), data), "F4"},
      {"dtype_number",
       safetensors_file(R"({"a":{"dtype":1,"shape":[2],"data_offsets":[0,8]}})", data),
       "name of a dtype"},
      {"negative_size", safetensors_file(object(entry("a", "F32", "-2", "0,8")), data),
       "whole numbers"},
      {"fraction", safetensors_file(object(entry("a", "F32", "2.0", "0,8")), data),
       "whole numbers"},
      {"large_size",
       safetensors_file(object(entry("a", "F32", "18446744073709551615", "0,8")), data), "63-bit"},
      {"larger_size",
       safetensors_file(object(entry("a", "F32", "18446744073709551616", "0,8")), data),
       "whole numbers"},
      {"overflow", safetensors_file(object(entry("a", "F32", "4611686018427387904,4", "0,0"))),
       "counted"},
      {"overflow_with_0",
       safetensors_file(object(entry("a", "F32", "0,4611686018427387904,4", "0,0"))), "counted"},
      {"dimensions",
       safetensors_file(object(entry("a", "F32", repeated("1,", 64) + "1", "0,4")), floats({1})),
       "at most 64"},
      {"bytes", safetensors_file(object(entry("a", "F32", "3", "0,8")), data), "as many bytes"},
      {"backwards", safetensors_file(object(entry("a", "F32", "2", "8,0")), data), "the larger"},
      {"three_offsets", safetensors_file(object(entry("a", "F32", "2", "0,8,8")), data), "two"},
      {"far",
       safetensors_file(object(entry("a", "U8", "8", "18446744073709551607,18446744073709551615")),
                        data),
       "truncated"},
      {"overlap",
       safetensors_file(object(entry("a", "F32", "2", "0,8") + "," + entry("b", "F32", "1", "4,8")),
                        data),
       "shares bytes"},
      {"gap",
       safetensors_file(object(entry("a", "U8", "2", "0,2") + "," + entry("b", "U8", "4", "4,8")),
                        data),
       "after bytes of no tensor"},
      {"rest", safetensors_file(object(entry("a", "U8", "2", "0,2")), data), "at its end"},
      {"metadata_list", safetensors_file(R"({"__metadata__":[1]})"), "not an object"},
      {"metadata_number", safetensors_file(R"({"__metadata__":{"a":1}})"), "not a text"},
      {"many_values", safetensors_file(R"({"a":[0)" + repeated(",0", 200'000) + "]}"),
       "too many values"},
  };
}

TEST(Safetensors, RefusesDamagedFilesInASentence) {
  const TemporaryFolder folder;
  for (const auto& [name, bytes, says] : refusals()) {
    SCOPED_TRACE(name);
    const auto path = folder.write(name, bytes);
    EXPECT_THAT(test::error_of<c10::ValueError>([&] { Safetensors::open(path); }),
                testing::AllOf(HasSubstr(path), HasSubstr(says)));
  }
}

TEST(Safetensors, RefusesWhatIsNoFile) {
  const TemporaryFolder folder;
  const auto says = [](const std::string& path) {
    return test::error_of<c10::ValueError>([&] { Safetensors::open(path); });
  };
  EXPECT_THAT(says(folder.path("missing")), HasSubstr("does not exist"));
  EXPECT_THAT(says(folder.path()), HasSubstr("is a directory"));
  EXPECT_THAT(says("/dev/zero"), HasSubstr("is not a file"));
  const auto file = Safetensors::open(
      folder.write("a", safetensors_file(object(entry("a", "BOOL", "2", "0,2")), "\1\2")));
  EXPECT_THAT(test::error_of<c10::ValueError>([&] { file.tensor("b"); }), HasSubstr("\"b\""));
  EXPECT_THAT(test::error_of<c10::ValueError>([&] { file.tensor("a"); }), HasSubstr("0 or 1"));
}

TEST(Safetensors, ReadsShardsByTheirIndex) {
  const TemporaryFolder folder;
  folder.write("m-1.safetensors",
               safetensors_file(object(entry("a", "F32", "1", "0,4")), floats({1})));
  folder.write("m-2.safetensors",
               safetensors_file(object(entry("b", "F32", "1", "0,4")), floats({2})));
  const auto index = [&](const std::string& map) {
    return folder.write("m.safetensors.index.json",
                        R"({"metadata":{"total_size":8},"weight_map":{)" + map + "}}");
  };
  const auto file = Safetensors::open(index(R"("a":"m-1.safetensors","b":"m-2.safetensors")"));
  EXPECT_EQ(file.tensor("a").item<float>(), 1);
  EXPECT_EQ(file.tensor("b").item<float>(), 2);
  EXPECT_THAT(file.metadata(), UnorderedElementsAre(Pair("total_size", "8")));

  const auto says = [&](const std::string& map) {
    return test::error_of<c10::ValueError>([&] { Safetensors::open(index(map)); });
  };
  EXPECT_THAT(says(R"("a":"m-1.safetensors","b":"m-3.safetensors")"), HasSubstr("does not exist"));
  EXPECT_THAT(says(R"("a":"m-2.safetensors","b":"m-1.safetensors")"), HasSubstr("it is not"));
  EXPECT_THAT(says(R"("a":"m-1.safetensors","c":"m-2.safetensors")"),
              HasSubstr("does not name \"b\""));
  EXPECT_THAT(says(R"("a":"../m-1.safetensors")"), HasSubstr("beside it"));
  EXPECT_THAT(says(R"("a":"/m-1.safetensors")"), HasSubstr("beside it"));
  EXPECT_THAT(says(R"("a":"..")"), HasSubstr("is a directory"));
  EXPECT_THAT(says(R"("a":{"b":1})"), HasSubstr("nested too deeply"));
  folder.write("m-2.safetensors",
               safetensors_file(object(entry("a", "F32", "1", "0,4")), floats({2})));
  EXPECT_THAT(says(R"("a":"m-1.safetensors","b":"m-2.safetensors")"), HasSubstr("two of whose"));
}

// Whatever bytes a file has, it is refused in a sentence, or every tensor lies inside of it.
TEST(Safetensors, SurvivesRandomDamage) {
  const TemporaryFolder folder;
  const auto good = safetensors_file(
      object(entry("a", "F32", "2,3", "0,24") + "," + entry("b", "BOOL", "4", "24,28") +
             R"(,"__metadata__":{"format":"pt"})"),
      floats({1, 2, 3, 4, 5, 6}) + std::string("\0\1\1\0", 4));
  std::mt19937 random(7);
  const auto below = [&](std::size_t n) { return random() % n; };
  int read = 0;
  for (int i = 0; i < 2'000; ++i) {
    auto bytes = good;
    for (std::size_t edits = 1 + below(3); edits-- > 0 && !bytes.empty();) {
      const auto at = below(bytes.size());
      switch (below(4)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + below(8));
          break;
        case 2:
          bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(8)));
          break;
        default:
          bytes[at] ^= static_cast<char>(1 << below(8));
      }
    }
    const auto path = folder.write("a.safetensors", bytes);
    try {
      const auto file = Safetensors::open(path);
      for (const auto& [name, info] : file.tensors()) file.tensor(name).sum();
      ++read;
    } catch (const c10::ValueError& error) {
      EXPECT_THAT(error.msg(), HasSubstr("[Safetensors::"));
    }
  }
  // Damage to the values cannot be seen.
  EXPECT_GT(read, 10);
}

}  // namespace
}  // namespace sag

// The fuzzer's corpus: files of each kind, and each rule of the format broken once. Names say
// which.

#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "fuzz/read_input.h"
#include "support/files.h"

namespace sag {
namespace {

TEST(FuzzCorpus, IsReadOrRefusedAsItsNamesSay) {
  int valid = 0, broken = 0;
  for (const auto& file :
       std::filesystem::directory_iterator(test::kSourceDir + "tests/fuzz/corpus")) {
    const auto name = file.path().filename().string();
    SCOPED_TRACE(name);
    const auto refusal = test::read_input(test::read_bytes(file.path()));
    if (name.starts_with("valid_")) {
      ++valid;
      EXPECT_EQ(refusal, "");
    } else {
      ++broken;
      EXPECT_TRUE(name.starts_with("broken_"));
      EXPECT_THAT(refusal, testing::HasSubstr("must name a whole safetensors file"));
    }
  }
  EXPECT_GE(valid, 10);
  EXPECT_GE(broken, 40);
}

}  // namespace
}  // namespace sag

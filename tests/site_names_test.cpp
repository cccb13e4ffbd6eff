#include "unet/site_names.h"

#include <fstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "support/error.h"
#include "support/files.h"

namespace sag {
namespace {

using test::error_of;
using test::one_sentence;
using ::testing::AllOf;
using ::testing::HasSubstr;

// The exporter names sites too, and is tested with the same table.
TEST(ShortSiteName, IsComfyUIsForLdmAndForTheMiddleOfDiffusers) {
  const auto cases = nlohmann::json::parse(std::ifstream(test::kGoldenDir + "site_names.json"));
  ASSERT_FALSE(cases.empty());
  for (const auto& entry : cases) {
    const auto path = entry.at("path").get<std::string>();
    EXPECT_EQ(short_site_name(path), entry.at("name").get<std::string>()) << path;
  }
}

TEST(ShortSiteName, TakesPathsOfAnyLength) {
  const std::string path = "middle_block.1.transformer_blocks.0.attn1";
  std::string prefix;
  for (int i = 0; i < 100000; ++i) prefix += "part.";
  EXPECT_EQ(short_site_name(prefix + path), "middle.0.0");
  EXPECT_EQ(short_site_name(std::string(100000, 'x') + path), "");
}

TEST(MakeSite, TakesTheShortNameThenThePathThenTheOrdinal) {
  EXPECT_EQ(make_site("unet.middle_block.1.transformer_blocks.0.attn1", 6).name, "middle.0.0");
  EXPECT_EQ(make_site("model.mid.1", 6).name, "model.mid.1");
  EXPECT_EQ(make_site("", 6).name, "#6");
}

const std::vector<AttentionSiteInfo> kSites = {
    make_site("model.mid.1", 2), make_site("", 5), {"twice", "a", 7}, {"twice", "b", 8}};

TEST(HookedSite, IsFoundByNamePathAndOrdinal) {
  EXPECT_EQ(hooked_site(kSites, {}, "model.mid.1", "caller").ordinal, 2);
  EXPECT_EQ(hooked_site(kSites, {}, "#2", "caller").ordinal, 2);
  EXPECT_EQ(hooked_site(kSites, {}, "#5", "caller").ordinal, 5);
  EXPECT_EQ(hooked_site(kSites, {}, "b", "caller").ordinal, 8);
}

TEST(HookedSite, MustBeOneOfTheUNets) {
  EXPECT_THAT(error_of<c10::ValueError>([] { hooked_site(kSites, {}, "other", "caller"); }),
              AllOf(one_sentence(), HasSubstr("[caller] "), HasSubstr("got \"other\". "),
                    HasSubstr("model.mid.1 (#2), #5, twice (a, #7), twice (b, #8).")));
  EXPECT_THAT(error_of<c10::ValueError>([] { hooked_site(kSites, {}, "twice", "caller"); }),
              AllOf(one_sentence(), HasSubstr("got \"twice\", which stands for 2.")));
  EXPECT_THAT(error_of<c10::ValueError>([] { hooked_site({}, {}, "other", "caller"); }),
              AllOf(one_sentence(), HasSubstr("It has no self-attention")));
}

}  // namespace
}  // namespace sag

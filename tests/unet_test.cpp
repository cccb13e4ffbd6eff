#include "sag/unet.h"

#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

class ListedUNet final : public UNet {
 public:
  explicit ListedUNet(std::vector<AttentionSiteInfo> sites, std::string note = {})
      : sites_(std::move(sites)), note_(std::move(note)) {}
  torch::Tensor forward(const UNetInput& input) const override { return input.x; }
  std::vector<AttentionSiteInfo> attention_sites() const override { return sites_; }
  std::string note_on_sites() const override { return note_; }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  std::vector<AttentionSiteInfo> sites_;
  std::string note_;
};

const ListedUNet kUNet({{"input.4.0", "unet.input_blocks.4.1.transformer_blocks.0.attn1", 2},
                        {"middle.0.0", "unet.middle_block.1.transformer_blocks.0.attn1", 6},
                        {"middle.0.0", "control.middle_block.1.transformer_blocks.0.attn1", 8}});

std::string message_of(const AttentionSite& site) {
  try {
    resolve_attention_site(kUNet, site);
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(ResolveAttentionSite, TakesNamePathAndOrdinal) {
  EXPECT_EQ(resolve_attention_site(kUNet, {"input", 4, 0}), "input.4.0");
  EXPECT_EQ(resolve_attention_site(kUNet, AttentionSite("#2")), "input.4.0");
  EXPECT_EQ(resolve_attention_site(
                kUNet, AttentionSite("unet.input_blocks.4.1.transformer_blocks.0.attn1")),
            "input.4.0");
}

TEST(ResolveAttentionSite, ReturnsThePathWhereANameIsNotUnique) {
  EXPECT_EQ(resolve_attention_site(kUNet, AttentionSite("#8")),
            "control.middle_block.1.transformer_blocks.0.attn1");
}

TEST(ResolveAttentionSite, ListsTheSitesWhenThereIsNoneOrMoreThanOne) {
  EXPECT_THAT(message_of({"output", 3, 0}), testing::HasSubstr("got \"output.3.0\""));
  EXPECT_THAT(
      message_of({"output", 3, 0}),
      testing::HasSubstr("input.4.0 (unet.input_blocks.4.1.transformer_blocks.0.attn1, #2)"));
  EXPECT_THAT(message_of({"middle", 0, 0}), testing::HasSubstr("matches 2"));
  EXPECT_THAT(message_of({"middle", 0, 0}), testing::HasSubstr("control.middle_block.1"));
  EXPECT_THROW(resolve_attention_site(ListedUNet({}), {"middle", 0, 0}), c10::ValueError);
}

SiteChoice middle_of(const std::vector<AttentionSiteInfo>& sites) {
  return find_middle_attention(ListedUNet(sites)).value_or(SiteChoice{});
}

TEST(FindMiddleAttention, KnowsTheNamesOfLdmAndDiffusers) {
  const auto choice = middle_of({{"input.4.0", "a.attn1", 0}, {"middle.0.0", "b.attn1", 1}});
  EXPECT_EQ(choice.site, "middle.0.0");
  EXPECT_EQ(choice.asked, "middle");
  EXPECT_EQ(choice.reason, "its name is middle.0.0");
}

TEST(FindMiddleAttention, TakesTheOneWhosePathSaysMiddle) {
  for (const char* part :
       {"mid", "middle", "middle_block", "mid_block", "mid_attn", "bottleneck"}) {
    const auto path = std::string("model.") + part + ".1";
    const auto choice = middle_of({{"model.down.4.1", "model.down.4.1", 0},
                                   {path, path, 1},
                                   {"model.up.3.1", "model.up.3.1", 2}});
    EXPECT_EQ(choice.site, path);
    EXPECT_EQ(choice.reason, part + std::string(" is a part of its path"));
  }
  // UNets in C++ have only names.
  EXPECT_EQ(middle_of({{"down"}, {"mid_attn"}, {"up"}}).site, "mid_attn");
}

TEST(FindMiddleAttention, TakesTheOnlyOne) {
  const auto choice = middle_of({{"attention"}});
  EXPECT_EQ(choice.site, "attention");
  EXPECT_EQ(choice.reason, "it is the only self-attention");
}

TEST(FindMiddleAttention, GuessesNothing) {
  EXPECT_FALSE(find_middle_attention(ListedUNet({{"down"}, {"up"}})));
  EXPECT_FALSE(find_middle_attention(ListedUNet({{"pyramid.0"}, {"amid.1"}, {"middleman"}})));
  const auto several = [] { middle_of({{"mid.0"}, {"mid.1"}, {"up"}}); };
  EXPECT_THAT(several, testing::ThrowsMessage<c10::ValueError>(testing::AllOf(
                           testing::HasSubstr("2 self-attentions"),
                           testing::HasSubstr("Its self-attentions are mid.0, mid.1."),
                           testing::Not(testing::HasSubstr("up")))));
  EXPECT_THROW(middle_of({}), c10::ValueError);
  EXPECT_THROW(find_middle_attention(kUNet), c10::ValueError) << "two are called middle.0.0";
}

// A compiled package lists what was marked at export, which may be any site.
TEST(FindMiddleAttention, DoesNotTakeTheOnlyOneOfAListThatIsNotWhole) {
  const ListedUNet unet({{"input.1.0"}}, "Others were not marked.");
  EXPECT_THAT([&] { find_middle_attention(unet); },
              testing::ThrowsMessage<c10::ValueError>(testing::HasSubstr("Others were not")));
  EXPECT_EQ(find_middle_attention(ListedUNet({{"mid.1"}}, "Others were not marked."))->site,
            "mid.1");
}

TEST(FindMiddleAttention, TakesTheFewestTokensOfAProbe) {
  const std::vector<AttentionSiteShape> shapes = {
      {{"a"}, 2, 64, 8}, {{"b"}, 2, 16, 8}, {{"never"}, 0, 0, 0}, {{"c"}, 2, 64, 8}};
  const auto choice = find_middle_attention(shapes);
  EXPECT_EQ(choice.site, "b");
  EXPECT_EQ(choice.reason, "it has the fewest tokens, 16, of 4 self-attentions");
  const std::vector<AttentionSiteShape> equal = {{{"a"}, 2, 64, 8}, {{"b"}, 2, 64, 8}};
  EXPECT_THAT([&] { find_middle_attention(equal); },
              testing::ThrowsMessage<c10::ValueError>(testing::HasSubstr("a with 64 tokens")));
  // A probe cannot tell "a" from "a".
  const std::vector<AttentionSiteShape> twins = {
      {{"a"}, 0, 0, 0}, {{"a"}, 0, 0, 0}, {{"b"}, 2, 64, 8}};
  EXPECT_THAT([&] { find_middle_attention(twins); },
              testing::ThrowsMessage<c10::ValueError>(testing::HasSubstr("several have this")));
  const std::vector<AttentionSiteShape> none = {{{"a"}, 0, 0, 0}};
  EXPECT_THROW(find_middle_attention(none), c10::ValueError);
}

TEST(ResolveAttentionSite, FindsTheMiddleByNames) {
  const ListedUNet unet({{"down"}, {"mid_attn"}, {"up"}});
  EXPECT_EQ(resolve_attention_site(unet, "middle"), "mid_attn");
  EXPECT_EQ(resolve_attention_site(ListedUNet({{"a"}, {"middle"}}), "middle"), "middle");
  EXPECT_THAT(
      [] {
        resolve_attention_site(ListedUNet({{"a"}, {"b"}}), "middle");
      },
      testing::ThrowsMessage<c10::ValueError>(testing::HasSubstr("site must be named")));
}

TEST(ProbeAttentionSites, ReturnsWhatEachWorksOn) {
  const test::ManySitesUNet unet({"a", "b"});
  const auto shapes = probe_attention_sites(
      unet, {.x = torch::ones({3, 4, 16, 24}), .context = torch::ones({3, 1, 1})});
  ASSERT_EQ(shapes.size(), 2u);
  EXPECT_EQ(shapes[0].site.name, "a");
  EXPECT_EQ(shapes[0].tokens, 6);
  EXPECT_EQ(shapes[1].tokens, 24);
  for (const auto& shape : shapes) {
    EXPECT_EQ(shape.heads, 2);
    EXPECT_EQ(shape.head_dim, 2);
  }
}

TEST(ProbeAttentionSites, LeavesZerosWhereNothingRan) {
  const auto shapes = probe_attention_sites(kUNet, {.x = torch::ones({1, 4, 8, 8})});
  ASSERT_EQ(shapes.size(), kUNet.attention_sites().size());
  for (const auto& shape : shapes) EXPECT_EQ(shape.heads + shape.tokens + shape.head_dim, 0);
  EXPECT_THROW(probe_attention_sites(kUNet, {}), c10::ValueError);
}

}  // namespace
}  // namespace sag

#include "sag/unet.h"

#include <string>

#include "support/reference.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

class ListedUNet final : public UNet {
 public:
  explicit ListedUNet(std::vector<AttentionSiteInfo> sites) : sites_(std::move(sites)) {}
  torch::Tensor forward(const UNetInput& input) const override { return input.x; }
  std::vector<AttentionSiteInfo> attention_sites() const override { return sites_; }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  std::vector<AttentionSiteInfo> sites_;
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
      testing::HasSubstr("input.4.0  unet.input_blocks.4.1.transformer_blocks.0.attn1  #2"));
  EXPECT_THAT(message_of({"middle", 0, 0}), testing::HasSubstr("fits 2"));
  EXPECT_THAT(message_of({"middle", 0, 0}), testing::HasSubstr("control.middle_block.1"));
  EXPECT_THROW(resolve_attention_site(ListedUNet({}), {"middle", 0, 0}), c10::ValueError);
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

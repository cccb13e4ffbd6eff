#include "sag/unet.h"

#include <string>

#include "support/reference.h"

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

}  // namespace
}  // namespace sag

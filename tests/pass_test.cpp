#include "sag/pass.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/reference.h"

namespace sag {
namespace {

Pass uncond_and_cond(std::int64_t images) {
  return {.groups = {{.begin = 0, .count = images, .branch = Branch::uncond},
                     {.begin = images, .count = images, .branch = Branch::cond}}};
}

TEST(Owner, IsEqualToItsCopiesAlone) {
  const Owner a("sag"), copy = a, b("sag");
  EXPECT_EQ(a, copy);
  EXPECT_NE(a, b);
  EXPECT_EQ(Owner(), Owner::main);
  EXPECT_NE(a, Owner::main);
  EXPECT_EQ(a.name(), "sag");
}

TEST(PassPart, HasTheGroupsOfItsRows) {
  auto pass = uncond_and_cond(3);
  pass.groups[0].weight = torch::arange(3).view({3, 1, 1, 1});
  pass.groups[1].weight = torch::ones({1, 1, 1, 1});
  pass.groups[1].image = 4;
  const auto part = pass.part(2, 3);
  EXPECT_EQ(part.size(), 3);
  ASSERT_EQ(part.groups.size(), 2u);
  EXPECT_EQ(part.groups[0].begin, 0);
  EXPECT_EQ(part.groups[0].count, 1);
  EXPECT_EQ(part.groups[0].image, 2);
  EXPECT_EQ(part.groups[0].weight.item<std::int64_t>(), 2);
  EXPECT_EQ(part.groups[1].begin, 1);
  EXPECT_EQ(part.groups[1].count, 2);
  EXPECT_EQ(part.groups[1].image, 4);
  EXPECT_EQ(part.groups[1].weight.size(0), 1);
  EXPECT_EQ(pass.part(0, 6).groups.size(), 2u);
  EXPECT_TRUE(pass.part(6, 1).groups.empty());
}

TEST(PassRows, FindsABranchOfAnOwner) {
  auto pass = uncond_and_cond(2);
  const Owner guidance("guidance");
  pass.groups.push_back({.begin = 4, .count = 2, .branch = Branch::uncond, .owner = guidance});
  EXPECT_EQ(pass.size(), 6);
  ASSERT_EQ(pass.rows(Branch::uncond).size(), 1u);
  EXPECT_EQ(pass.rows(Branch::uncond).front().begin, 0);
  EXPECT_EQ(pass.rows(Branch::uncond, guidance).front().begin, 4);
  EXPECT_TRUE(pass.rows(Branch::cond, guidance).empty());
}

TEST(PassSelect, TakesEveryLayoutOfHeads) {
  const auto pass = uncond_and_cond(2);  // 4 rows
  const auto q = torch::randn({4, 3, 5, 8});
  const auto cond = pass.rows(Branch::cond).front();
  const auto expected = q.narrow(0, 2, 2);
  EXPECT_TRUE(torch::equal(pass.select(cond, q), expected));
  EXPECT_TRUE(torch::equal(pass.select(cond, q.flatten(0, 1)), expected));
  EXPECT_TRUE(torch::equal(pass.select(cond, q.flatten(0, 1).unsqueeze(1)), expected));
}

TEST(PassSelect, RefusesWhatIsNoMultipleOfItsRows) {
  const auto pass = uncond_and_cond(2);
  const auto group = pass.groups.front();
  EXPECT_THROW(pass.select(group, torch::zeros({6, 3, 5, 8})), c10::ValueError);
  EXPECT_THROW(pass.select(group, torch::zeros({8, 3, 5, 8})), c10::ValueError);
  EXPECT_THROW(pass.select(group, torch::zeros({4, 5})), c10::ValueError);
}

}  // namespace
}  // namespace sag

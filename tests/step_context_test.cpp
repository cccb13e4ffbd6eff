#include "sag/step_context.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "support/reference.h"

namespace sag {
namespace {

const RowGroup kRows{.count = 2, .branch = Branch::uncond};

TEST(StepContext, KeepsRecordsApartByOwner) {
  StepContext step(1.0, 0, 8, 8);
  const Owner a("a"), b("b");
  step.record(a, kRows, torch::ones({2, 4}));
  EXPECT_EQ(step.records(a).size(), 1u);
  EXPECT_TRUE(step.records(b).empty());
}

TEST(StepContext, KeepsEveryNegativeAndReplacesTheSameRows) {
  StepContext step(1.0, 0, 8, 8);
  const Owner owner("a");
  auto second = kRows;
  second.entry = 1;
  step.record(owner, kRows, torch::zeros({2, 4}));
  step.record(owner, second, torch::zeros({2, 4}));
  step.record(owner, kRows, torch::ones({2, 4}));
  ASSERT_EQ(step.records(owner).size(), 2u);
  EXPECT_TRUE(torch::equal(step.records(owner)[0].map, torch::ones({2, 4})));
}

TEST(StepContext, RefusesAMapOfOtherRows) {
  StepContext step(1.0, 0, 8, 8);
  EXPECT_THROW(step.record(Owner("a"), kRows, torch::ones({3, 4})), c10::ValueError);
}

TEST(StepContext, TakesOverWhatAPartHolds) {
  const Owner a("a"), b("b"), c("c");
  StepContext part(1.0, 0, 8, 8), step(1.0, 0, 8, 8), faulty(1.0, 0, 8, 8);
  part.record(a, kRows, torch::ones({2, 4}));
  part.skipped(b, "as b said");
  part.guided(c, torch::ones({1}));
  step.take(part);
  EXPECT_EQ(step.records(a).size(), 1u);
  EXPECT_EQ(step.skip_reason(b), "as b said");
  EXPECT_TRUE(step.notes().back().guided);
  faulty.take(part, "a fault");
  EXPECT_TRUE(faulty.records().empty());
  EXPECT_EQ(faulty.skip_reason(a), "a fault");
  EXPECT_EQ(faulty.skip_reason(b), "as b said");
}

TEST(StepContext, NotesWhatGuidancesDid) {
  StepContext step(1.0, 0, 8, 8);
  const Owner a("a"), b("b");
  step.skipped(a, "first");
  step.skipped(a, "second");
  step.guided(b);
  const auto notes = step.notes();
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_EQ(notes[0].name, "a");
  EXPECT_EQ(notes[0].reason, "first");
  EXPECT_FALSE(notes[0].guided);
  EXPECT_TRUE(notes[1].guided);
  EXPECT_EQ(step.skip_reason(a), "first");
}

}  // namespace
}  // namespace sag

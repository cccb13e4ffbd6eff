#include "sag/attention.h"

#include <stdexcept>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/attention_scope.h"
#include "sag/step_context.h"
#include "support/reference.h"

namespace sag {
namespace {

struct Inputs {
  torch::Tensor q = torch::randn({2, 3, 5, 8}), k = torch::randn({2, 3, 5, 8}),
                v = torch::randn({2, 3, 5, 8});
};

torch::Tensor sdpa(const Inputs& in) {
  return at::scaled_dot_product_attention(in.q, in.k, in.v);
}

AttentionHook times(double factor) {
  return [factor](const AttentionCall& call, const Pass&, const NextAttention& next) {
    return factor * next(call);
  };
}
AttentionHook plus(double summand) {
  return [summand](const AttentionCall& call, const Pass&, const NextAttention& next) {
    return next(call) + summand;
  };
}

/// A scope for tests of the attention alone.
struct Scope {
  explicit Scope(std::vector<InstalledHook> hooks)
      : scope(std::move(hooks), Pass{.sigma = 2, .groups = {{.count = 2}}, .step = &step}) {}
  StepContext step{2, 0, 8, 8};
  AttentionScope scope;
};

TEST(AttentionSiteName, IsComfyUisKeyOrAnyName) {
  EXPECT_EQ((AttentionSite{"middle", 0, 0}).name(), "middle.0.0");
  EXPECT_EQ((AttentionSite{"input", 4}).name(), "input.4.0");
  EXPECT_EQ(AttentionSite("#12").name(), "#12");
  EXPECT_THROW(AttentionSite(""), c10::ValueError);
  EXPECT_THROW((AttentionSite{"middle", -1, 0}), c10::ValueError);
  EXPECT_THROW((AttentionSite{"", 0, 0}), c10::ValueError);
}

TEST(Attention, IsPlainSdpaWithoutAScopeOrAHook) {
  const Inputs in;
  EXPECT_TRUE(torch::equal(attention(in.q, in.k, in.v, {.site = "a"}), sdpa(in)));
  const Scope other({{"b", times(2), {}}});
  EXPECT_TRUE(torch::equal(attention(in.q, in.k, in.v, {.site = "a"}), sdpa(in)));
}

TEST(Attention, HandsOnAllArguments) {
  const Inputs in;
  const auto mask = torch::randn({5, 5});
  const Scope scope({{"a", times(1), {}}});
  EXPECT_TRUE(
      torch::equal(attention(in.q, in.k, in.v, {.site = "a", .attn_mask = mask, .scale = 0.5}),
                   at::scaled_dot_product_attention(in.q, in.k, in.v, mask, 0.0, false, 0.5)));
  EXPECT_TRUE(torch::equal(attention(in.q, in.k, in.v, {.site = "a", .is_causal = true}),
                           at::scaled_dot_product_attention(in.q, in.k, in.v, {}, 0.0, true)));
}

TEST(Attention, RunsHooksFirstInstalledOutermost) {
  const Inputs in;
  const Scope scope({{"a", times(2), {}}, {"a", plus(1), {}}});
  EXPECT_LT(test::max_diff(attention(in.q, in.k, in.v, {.site = "a"}), 2 * (sdpa(in) + 1)), 1e-6);
}

TEST(Attention, NeedNotCallTheNextHook) {
  const Inputs in;
  const auto perturb = [](const AttentionCall& call, const Pass&, const NextAttention&) {
    return call.v;
  };
  const Scope scope({{"a", times(2), {}}, {"a", perturb, {}}});
  EXPECT_TRUE(torch::equal(attention(in.q, in.k, in.v, {.site = "a"}), 2 * in.v));
}

TEST(Attention, TellsHooksTheirPass) {
  const Inputs in;
  double seen = 0;
  const Scope scope({{"a",
                      [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
                        seen = pass.sigma;
                        EXPECT_EQ(pass.size(), call.q.size(0));
                        return next(call);
                      },
                      {}}});
  attention(in.q, in.k, in.v, {.site = "a"});
  EXPECT_EQ(seen, 2.0);
}

TEST(Attention, RefusesAHooksWrongShape) {
  const Inputs in;
  const auto wrong = [](const AttentionCall& call, const Pass&, const NextAttention&) {
    return call.v.narrow(2, 0, 1);
  };
  const auto nothing = [](const AttentionCall&, const Pass&, const NextAttention&) {
    return torch::Tensor();
  };
  const Scope scope({{"a", wrong, {}}, {"b", nothing, {}}});
  EXPECT_THROW(attention(in.q, in.k, in.v, {.site = "a"}), c10::ValueError);
  EXPECT_THROW(attention(in.q, in.k, in.v, {.site = "b"}), c10::ValueError);
}

TEST(AttentionScope, NestsAndEnds) {
  const Inputs in;
  {
    const Scope outer({{"a", times(2), {}}});
    {
      const Scope inner({{"a", times(3), {}}});
      EXPECT_LT(test::max_diff(attention(in.q, in.k, in.v, {.site = "a"}), 3 * sdpa(in)), 1e-6);
    }
    EXPECT_LT(test::max_diff(attention(in.q, in.k, in.v, {.site = "a"}), 2 * sdpa(in)), 1e-6);
    EXPECT_EQ(AttentionScope::hooked_sites(), std::vector<std::string>{"a"});
  }
  EXPECT_TRUE(torch::equal(attention(in.q, in.k, in.v, {.site = "a"}), sdpa(in)));
  EXPECT_TRUE(AttentionScope::hooked_sites().empty());
}

TEST(AttentionScope, ReachesThreadsThatAreForked) {
  const Inputs in;
  const Scope scope({{"a", times(2), {}}});
  torch::Tensor out;
  c10::intrusive_ptr<c10::ivalue::Future> done =
      c10::make_intrusive<c10::ivalue::Future>(c10::NoneType::get());
  at::launch([&] {
    out = attention(in.q, in.k, in.v, {.site = "a"});
    done->markCompleted();
  });
  done->wait();
  EXPECT_LT(test::max_diff(out, 2 * sdpa(in)), 1e-6);
}

TEST(AttentionScope, EndsWhenAHookThrows) {
  struct Odd {};
  const Inputs in;
  const auto throwing = [](const AttentionCall&, const Pass&,
                           const NextAttention&) -> torch::Tensor { throw Odd{}; };
  EXPECT_THROW(
      {
        const Scope scope({{"a", throwing, {}}});
        attention(in.q, in.k, in.v, {.site = "a"});
      },
      Odd);
  EXPECT_TRUE(torch::equal(attention(in.q, in.k, in.v, {.site = "a"}), sdpa(in)));
}

TEST(AttentionScope, NeedsAStep) {
  EXPECT_THROW(AttentionScope({}, Pass{}), c10::ValueError);
}

// Calls one site once per entry of `rows`, with that many rows, in a pass of 2 uncond and 2 cond
// rows, and records the mean over heads of each row of q: its number.
struct Calls {
  explicit Calls(const std::vector<std::int64_t>& rows, std::int64_t heads = 2) {
    const AttentionHook record = [&](const AttentionCall& call, const Pass& pass,
                                     const NextAttention& next) {
      groups.push_back(pass.groups.size());
      for (const auto& group : pass.rows(Branch::uncond))
        pass.step->record(owner, group, pass.select(group, call.q).mean({1, 3}));
      return next(call);
    };
    const auto q =
        torch::arange(16).to(torch::kFloat).view({16, 1, 1, 1}).expand({-1, heads, -1, -1});
    run_hooked({{"a", record, {}}},
               {.groups = {{.count = 2, .branch = Branch::uncond}, {.begin = 2, .count = 2}},
                .step = &step},
               [&] {
                 std::int64_t begin = 0;
                 for (const auto count : rows) {
                   const auto part = q.narrow(0, begin, count);
                   attention(part, part, part, {.site = "a"});
                   begin += count;
                 }
                 EXPECT_TRUE(step.records(owner).empty()) << "before the pass has ended";
                 return q;
               });
  }

  Owner owner{"recorder"};
  StepContext step{1, 0, 8, 8};
  std::vector<std::size_t> groups;
};

TEST(AttentionScope, TellsEachCallWhichRowsItCarries) {
  for (const auto& rows :
       std::vector<std::vector<std::int64_t>>{{1, 2, 1}, {3, 1}, {1, 1, 1, 1}, {4, 0}, {1, 0, 3}}) {
    const Calls calls(rows);
    auto map = torch::full({2, 1}, -1.f);
    for (const auto& record : calls.step.records(calls.owner))
      map.narrow(0, record.rows.image, record.rows.count).copy_(record.map);
    EXPECT_TRUE(torch::equal(map, torch::tensor({{0.f}, {1.f}})));
    EXPECT_EQ(calls.step.skip_reason(calls.owner), "");
  }
  EXPECT_EQ(Calls({1, 2, 1}).groups, (std::vector<std::size_t>{1, 2, 1}));
}

TEST(AttentionScope, TakesHeadsFoldedIntoRows) {
  const Calls calls({8}, 1);
  const auto records = calls.step.records(calls.owner);
  ASSERT_EQ(records.size(), 1u);
  EXPECT_TRUE(torch::equal(records[0].map, torch::tensor({{0.5f}, {2.5f}})));
}

// Parts of the heads, the same rows again, rows that are missing or too many: it is unknown what
// the rows of such calls are.
TEST(AttentionScope, DropsRecordsWhereCallsAreNoPartsOfTheBatch) {
  for (const auto& rows : std::vector<std::vector<std::int64_t>>{{4, 4},
                                                                 {8, 8},
                                                                 {2},
                                                                 {3},
                                                                 {1, 2},
                                                                 {2, 2, 2, 2},
                                                                 {1, 4},
                                                                 {4, 1, 1, 1, 1},
                                                                 {3, 3, 2},
                                                                 {5, 3},
                                                                 {5},
                                                                 {1, 1, 1, 1, 1, 1, 1, 1}}) {
    const Calls calls(rows);
    EXPECT_TRUE(calls.step.records(calls.owner).empty()) << rows;
    EXPECT_EQ(calls.groups.size(), rows.size()) << "hooks run anyway";
    const bool sees_rows = std::count(calls.groups.begin(), calls.groups.end(), 0u) <
                           static_cast<std::ptrdiff_t>(rows.size());
    const auto reason = calls.step.skip_reason(calls.owner);
    EXPECT_EQ(reason.find("site ran") != std::string::npos, sees_rows) << rows << reason;
  }
}

// One head of each of two rows, or a row of one head: [1, tokens, head_dim] can be either.
TEST(AttentionScope, TakesNoPartsWhoseHeadsMayBeFolded) {
  const Calls calls({1, 1, 1, 1}, 1);
  EXPECT_EQ(calls.groups, std::vector<std::size_t>(4, 0));
  EXPECT_TRUE(calls.step.records(calls.owner).empty());
}

TEST(ActiveHooks, AreChosenBySigmaBeforeThePass) {
  const std::vector<InstalledHook> hooks = {
      {"a", times(1), {}},
      {"b", times(1), {.active = [](const StepContext& step) { return step.sigma() > 3; }}}};
  const StepContext early(5, 0, 16, 16), late(2, 1, 16, 16);
  EXPECT_EQ(active_hooks(hooks, early).size(), 2u);
  ASSERT_EQ(active_hooks(hooks, late).size(), 1u);
  EXPECT_EQ(active_hooks(hooks, late).front().site, "a");
}

}  // namespace
}  // namespace sag

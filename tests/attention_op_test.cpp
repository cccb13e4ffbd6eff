#include <stdexcept>

#include <ATen/core/dispatch/Dispatcher.h>

#include "sag/attention.h"
#include "sag/step_context.h"
#include "support/reference.h"

namespace sag {
namespace {

class HookFailure : public std::logic_error {
  using std::logic_error::logic_error;
};

torch::Tensor call_op(const torch::Tensor& q, const std::string& site) {
  ensure_ops_registered();
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("sag::attention", "");
  torch::jit::Stack stack = {q, q, q, c10::IValue(), 0.0, false, c10::IValue(), false, site};
  op.callBoxed(stack);
  return stack.at(0).toTensor();
}

TEST(AttentionOp, IsPlainSdpaWithoutAScope) {
  const auto q = torch::randn({2, 3, 5, 8});
  EXPECT_TRUE(torch::equal(call_op(q, "a"), at::scaled_dot_product_attention(q, q, q)));
}

TEST(AttentionOp, RunsHooks) {
  const auto q = torch::randn({2, 3, 5, 8});
  StepContext step(1, 0, 8, 8);
  const AttentionScope scope(
      {{"a", [](const auto& call, const auto&, const auto& next) { return next(call) * 2; }, {}}},
      {.groups = {{.count = 2}}, .step = &step});
  EXPECT_LT(test::max_diff(call_op(q, "a"), 2 * at::scaled_dot_product_attention(q, q, q)), 1e-6);
}

TEST(AttentionOp, KeepsAHooksExceptionForTheScopesOwner) {
  const auto q = torch::randn({2, 3, 5, 8});
  const auto plain = at::scaled_dot_product_attention(q, q, q);
  StepContext step(1, 0, 8, 8);
  int calls = 0;
  const AttentionScope scope({{"a",
                               [&](const auto&, const auto&, const auto&) -> torch::Tensor {
                                 ++calls;
                                 throw HookFailure("on purpose");
                               },
                               {}}},
                             {.groups = {{.count = 2}}, .step = &step});
  EXPECT_TRUE(torch::equal(call_op(q, "a"), plain));
  EXPECT_TRUE(torch::equal(call_op(q, "a"), plain));
  EXPECT_EQ(calls, 1) << "after a failure the rest of the pass runs plain attention";
  EXPECT_THROW(scope.rethrow_if_failed(), HookFailure);
}

TEST(AttentionOp, HasAMetaKernelOfTheSameShapeAndLayout) {
  const auto q = torch::randn({2, 5, 3, 8}).transpose(1, 2);
  const auto meta = call_op(q.to(torch::kMeta), "a"), real = call_op(q, "a");
  EXPECT_EQ(meta.sizes(), real.sizes());
  EXPECT_EQ(meta.strides(), real.strides());
}

}  // namespace
}  // namespace sag

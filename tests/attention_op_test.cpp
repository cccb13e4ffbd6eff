#include <stdexcept>

#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/attention_scope.h"
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

// With one head, q, k and v are already contiguous: a compiler would reuse their memory.
TEST(AttentionOp, ReturnsMemoryOfItsOwn) {
  const auto q = torch::randn({2, 1, 5, 8});
  StepContext step(1, 0, 8, 8);
  for (const auto& returned :
       {AttentionHook([](const auto&call, const auto&, const auto&) { return call.v; }),
        AttentionHook([](const auto&call, const auto&, const auto&) { return call.q.detach(); })}) {
    const auto out = run_hooked({{"a", returned, {}}}, {.groups = {{.count = 2}}, .step = &step},
                                [&] { return call_op(q, "a"); });
    EXPECT_FALSE(out.is_alias_of(q));
    EXPECT_TRUE(torch::equal(out, q));
  }
}

// The same for a tensor that a hook keeps; others are not copied.
TEST(AttentionOp, LeavesAHooksMemoryToIt) {
  const auto q = torch::randn({2, 1, 5, 8}), held = torch::randn({2, 1, 5, 8});
  StepContext step(1, 0, 8, 8);
  torch::Tensor kept;
  const auto call_with = [&](const AttentionHook& hook) {
    return run_hooked({{"a", hook, {}}}, {.groups = {{.count = 2}}, .step = &step},
                      [&] { return call_op(q, "a"); });
  };
  EXPECT_FALSE(
      call_with([&](const auto&, const auto&, const auto&) { return held; }).is_alias_of(held));
  const auto out = call_with([&](const auto& call, const auto&, const auto& next) {
    auto result = next(call).contiguous();
    kept = result.narrow(0, 0, 1);
    return result;
  });
  EXPECT_FALSE(out.is_alias_of(kept));
  EXPECT_TRUE(torch::equal(out.narrow(0, 0, 1), kept));
  const void* memory = nullptr;
  const auto fresh = call_with([&](const auto&, const auto&, const auto&) {
    auto result = torch::zeros({2, 1, 5, 8});
    memory = result.data_ptr();
    return result;
  });
  EXPECT_EQ(fresh.data_ptr(), memory);
}

// Nothing after the op checks it, least of all a compiled UNet.
TEST(AttentionOp, RefusesAnotherDtypeOrDevice) {
  const auto q = torch::randn({2, 3, 5, 8});
  StepContext step(1, 0, 8, 8);
  const auto changed_to = [&](torch::TensorOptions options) {
    const AttentionHook hook = [options](const auto& call, const auto&, const auto& next) {
      return next(call).to(options);
    };
    run_hooked({{"a", hook, {}}}, {.groups = {{.count = 2}}, .step = &step}, [&] {
      auto out = call_op(q, "a");
      EXPECT_TRUE(torch::equal(out, at::scaled_dot_product_attention(q, q, q)));
      return out;
    });
  };
  EXPECT_THROW(changed_to(torch::kHalf), c10::TypeError);
  EXPECT_THROW(changed_to(torch::kDouble), c10::TypeError);
  EXPECT_THROW(changed_to(torch::Device(torch::kMeta)), c10::TypeError);
  EXPECT_NO_THROW(changed_to(torch::kFloat));
}

torch::Tensor call_probabilities_op(const torch::Tensor& p, const torch::Tensor& v,
                                    const std::string& product) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sag::attention_probabilities", "")
                             .typed<torch::Tensor(const torch::Tensor&, const torch::Tensor&,
                                                  std::string_view, std::string_view)>();
  return op.call(p, v, product, "a");
}

TEST(AttentionProbabilitiesOp, MultipliesAsTheModelDoes) {
  const auto p = torch::rand({2, 3, 5, 5}), v = torch::randn({2, 3, 5, 8});
  const auto p3 = p.flatten(0, 1), v3 = v.flatten(0, 1), vt = v3.transpose(1, 2).contiguous();
  StepContext step(1, 0, 8, 8);
  AttentionCall seen;
  const AttentionHook look = [&](const AttentionCall& call, const Pass&,
                                 const NextAttention& next) {
    seen = call;
    return next(call);
  };
  const auto all = [&] {
    EXPECT_TRUE(torch::equal(call_probabilities_op(p, v, "matmul"), at::matmul(p, v)));
    EXPECT_TRUE(torch::equal(call_probabilities_op(p3, v3, "bmm"), at::bmm(p3, v3)));
    EXPECT_TRUE(torch::equal(call_probabilities_op(p3, vt, "matmul_transposed"),
                             at::bmm(vt, p3.permute({0, 2, 1}))));
    EXPECT_TRUE(torch::equal(call_probabilities_op(p3, vt, "bts,bcs->bct"),
                             at::einsum("bts,bcs->bct", {p3, vt})));
  };
  all();
  const AttentionScope scope({{"a", look, {}}}, {.groups = {{.count = 2}}, .step = &step});
  all();
  EXPECT_FALSE(seen.q.defined());
  EXPECT_FALSE(seen.k.defined());
  EXPECT_TRUE(torch::equal(seen.probabilities, p3));
  EXPECT_TRUE(torch::equal(seen.v, vt));
}

TEST(AttentionProbabilitiesOp, TakesWhatHooksReturnInTheProductsShape) {
  const auto p = torch::rand({2, 5, 5}), v = torch::randn({2, 8, 5});
  StepContext step(1, 0, 8, 8);
  torch::Tensor replacement = v;
  const AttentionHook replace = [&](const AttentionCall&, const Pass&, const NextAttention&) {
    return replacement;
  };
  const auto run = [&] {
    return run_hooked({{"a", replace, {}}}, {.groups = {{.count = 2}}, .step = &step},
                      [&] { return call_probabilities_op(p, v, "bts,bcs->bct"); });
  };
  EXPECT_TRUE(torch::equal(run(), v));
  replacement = v.transpose(1, 2);
  EXPECT_THROW(run(), c10::ValueError);
}

TEST(AttentionProbabilitiesOp, HasAMetaKernelOfTheSameShapeAndLayout) {
  const auto p = torch::rand({6, 5, 5}), v = torch::randn({6, 8, 5});
  for (const char* product : {"matmul_transposed", "bts,bcs->bct"}) {
    const auto real = call_probabilities_op(p, v, product);
    const auto meta = call_probabilities_op(p.to(torch::kMeta), v.to(torch::kMeta), product);
    EXPECT_EQ(meta.sizes(), real.sizes());
    EXPECT_EQ(meta.strides(), real.strides());
  }
}

TEST(AttentionOp, KeepsAHooksExceptionForTheScopesOwner) {
  const auto q = torch::randn({2, 3, 5, 8});
  const auto plain = at::scaled_dot_product_attention(q, q, q);
  StepContext step(1, 0, 8, 8);
  int calls = 0;
  const AttentionHook fail = [&](const auto&, const auto&, const auto&) -> torch::Tensor {
    ++calls;
    throw HookFailure("on purpose");
  };
  const auto run = [&] {
    EXPECT_TRUE(torch::equal(call_op(q, "a"), plain));
    EXPECT_TRUE(torch::equal(call_op(q, "a"), plain));
    return plain;
  };
  const Pass pass{.groups = {{.count = 2}}, .step = &step};
  EXPECT_THROW(run_hooked({{"a", fail, {}}}, pass, run), HookFailure);
  EXPECT_EQ(calls, 1) << "after a failure the rest of the pass runs plain attention";
  // Even if the interpreter fails afterwards.
  const auto run_and_throw = [&]() -> torch::Tensor {
    run();
    throw std::runtime_error("the consequence");
  };
  EXPECT_THROW(run_hooked({{"a", fail, {}}}, pass, run_and_throw), HookFailure);
}

TEST(AttentionOp, HasAMetaKernelOfTheSameShapeAndLayout) {
  const auto q = torch::randn({2, 5, 3, 8}).transpose(1, 2);
  const auto meta = call_op(q.to(torch::kMeta), "a"), real = call_op(q, "a");
  EXPECT_EQ(meta.sizes(), real.sizes());
  EXPECT_EQ(meta.strides(), real.strides());
}

}  // namespace
}  // namespace sag

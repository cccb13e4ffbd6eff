#include <optional>
#include <string_view>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention_scope_state.h"
#include "sag/attention.h"

namespace sag {
namespace {

// The Meta kernels and the schemas promise graph compilers a contiguous result in memory of its
// own, not an input's or one that a hook keeps, because compilers reuse that memory.
torch::Tensor own(const torch::Tensor& out) {
  const bool shared = out.use_count() > 1 || out.storage().use_count() > 1;
  return shared ? out.clone(at::MemoryFormat::Contiguous) : out.contiguous();
}

template <typename Shape>
torch::Tensor run_op(std::string_view site, const AttentionCall& call, const NextAttention& plain,
                     const Shape& shape) {
  auto* scope = current_attention_scope();
  if (!scope || scope->error()) return own(plain(call));
  try {
    return own(run_hooks(*scope, site, call, plain, shape()));
  } catch (...) {
    // An interpreter would turn it into a runtime_error, so the owner of the scope rethrows it.
    scope->fail(std::current_exception());
    return own(plain(call));
  }
}

torch::Tensor attention_op(const torch::Tensor& query, const torch::Tensor& key,
                           const torch::Tensor& value,
                           const std::optional<torch::Tensor>& attn_mask, double dropout_p,
                           bool is_causal, std::optional<double> scale, bool enable_gqa,
                           std::string_view site) {
  const AttentionCall call{query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa};
  return run_op(site, call, plain_attention, [&] { return attention_shape(call); });
}

torch::Tensor attention_meta(const torch::Tensor& query, const torch::Tensor& /*key*/,
                             const torch::Tensor& value,
                             const std::optional<torch::Tensor>& /*attn_mask*/,
                             double /*dropout_p*/, bool /*is_causal*/,
                             std::optional<double> /*scale*/, bool /*enable_gqa*/,
                             std::string_view /*site*/) {
  auto sizes = query.sym_sizes().vec();
  sizes.back() = value.sym_size(-1);
  return at::empty_symint(sizes, query.options());
}

torch::Tensor probabilities_meta(const torch::Tensor& probabilities, const torch::Tensor& value,
                                 std::string_view product, std::string_view /*site*/) {
  return multiply_probabilities(probabilities, value, product).contiguous();
}

torch::Tensor probabilities_op(const torch::Tensor& probabilities, const torch::Tensor& value,
                               std::string_view product, std::string_view site) {
  const AttentionCall call{.v = value, .probabilities = probabilities};
  const auto plain = [product](const AttentionCall& changed) {
    return multiply_probabilities(changed.probabilities, changed.v, product);
  };
  const auto shape = [&] {
    const auto meta = [](const torch::Tensor& t) {
      return at::empty(t.sizes(), t.options().device(torch::kMeta));
    };
    return multiply_probabilities(meta(probabilities), meta(value), product).sizes().vec();
  };
  return run_op(site, call, plain, shape);
}

torch::Tensor block_op(const torch::Tensor& input, const torch::Tensor& output,
                       std::string_view path) {
  const AttentionCall call{.q = input, .v = output};
  return run_op(key_of_block(path), call, returned_by_block, [&] { return output.sizes(); });
}

void layer_op(const torch::Tensor& input, std::int64_t channels, std::string_view site) {
  if (auto* scope = current_attention_scope()) scope->enter_layer(site, input.sizes(), channels);
}

void layer_meta(const torch::Tensor& /*input*/, std::int64_t /*channels*/,
                std::string_view /*site*/) {}

}  // namespace

// Defined here so that calling it links the registration below.
void ensure_ops_registered() {}

}  // namespace sag

// CompositeExplicitAutograd, because exporters take Implicit ops apart and would lose the call.
// CONSERVATIVE, because hooks have effects that the graph does not show.
TORCH_LIBRARY(sag, m) {
  m.def(torch::schema(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float "
      "dropout_p=0.0, "
      "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, str site=\"\") -> Tensor",
      c10::AliasAnalysisKind::CONSERVATIVE));
  m.def(torch::schema(
      "attention_probabilities(Tensor probabilities, Tensor value, *, str product=\"matmul\", str "
      "site=\"\") -> Tensor",
      c10::AliasAnalysisKind::CONSERVATIVE));
  m.def(torch::schema("transformer_block(Tensor input, Tensor output, *, str path=\"\") -> Tensor",
                      c10::AliasAnalysisKind::CONSERVATIVE));
  m.def(torch::schema("attention_layer(Tensor input, int channels, *, str site=\"\") -> ()",
                      c10::AliasAnalysisKind::CONSERVATIVE));
}
TORCH_LIBRARY_IMPL(sag, CompositeExplicitAutograd, m) {
  m.impl("attention", sag::attention_op);
  m.impl("attention_probabilities", sag::probabilities_op);
  m.impl("attention_layer", sag::layer_op);
  m.impl("transformer_block", sag::block_op);
}
TORCH_LIBRARY_IMPL(sag, Meta, m) {
  m.impl("attention", sag::attention_meta);
  m.impl("attention_probabilities", sag::probabilities_meta);
  m.impl("attention_layer", sag::layer_meta);
}

#include "sag/attention.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include "attention_scope_state.h"

namespace sag {

torch::Tensor plain_attention(const AttentionCall& call) {
  return at::scaled_dot_product_attention(call.q, call.k, call.v, call.attn_mask, call.dropout_p,
                                          call.is_causal, call.scale, call.enable_gqa);
}

torch::Tensor returned_by_block(const AttentionCall& call) {
  return call.v;
}

std::string key_of_block(std::string_view path) {
  return "block " + std::string(path);
}

torch::Tensor multiply_probabilities(const torch::Tensor& probabilities, const torch::Tensor& value,
                                     std::string_view product) {
  if (product == "matmul") return at::matmul(probabilities, value);
  if (product == "bmm") return at::bmm(probabilities, value);
  if (product == "matmul_transposed") return at::matmul(value, probabilities.transpose(-1, -2));
  return at::einsum(product, {probabilities, value});
}

std::vector<std::int64_t> attention_shape(const AttentionCall& call) {
  auto shape = call.q.sizes().vec();
  if (!shape.empty() && call.v.dim() > 0) shape.back() = call.v.size(-1);
  return shape;
}

torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionOptions& options) {
  const auto mask =
      options.attn_mask && options.attn_mask->defined() ? options.attn_mask : std::nullopt;
  const AttentionCall call{
      q, k, v, mask, options.dropout_p, options.is_causal, options.scale, options.enable_gqa};
  auto* scope = current_attention_scope();
  return scope ? run_hooks(*scope, options.site, call, plain_attention, attention_shape(call))
               : plain_attention(call);
}

torch::Tensor transformer_block(const torch::Tensor& x,
                                const std::function<torch::Tensor(const torch::Tensor&)>& block,
                                std::string_view path) {
  const AttentionCall call{.q = x, .v = block(x)};
  auto* scope = current_attention_scope();
  return scope ? run_hooks(*scope, key_of_block(path), call, returned_by_block, call.v.sizes())
               : call.v;
}

}  // namespace sag

#pragma once

#include <functional>
#include <optional>
#include <string_view>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

/// Which attention it is, and SDPA's own arguments.
struct AttentionOptions {
  /// The name of this attention, as `UNet::attention_sites` lists it; of a cross-attention the
  /// path, as `UNet::cross_attention_sites` does.
  std::string_view site = {};
  /// SDPA's mask, boolean or added; nothing: none.
  std::optional<torch::Tensor> attn_mask = {};
  /// SDPA's dropout, in training.
  double dropout_p = 0.0;
  /// Whether a token sees only itself and those before it.
  bool is_causal = false;
  /// Nothing: 1 / sqrt(head_dim).
  std::optional<double> scale = {};
  /// Whether k and v may have fewer heads than q.
  bool enable_gqa = false;
};

/// Scaled dot-product attention that can be hooked (`AttentionScope`). A UNet written in C++ calls
/// it instead of `at::scaled_dot_product_attention`; without a scope the result is the same, bit
/// for bit. q: [rows, heads, tokens, head_dim]; k, v: [rows, heads, key tokens, head_dim].
/// TorchScript and AOTInductor models reach the same code as the op `sag::attention`.
SAG_API torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k,
                                const torch::Tensor& v, const AttentionOptions& options = {});

/// Runs a transformer block so that hooks may change what it returns
/// (`ModelPatcher::set_block_replace`). A UNet written in C++ calls its blocks through it, and
/// lists them by these paths (`UNet::block_sites`). x: [rows, tokens, channels], what the block
/// adds to; `block` returns the same shape and must not write into x. Without a hook, block(x).
SAG_API torch::Tensor transformer_block(
    const torch::Tensor& x, const std::function<torch::Tensor(const torch::Tensor&)>& block,
    std::string_view path);

/// Makes sure that the ops of TorchScript and AOTInductor models, `sag::attention` and others, are
/// registered.
/// Everything that loads models calls it. A program that links the static library and loads models
/// itself must call it once.
SAG_API void ensure_ops_registered();

}  // namespace sag

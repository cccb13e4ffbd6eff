#pragma once

#include <optional>
#include <string_view>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

struct AttentionOptions {
  /// The name of this attention, as `UNet::attention_sites` lists it.
  std::string_view site = {};
  std::optional<torch::Tensor> attn_mask = {};
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = {};
  bool enable_gqa = false;
};

/// Scaled dot-product attention that can be hooked (`AttentionScope`). A UNet written in C++ calls
/// it instead of `at::scaled_dot_product_attention`; without a scope the result is the same, bit
/// for bit. q: [rows, heads, tokens, head_dim]; k, v: [rows, heads, key tokens, head_dim].
/// TorchScript and AOTInductor models reach the same code as the op `sag::attention`.
SAG_API torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k,
                                const torch::Tensor& v, const AttentionOptions& options = {});

/// Makes sure that the ops `sag::attention` and `sag::attention_probabilities` are registered.
/// Everything that loads models calls it. A program that links the static library and loads models
/// itself must call it once.
SAG_API void ensure_ops_registered();

}  // namespace sag

#pragma once

#include <optional>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

/// Returns how much attention each key token receives: softmax(q kᵀ · scale), the mean over heads,
/// then the sum over queries. [B, key tokens] fp32 (fp64 for fp64 input). If there are as many
/// queries as keys, the values of a row average to exactly 1, so 1 means "its fair share".
///
/// q: [B, heads, query tokens, head_dim]; k: [B, key heads, key tokens, head_dim], fp16, bf16, fp32
/// or fp64, any strides, CPU or CUDA. Key heads must divide heads (grouped-query attention). scale:
/// unset means 1 / sqrt(head_dim).
///
/// The queries × keys matrix never exists: working memory grows with queries + keys only. Products
/// and sums are fp32 or more, whatever the process's autocast, TF32 and matmul precision, and in a
/// fixed order, so the result is the same in every run. Works on the current stream without waiting
/// for it and can be captured in a CUDA graph.
///
/// On CUDA, fp16 and bf16 use tensor core kernels (working memory: 8 bytes per query and head, 4
/// per key and head) if head_dim is a multiple of 8 up to 256, the innermost stride 1, every row
/// 16-byte aligned and scale > 0. Everything else is computed in blocks of scores, of 16 MiB or one
/// row.
///
/// Throws ValueError or TypeError on other shapes, dtypes and devices.
/// Source: Hong et al. 2023, section 4.2; ComfyUI: `attn_and_record`, `create_blur_map`.
SAG_API torch::Tensor attention_map(const torch::Tensor& q, const torch::Tensor& k,
                                    std::optional<double> scale = {});

/// Returns the same from existing attention probabilities, the result of softmax: the mean over
/// heads of their sums over queries. probabilities: [B, heads, query tokens, key tokens], fp16,
/// bf16, fp32 or fp64, any strides, CPU or CUDA → [B, key tokens] fp32 (fp64 for fp64).
///
/// Sums in fp32, in a fixed order, without another matrix of that size. Throws ValueError or
/// TypeError on other shapes and dtypes.
SAG_API torch::Tensor attention_map(const torch::Tensor& probabilities);

}  // namespace sag

#pragma once

#include <cstdint>
#include <optional>

#include <torch/types.h>

namespace torch::jit {
struct Graph;
}

namespace sag {

/// Returns `at::group_norm`, followed by SiLU if wanted. For a half precision CUDA tensor with
/// channels last, a kernel of our own computes both at once, in fp32, and the result has channels
/// last: LibTorch's kernel would copy x into another layout, and the next convolution would copy
/// back.
torch::Tensor fused_group_norm(const torch::Tensor& x, std::int64_t groups,
                               const std::optional<torch::Tensor>& weight,
                               const std::optional<torch::Tensor>& bias, double eps, bool silu);

/// Makes every `group_norm` of a private graph, with the SiLU that follows, call this function.
void fuse_group_norms(torch::jit::Graph& graph);

}  // namespace sag

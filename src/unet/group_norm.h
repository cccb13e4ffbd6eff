#pragma once

#include <cstdint>
#include <optional>

#include <torch/types.h>

namespace torch::jit {
struct Graph;
}

namespace sag {

/// Returns `at::group_norm`, followed by SiLU if wanted. Where x is a half precision CUDA tensor
/// with channels last, an own kernel computes both at once, in fp32 inside, and the result has
/// channels last: LibTorch's kernel would copy x into another layout, and the convolution behind it
/// would copy back.
torch::Tensor fused_group_norm(const torch::Tensor& x, std::int64_t groups,
                               const std::optional<torch::Tensor>& weight,
                               const std::optional<torch::Tensor>& bias, double eps, bool silu);

/// Lets every `group_norm` of a private graph, and a SiLU behind it, call the function above.
void fuse_group_norms(torch::jit::Graph& graph);

}  // namespace sag

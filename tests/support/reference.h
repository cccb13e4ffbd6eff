#pragma once

// Naive references in float64, written from the formulas: slow, and obviously right.

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include <torch/torch.h>

namespace sag::test {

/// softmax(q kᵀ · scale): head mean, query sum. q, k: [B, heads, tokens, head_dim].
inline torch::Tensor reference_attention_map(const torch::Tensor& q, const torch::Tensor& k,
                                             double scale) {
  const auto scores =
      torch::matmul(q.to(torch::kDouble), k.to(torch::kDouble).transpose(-1, -2)) * scale;
  return scores.softmax(-1).mean(1).sum(1);
}

/// Index of a reflected neighbour (the edge cell not repeated).
inline std::int64_t reflect(std::int64_t i, std::int64_t side) {
  i = std::abs(i);
  return i < side ? i : 2 * (side - 1) - i;
}

/// A full 2-D convolution with the outer product of both axes' weights.
inline torch::Tensor reference_blur(const torch::Tensor& x, std::int64_t radius, double sigma) {
  const auto source = x.to(torch::kCPU, torch::kDouble).contiguous();
  const auto h = x.size(2), w = x.size(3);
  const auto ry = std::min(radius, h - 1), rx = std::min(radius, w - 1);
  auto out = torch::zeros_like(source);
  const auto in = source.accessor<double, 4>();
  auto o = out.accessor<double, 4>();
  const auto weight = [sigma](std::int64_t t) {
    return std::exp(-0.5 * static_cast<double>(t * t) / (sigma * sigma));
  };
  double total = 0;
  for (auto dy = -ry; dy <= ry; ++dy)
    for (auto dx = -rx; dx <= rx; ++dx) total += weight(dy) * weight(dx);
  for (std::int64_t b = 0; b < x.size(0); ++b)
    for (std::int64_t c = 0; c < x.size(1); ++c)
      for (std::int64_t y = 0; y < h; ++y)
        for (std::int64_t z = 0; z < w; ++z)
          for (auto dy = -ry; dy <= ry; ++dy)
            for (auto dx = -rx; dx <= rx; ++dx)
              o[b][c][y][z] += weight(dy) * weight(dx) / total *
                               in[b][c][reflect(y + dy, h)][reflect(z + dx, w)];
  return out;
}

/// The largest absolute difference.
inline double max_diff(const torch::Tensor& a, const torch::Tensor& b) {
  return (a.to(torch::kCPU, torch::kDouble) - b.to(torch::kCPU, torch::kDouble))
      .abs()
      .max()
      .item<double>();
}

}  // namespace sag::test

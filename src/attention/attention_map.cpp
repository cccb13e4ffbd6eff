#include "sag/attention_map.h"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

namespace sag {
namespace {

// Score matrices are made in blocks of at most this size, or of one query row if that is larger.
constexpr std::int64_t kBlockBytes = 16 << 20;

void check_arguments(const torch::Tensor& q, const torch::Tensor& k, std::optional<double> scale) {
  TORCH_CHECK_VALUE(
      q.dim() == 4 && q.numel() > 0,
      "[attention_map] q must have shape [B, heads, tokens, head_dim], none of them 0, got ",
      q.sizes(), ".");
  TORCH_CHECK_VALUE(
      k.dim() == 4 && k.numel() > 0 && k.size(0) == q.size(0) && k.size(3) == q.size(3),
      "[attention_map] k must have shape [", q.size(0), ", heads, tokens, ", q.size(3),
      "] like q, none of them 0, got ", k.sizes(), ".");
  TORCH_CHECK_VALUE(q.size(1) % k.size(1) == 0, "[attention_map] k's heads must divide q's, got ",
                    k.size(1), " and ", q.size(1), ".");
  TORCH_CHECK_TYPE(q.is_floating_point() && q.scalar_type() == k.scalar_type(),
                   "[attention_map] q and k must have one floating dtype, got ", q.scalar_type(),
                   " and ", k.scalar_type(), ".");
  TORCH_CHECK_VALUE(q.device() == k.device(), "[attention_map] q and k must be on one device, got ",
                    q.device(), " and ", k.device(), ".");
  TORCH_CHECK_VALUE(!scale || std::isfinite(*scale), "[attention_map] scale must be finite, got ",
                    scale.value_or(0), ".");
}

// Repeats key heads that several query heads share.
torch::Tensor with_heads(const torch::Tensor& k, std::int64_t heads) {
  return k.size(1) == heads ? k : k.repeat_interleave(heads / k.size(1), 1);
}

// q: [images, heads, queries, head_dim] in its own dtype; k: [images, heads, keys, head_dim],
// scaled, in the dtype of the sums → [images, keys].
torch::Tensor map_of_images(const torch::Tensor& q, const torch::Tensor& k,
                            std::int64_t rows_per_block) {
  const auto keys = k.transpose(-1, -2);
  auto sums = at::zeros({q.size(0), q.size(1), k.size(2)}, k.options());
  for (std::int64_t begin = 0; begin < q.size(2); begin += rows_per_block) {
    const auto rows =
        q.narrow(2, begin, std::min(rows_per_block, q.size(2) - begin)).to(k.scalar_type());
    sums += at::matmul(rows, keys).softmax(-1).sum(2);
  }
  return sums.mean(1);
}

}  // namespace

torch::Tensor attention_map(const torch::Tensor& q, const torch::Tensor& k,
                            std::optional<double> scale) {
  check_arguments(q, k, scale);
  const torch::NoGradGuard no_grad;
  const auto dtype = q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const auto head_scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
  const auto images = q.size(0), heads = q.size(1), queries = q.size(2), tokens = k.size(2);

  const auto row_bytes = heads * tokens * static_cast<std::int64_t>(c10::elementSize(dtype));
  const auto rows_per_block = std::clamp<std::int64_t>(kBlockBytes / row_bytes, 1, queries);
  const auto images_per_block =
      std::clamp<std::int64_t>(kBlockBytes / (row_bytes * queries), 1, images);

  std::vector<torch::Tensor> maps;
  for (std::int64_t begin = 0; begin < images; begin += images_per_block) {
    const auto count = std::min(images_per_block, images - begin);
    const auto block_k = with_heads(k.narrow(0, begin, count).to(dtype) * head_scale, heads);
    maps.push_back(map_of_images(q.narrow(0, begin, count), block_k, rows_per_block));
  }
  return at::cat(maps);
}

}  // namespace sag

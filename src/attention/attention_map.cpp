#include "sag/attention_map.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#ifdef SAG_WITH_CUDA
#include "attention_map_cuda.h"
#endif

namespace sag {
namespace {

// Score matrices are made in blocks of at most this size, or of one query row if that is larger.
constexpr std::int64_t kBlockBytes = 16 << 20;
// Smaller on the CPU: small enough for the cache, large enough to keep many threads busy.
constexpr std::int64_t kCpuBlockBytes = 4 << 20;

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

// Blocks of scores and of their softmax are written here, one after the other: new memory for each
// would cost more than the arithmetic.
struct BlockBuffers {
  // [heads, rows, keys]
  torch::Tensor scores, weights;
};

// q: [heads, queries, head_dim] in its own dtype; keys: [heads, head_dim, keys], in the dtype of
// the sums → [heads, keys].
torch::Tensor column_sums_of_heads(const torch::Tensor& q, const torch::Tensor& keys, double scale,
                                   const BlockBuffers& buffers) {
  auto sums = at::zeros({keys.size(0), keys.size(2)}, keys.options());
  for (std::int64_t begin = 0; begin < q.size(1); begin += buffers.scores.size(1)) {
    const auto count = std::min(buffers.scores.size(1), q.size(1) - begin);
    const auto rows = q.narrow(1, begin, count).to(keys.scalar_type()) * scale;
    const auto block = [&](const torch::Tensor& buffer) {
      return buffer.narrow(0, 0, q.size(0)).narrow(1, 0, count);
    };
    auto scores = block(buffers.scores), weights = block(buffers.weights);
    at::bmm_out(scores, rows, keys);
    at::softmax_out(weights, scores, -1);
    sums += weights.sum(1);
  }
  return sums;
}

// In which the products and sums are made, fp32 or more. On the CPU a process may have its fp32
// products made in bf16 or TF32 (set_float32_matmul_precision), and no guard turns that off for one
// thread, but fp64 is never touched.
torch::ScalarType exact_dtype(const torch::Tensor& q) {
  if (q.scalar_type() == torch::kDouble || !q.is_cpu())
    return at::promote_types(q.scalar_type(), torch::kFloat);
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  const bool rounds =
      precision == at::Float32Precision::BF16 || precision == at::Float32Precision::TF32;
  return rounds ? torch::kDouble : torch::kFloat;
}

// On any device, whatever the layout: a block is some heads of an image or, if the scores of one
// head do not fit into a block, some query rows of one.
torch::Tensor column_sums_in_blocks(const torch::Tensor& q, const torch::Tensor& k, double scale) {
  // TF32 keeps 10 bits of a score, too few to decide a mask.
  const at::NoTF32Guard exact_fp32;
  const auto images = q.size(0), heads = q.size(1), queries = q.size(2), tokens = k.size(2);
  const auto options = q.options().dtype(exact_dtype(q));
  const auto row_bytes = tokens * static_cast<std::int64_t>(options.dtype().itemsize());
  const auto block_rows = (q.is_cpu() ? kCpuBlockBytes : kBlockBytes) / row_bytes;
  const auto heads_per_block = std::clamp<std::int64_t>(block_rows / queries, 1, heads);
  const auto rows_per_block = std::clamp<std::int64_t>(block_rows, 1, queries);
  const auto empty = [&] { return at::empty({heads_per_block, rows_per_block, tokens}, options); };
  const BlockBuffers buffers = {empty(), empty()};

  const auto all_k = with_heads(k, heads);
  auto sums = at::empty({images, heads, tokens}, options);
  for (std::int64_t image = 0; image < images; ++image)
    for (std::int64_t head = 0; head < heads; head += heads_per_block) {
      const auto part = [&](const torch::Tensor& x) {
        return x[image].narrow(0, head, std::min(heads_per_block, heads - head));
      };
      const auto keys = part(all_k).to(options.dtype()).transpose(1, 2);
      part(sums).copy_(column_sums_of_heads(part(q), keys, scale, buffers));
    }
  return sums;
}

torch::Tensor column_sums(const torch::Tensor& q, const torch::Tensor& k, double scale) {
#ifdef SAG_WITH_CUDA
  if (column_sums_cuda_takes(q, k, scale)) return column_sums_cuda(q, k, scale);
#endif
  return column_sums_in_blocks(q, k, scale);
}

}  // namespace

torch::Tensor attention_map(const torch::Tensor& q, const torch::Tensor& k,
                            std::optional<double> scale) {
  check_arguments(q, k, scale);
  // Autocast would make the products in half precision.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const torch::NoGradGuard no_grad;
  const auto head_scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
  return column_sums(q, k, head_scale)
      .mean(1)
      .to(at::promote_types(q.scalar_type(), torch::kFloat));
}

namespace {

// On the CPU a sum in another dtype would convert the whole matrix first, so take some rows at a
// time.
torch::Tensor column_sums_of_rows(const torch::Tensor& probabilities, torch::ScalarType dtype) {
  const auto images = probabilities.size(0), heads = probabilities.size(1),
             queries = probabilities.size(2), tokens = probabilities.size(3);
  const auto row_bytes = tokens * static_cast<std::int64_t>(c10::elementSize(dtype));
  const auto block_rows = std::clamp<std::int64_t>(kCpuBlockBytes / row_bytes, 1, queries);
  auto sums = at::zeros({images, heads, tokens}, probabilities.options().dtype(dtype));
  for (std::int64_t image = 0; image < images; ++image)
    for (std::int64_t head = 0; head < heads; ++head) {
      auto sum = sums[image][head];
      for (const auto& rows : probabilities[image][head].split(block_rows))
        sum += rows.sum(0, /*keepdim=*/false, dtype);
    }
  return sums;
}

// On CUDA a sum reads half precision and adds in fp32. But a sum over many rows is split over
// thread blocks, and joining them was seen to take a quarter of the probabilities' size.
torch::Tensor sum_in_blocks(const torch::Tensor& probabilities, torch::ScalarType dtype) {
  constexpr std::int64_t kRows = 128;
  torch::Tensor sums;
  for (const auto& rows : probabilities.split(kRows, 2)) {
    auto sum = rows.sum(2, /*keepdim=*/false, dtype);
    sums = sums.defined() ? sums.add_(sum) : sum;
  }
  return sums;
}

}  // namespace

torch::Tensor attention_map(const torch::Tensor& probabilities) {
  TORCH_CHECK_VALUE(
      probabilities.dim() == 4 && probabilities.numel() > 0,
      "[attention_map] probabilities must have shape [B, heads, query tokens, key tokens], none of "
      "them 0, got ",
      probabilities.sizes(), ".");
  TORCH_CHECK_TYPE(probabilities.is_floating_point(),
                   "[attention_map] probabilities must be floating, got ",
                   probabilities.scalar_type(), ".");
  const torch::NoGradGuard no_grad;
  const auto dtype = at::promote_types(probabilities.scalar_type(), torch::kFloat);
  const bool by_rows = probabilities.is_cpu() && probabilities.scalar_type() != dtype;
  return (by_rows ? column_sums_of_rows(probabilities, dtype) : sum_in_blocks(probabilities, dtype))
      .mean(1);
}

}  // namespace sag

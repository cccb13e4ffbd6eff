#pragma once

// A small network that reads its context by cross-attention alone.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/unet.h"
#include "support/toy_unet.h"

namespace sag::test {

/// How a CrossUNet computes its cross-attention.
struct CrossLayout {
  /// Heads in the rows, [rows * 2, tokens, head_dim].
  bool folded = false;
  /// Softmax and product are separate, as in unfused files.
  bool unfused = false;
  /// Runs only the first cross-attention.
  bool skips_one = false;
  /// Takes the two halves of the batch one after the other.
  bool halves = false;
  /// A mask of zeros.
  bool masked = false;
};

/// Tokens of 4 × 4 cells with one self-attention, "middle.0.0", and two cross-attentions to a
/// context of width 6, "middle.attn2" and "output.attn2", one after the other.
class CrossUNet final : public UNet {
 public:
  explicit CrossUNet(const CrossLayout& layout = {}, torch::Device device = torch::kCPU,
                     torch::ScalarType dtype = torch::kFloat)
      : layout_(layout), device_(device), dtype_(dtype) {}

  torch::Tensor forward(const UNetInput& input) const override {
    const auto pooled = torch::avg_pool2d(input.x, 4, {}, 0, true);
    auto tokens = pooled.flatten(2).transpose(1, 2);  // [rows, tokens, 4]
    tokens = tokens + joined(attention(split_heads(tokens, 2), split_heads(3 * tokens, 2),
                                       split_heads(tokens, 2), {.site = "middle.0.0"}));
    tokens = tokens + cross(tokens, input.context, "middle.attn2", .4);
    if (!layout_.skips_one) tokens = tokens + cross(tokens, input.context, "output.attn2", .9);
    const auto picture = tokens.transpose(1, 2).reshape(pooled.sizes());
    const auto up = picture.repeat_interleave(4, 2).repeat_interleave(4, 3);
    return 0.5 * input.x + 0.3 * up.narrow(2, 0, input.x.size(2)).narrow(3, 0, input.x.size(3));
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    return {{.name = "middle.0.0", .ordinal = 0}};
  }
  std::vector<AttentionSiteInfo> cross_attention_sites() const override {
    return {{.name = "middle.0.0", .path = "middle.attn2", .ordinal = 1},
            {.name = "output.3.0", .path = "output.attn2", .ordinal = 2}};
  }
  torch::Device device() const override { return device_; }
  torch::ScalarType dtype() const override { return dtype_; }

 private:
  static torch::Tensor joined(const torch::Tensor& t) { return t.transpose(1, 2).flatten(2); }
  torch::Tensor weight(torch::IntArrayRef shape, double phase) const {
    return fill(shape, 1.7, phase, 1).to(device_, dtype_);
  }

  // 2 heads of 4.
  torch::Tensor cross(const torch::Tensor& tokens, const torch::Tensor& context,
                      std::string_view site, double phase) const {
    const auto q = split_heads(tokens.matmul(weight({4, 8}, phase)), 2),
               k = split_heads(context.matmul(weight({6, 8}, phase + 1)), 2),
               v = split_heads(context.matmul(weight({6, 8}, phase + 2)), 2);
    return joined(attend(q, k, v, site)).matmul(weight({8, 4}, phase + 3));
  }
  torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                       std::string_view site) const {
    if (layout_.unfused) {
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("sag::attention_probabilities", "")
                                 .typed<at::Tensor(const at::Tensor&, const at::Tensor&,
                                                   std::string_view, std::string_view)>();
      return op.call((q.matmul(k.transpose(2, 3)) / 2).softmax(-1), v, "matmul", site);
    }
    if (layout_.folded)
      return attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), {.site = site})
          .view(q.sizes());
    if (layout_.halves) {
      const auto half = q.size(0) / 2, rest = q.size(0) - half;
      const auto part = [&](std::int64_t begin, std::int64_t count) {
        return attention(q.narrow(0, begin, count), k.narrow(0, begin, count),
                         v.narrow(0, begin, count), {.site = site});
      };
      return torch::cat({part(0, half), part(half, rest)});
    }
    AttentionOptions options{.site = site};
    if (layout_.masked) options.attn_mask = torch::zeros({1, 1, 1, k.size(2)}, q.options());
    return attention(q, k, v, options);
  }

  CrossLayout layout_;
  torch::Device device_;
  torch::ScalarType dtype_;
};

}  // namespace sag::test

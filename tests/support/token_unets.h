#pragma once

// Small networks whose attention has other tokens than the picture's, or parts of it.

#include <cstdint>
#include <string_view>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/unet.h"

namespace sag::test {

/// The tokens of a TokenUNet's attention.
struct TokenLayout {
  enum class Text { none, first, last };

  /// A class token or registers, before and after the picture's.
  std::int64_t before = 0, after = 0;
  /// Where the context's tokens are, outside of the others.
  Text text = Text::none;
  /// Whether only the picture's tokens ask.
  bool picture_queries_only = false;
  /// Whether softmax and product are separate, as in unfused files.
  bool unfused = false;
  /// How much attention the others draw, 0: (nearly) none.
  double share = 1;
};

/// A transformer in small: patches of 2 × 2 are tokens, with others beside them, in one
/// self-attention "blocks.0". All tokens look at the left half of the picture, and at the others as
/// much as at one of its tokens. The others do not change what it predicts, except for what they
/// take of the attention.
class TokenUNet final : public UNet {
 public:
  explicit TokenUNet(const TokenLayout& layout, torch::Device device = torch::kCPU,
                     torch::ScalarType dtype = torch::kFloat)
      : layout_(layout), device_(device), dtype_(dtype) {}

  torch::Tensor forward(const UNetInput& input) const override {
    const auto pooled = torch::avg_pool2d(input.x, 2, {}, 0, true);
    const auto picture = pooled.flatten(2).transpose(1, 2);  // [rows, tokens, 4]
    const auto first = others(layout_.before, TokenLayout::Text::first, input),
               last = others(layout_.after, TokenLayout::Text::last, input);
    const auto seen = torch::arange(pooled.size(3), device_) < pooled.size(3) / 2;
    const auto scores = (8.0 * seen.to(dtype_)).expand({pooled.size(2), -1}).reshape({1, -1, 1});
    const auto of_other = [&](const torch::Tensor& t) {
      return torch::full_like(t.narrow(2, 0, 1), layout_.share > 0 ? 8.0 : -80.0);
    };
    const auto score =
        torch::cat({of_other(first), scores.expand({picture.size(0), -1, -1}), of_other(last)}, 1);
    // 2 heads of 8: the score times 1.
    const auto k = heads(torch::cat({score, torch::zeros_like(score).expand({-1, -1, 7})}, 2)),
               v = heads(torch::cat({first, picture, last}, 1).repeat({1, 1, 2}));
    auto q = torch::zeros_like(k);
    q.select(3, 0).fill_(1);
    if (layout_.picture_queries_only) q = q.narrow(2, first.size(1), picture.size(1));
    auto out = attend(q, k, v).mean(1);
    if (!layout_.picture_queries_only) out = out.narrow(1, first.size(1), picture.size(1));
    const auto map = out.narrow(2, 0, 4).transpose(1, 2).reshape(pooled.sizes());
    const auto up = map.repeat_interleave(2, 2).repeat_interleave(2, 3);
    return 0.5 * input.x + 0.3 * up.narrow(2, 0, input.x.size(2)).narrow(3, 0, input.x.size(3));
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    return {{.name = "blocks.0", .ordinal = 0}};
  }
  torch::Device device() const override { return device_; }
  torch::ScalarType dtype() const override { return dtype_; }

 private:
  // [rows, tokens, 4], of which there may be none.
  torch::Tensor others(std::int64_t count, TokenLayout::Text text, const UNetInput& input) const {
    auto tokens = torch::full({input.x.size(0), count, 4}, 0.25, input.x.options());
    if (layout_.text != text) return tokens;
    return text == TokenLayout::Text::first ? torch::cat({input.context, tokens}, 1)
                                            : torch::cat({tokens, input.context}, 1);
  }
  static torch::Tensor heads(const torch::Tensor& t) {
    return t.unsqueeze(1).expand({-1, 2, -1, -1}).contiguous();
  }
  torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k,
                       const torch::Tensor& v) const {
    if (!layout_.unfused) return attention(q, k, v, {.site = "blocks.0", .scale = 1.0});
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("sag::attention_probabilities", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&,
                                                 std::string_view, std::string_view)>();
    return op.call(q.matmul(k.transpose(2, 3)).softmax(-1), v, "matmul", "blocks.0");
  }

  TokenLayout layout_;
  torch::Device device_;
  torch::ScalarType dtype_;
};

/// Attention over four windows folded into rows, [rows * 4, heads, tokens, head_dim], in
/// "middle.0.0".
class WindowUNet final : public UNet {
 public:
  explicit WindowUNet(std::int64_t heads) : heads_(heads) {}

  torch::Tensor forward(const UNetInput& input) const override {
    const auto& x = input.x;
    const auto height = x.size(2) / 2, width = x.size(3) / 2;
    const auto windows = x.unflatten(2, {2, height}).unflatten(4, {2, width});
    // [rows * 4, heads, tokens, channels of a head]
    const auto tokens = windows.permute({0, 2, 4, 3, 5, 1})
                            .reshape({x.size(0) * 4, height * width, x.size(1)})
                            .unflatten(2, {heads_, -1})
                            .transpose(1, 2);
    const auto out = attention(tokens, tokens, tokens, {.site = "middle.0.0"});
    return 0.5 * x + 0 * out.mean();
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    return {{.name = "middle.0.0", .ordinal = 0}};
  }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  std::int64_t heads_;
};

}  // namespace sag::test

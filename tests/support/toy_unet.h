#pragma once

// The toy model of golden/toy.json: attention over 8 × 8 average-pooled tokens, in closed form.

#include <atomic>

#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/conditioning.h"
#include "sag/unet.h"

namespace sag::test {

/// Element i of the tensor, in row-major order, is s·sin(a·i + b).
inline torch::Tensor fill(torch::IntArrayRef shape, double a, double b, double s) {
  const auto n = c10::multiply_integers(shape);
  return (torch::arange(n, torch::kDouble) * a + b).sin().mul(s).to(torch::kFloat).view(shape);
}

/// The tensors behind T1 and T2: [2, heads, 6, 4] from [2, 6, 8].
inline torch::Tensor split_heads(const torch::Tensor& t, std::int64_t heads) {
  return t.unflatten(-1, {heads, -1}).transpose(1, 2);
}

class ToyUNet final : public UNet {
 public:
  explicit ToyUNet(torch::Device device = torch::kCPU, torch::ScalarType dtype = torch::kFloat)
      : device_(device), dtype_(dtype) {}

  torch::Tensor forward(const UNetInput& input) const override {
    ++calls;
    rows += input.x.size(0);
    const auto pooled = torch::avg_pool2d(input.x, 8, {}, 0, true);
    const auto tokens = pooled.flatten(2).transpose(1, 2);  // [N, tokens, 4]
    const auto q = split_heads(6 * tokens, 2), k = split_heads(5 * tokens, 2),
               v = split_heads(tokens, 2);
    const auto out = attention(q, k, v, {.site = "middle.0.0"});
    const auto picture = out.transpose(1, 2).flatten(2).transpose(1, 2).reshape(pooled.sizes());
    const auto up = picture.repeat_interleave(8, 2).repeat_interleave(8, 3);
    const auto c = input.context.mean({1, 2}).view({-1, 1, 1, 1});
    return 0.5 * input.x + 0.3 * up.narrow(2, 0, input.x.size(2)).narrow(3, 0, input.x.size(3)) +
           0.1 * c;
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    return {{.name = "middle.0.0", .ordinal = 0}};
  }
  torch::Device device() const override { return device_; }
  torch::ScalarType dtype() const override { return dtype_; }

  mutable std::atomic<std::int64_t> calls = 0, rows = 0;

 private:
  torch::Device device_;
  torch::ScalarType dtype_;
};

/// The toy as an inpainting UNet: it takes the latent's four channels and any number of further
/// ones, whose mean it adds to the latent.
class ConcatUNet final : public UNet {
 public:
  explicit ConcatUNet(torch::Device device = torch::kCPU) : toy_(device) {}

  torch::Tensor forward(const UNetInput& input) const override {
    auto plain = input;
    plain.x = input.x.narrow(1, 0, 4) + input.x.narrow(1, 4, input.x.size(1) - 4).mean(1, true);
    return toy_.forward(plain);
  }
  std::vector<AttentionSiteInfo> attention_sites() const override { return toy_.attention_sites(); }
  torch::Device device() const override { return toy_.device(); }
  torch::ScalarType dtype() const override { return toy_.dtype(); }

 private:
  ToyUNet toy_;
};

/// A toy with several transformer blocks, one after the other, over 8 × 8 and 4 × 4 cells in turn.
/// Each has a self-attention, and both have the same name.
class ManySitesUNet final : public UNet {
 public:
  explicit ManySitesUNet(std::vector<std::string> sites) : sites_(std::move(sites)) {}

  torch::Tensor forward(const UNetInput& input) const override {
    auto h = input.x;
    for (std::size_t i = 0; i < sites_.size(); ++i) {
      const std::int64_t side = i % 2 == 0 ? 8 : 4;
      const auto pooled = torch::avg_pool2d(h, side);
      const auto tokens = pooled.flatten(2).transpose(1, 2);
      const auto block = [&](const torch::Tensor& t) {
        const auto out = attention(split_heads(6 * t, 2), split_heads(5 * t, 2), split_heads(t, 2),
                                   {.site = sites_[i]});
        return t + out.transpose(1, 2).flatten(2);
      };
      const auto out = transformer_block(tokens, block, sites_[i]) - tokens;
      const auto picture = out.transpose(1, 2).reshape(pooled.sizes());
      h = h + 0.3 * picture.repeat_interleave(side, 2).repeat_interleave(side, 3);
    }
    return 0.5 * h + 0.1 * input.context.mean({1, 2}).view({-1, 1, 1, 1});
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    std::vector<AttentionSiteInfo> infos;
    for (const auto& site : sites_) infos.push_back({.name = site});
    return infos;
  }
  std::vector<AttentionSiteInfo> block_sites() const override {
    std::vector<AttentionSiteInfo> infos;
    for (const auto& site : sites_) infos.push_back({.name = site, .path = site});
    return infos;
  }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  std::vector<std::string> sites_;
};

/// The toy's prompts: +1 and −1.
inline Conditioning toy_prompt(double value, torch::Device device = torch::kCPU) {
  return {.context = torch::full({1, 1, 1}, value, device)};
}

}  // namespace sag::test

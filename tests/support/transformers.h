#pragma once

// Two diffusion transformers in small, as torch::nn modules behind sag::UNet: a DiT, whose
// attention has the picture's tokens alone, and an MMDiT, whose text and picture share one
// attention, as in SD3 and Flux.

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/unet.h"

namespace sag::test {

/// What the attention of a block does with q, k and v, [rows, heads, tokens, head_dim].
using BlockAttention = std::function<torch::Tensor(const torch::Tensor& q, const torch::Tensor& k,
                                                   const torch::Tensor& v, std::int64_t block)>;

/// Where a transformer's text is. none: a DiT. first: before the picture, as in Flux; last: after
/// it, as diffusers has it for SD3.
enum class JointText { none, first, last };

constexpr std::int64_t kTransformerBlocks = 3, kTransformerPatch = 2;
/// Of the context, and of y.
constexpr std::int64_t kTextWidth = 6, kPooledWidth = 5;

namespace transformer {

constexpr std::int64_t kWidth = 16, kHeads = 2, kChannels = 4, kPatch = kTransformerPatch;

inline torch::Tensor modulated(const torch::Tensor& h, const torch::Tensor& shift,
                               const torch::Tensor& scale) {
  return torch::layer_norm(h, {kWidth}) * (1 + scale) + shift;
}

/// What a block has for one kind of tokens. All is modulated by time and y (adaLN).
struct StreamImpl : torch::nn::Module {
  StreamImpl() {
    modulation = register_module("modulation", torch::nn::Linear(kWidth, 6 * kWidth));
    qkv = register_module("qkv", torch::nn::Linear(kWidth, 3 * kWidth));
    out = register_module("out", torch::nn::Linear(kWidth, kWidth));
    up = register_module("up", torch::nn::Linear(kWidth, 2 * kWidth));
    down = register_module("down", torch::nn::Linear(2 * kWidth, kWidth));
  }

  // Shift, scale and gate of the attention, then of the MLP.
  std::vector<torch::Tensor> modulations(const torch::Tensor& condition) {
    return modulation(condition).unsqueeze(1).chunk(6, 2);
  }
  // [3, rows, heads, tokens, head_dim]
  torch::Tensor before_attention(const torch::Tensor& h, const torch::Tensor& condition) {
    const auto m = modulations(condition);
    return qkv(modulated(h, m[0], m[1])).unflatten(2, {3, kHeads, -1}).permute({2, 0, 3, 1, 4});
  }
  torch::Tensor after_attention(const torch::Tensor& h, const torch::Tensor& attended,
                                const torch::Tensor& condition) {
    const auto m = modulations(condition);
    const auto sum = h + m[2] * out(attended.transpose(1, 2).flatten(2));
    return sum + m[5] * down(torch::gelu(up(modulated(sum, m[3], m[4]))));
  }

  torch::nn::Linear modulation = nullptr, qkv = nullptr, out = nullptr, up = nullptr,
                    down = nullptr;
};
TORCH_MODULE(Stream);

struct BlockImpl : torch::nn::Module {
  BlockImpl(JointText text, std::int64_t place) : where(text), index(place) {
    picture_stream = register_module("picture", Stream());
    if (where != JointText::none) text_stream = register_module("text", Stream());
  }

  void forward(torch::Tensor& picture, torch::Tensor& text, const torch::Tensor& condition,
               const BlockAttention& attend) {
    auto joint = picture_stream->before_attention(picture, condition);
    const auto cells = picture.size(1), words = text.defined() ? text.size(1) : 0;
    if (where != JointText::none) {
      const auto of_text = text_stream->before_attention(text, condition);
      joint = where == JointText::first ? torch::cat({of_text, joint}, 3)
                                        : torch::cat({joint, of_text}, 3);
    }
    const auto attended = attend(joint[0], joint[1], joint[2], index);
    const auto first_cell = where == JointText::first ? words : 0;
    picture =
        picture_stream->after_attention(picture, attended.narrow(2, first_cell, cells), condition);
    if (where == JointText::none) return;
    const auto first_word = where == JointText::first ? 0 : cells;
    text = text_stream->after_attention(text, attended.narrow(2, first_word, words), condition);
  }

  JointText where;
  std::int64_t index;
  Stream picture_stream = nullptr, text_stream = nullptr;
};
TORCH_MODULE(Block);

// [n, 2 * frequencies.size()]
inline torch::Tensor waves(const torch::Tensor& t, const std::vector<double>& frequencies) {
  const auto phases = t.to(torch::kDouble).unsqueeze(1) *
                      torch::tensor(frequencies, t.options().dtype(torch::kDouble));
  return torch::cat({phases.sin(), phases.cos()}, 1);
}

// [rows * cols, width], in fp64.
inline torch::Tensor positions(std::int64_t rows, std::int64_t cols, torch::Device device) {
  const std::vector<double> frequencies = {1, 0.5, 0.2, 0.05};
  const auto along = [&](std::int64_t side) {
    return waves(torch::arange(side, device), frequencies);
  };
  const auto down = along(rows).unsqueeze(1).expand({rows, cols, -1}),
             right = along(cols).unsqueeze(0).expand({rows, cols, -1});
  return torch::cat({down, right}, 2).flatten(0, 1);
}

}  // namespace transformer

/// The weights are the same in every run, and whether the text is first or last.
struct TransformerImpl : torch::nn::Module {
  explicit TransformerImpl(JointText text) : where(text) {
    using transformer::kWidth, transformer::kChannels, transformer::kPatch;
    constexpr auto kCells = kChannels * kPatch * kPatch;
    patch_in = register_module("patch_in", torch::nn::Linear(kCells, kWidth));
    time_in = register_module("time_in", torch::nn::Linear(8, kWidth));
    pooled_in = register_module("pooled_in", torch::nn::Linear(kPooledWidth, kWidth));
    if (where != JointText::none)
      text_in = register_module("text_in", torch::nn::Linear(kTextWidth, kWidth));
    for (std::int64_t i = 0; i < kTransformerBlocks; ++i)
      blocks.push_back(register_module("block" + std::to_string(i), transformer::Block(where, i)));
    modulation_out = register_module("modulation_out", torch::nn::Linear(kWidth, 2 * kWidth));
    patch_out = register_module("patch_out", torch::nn::Linear(kWidth, kCells));
    torch::manual_seed(3);
    for (auto& weight : parameters()) {
      weight.set_requires_grad(false);
      const auto spread =
          weight.dim() == 2 ? 1 / std::sqrt(static_cast<double>(weight.size(1))) : 0.2;
      weight.copy_(spread * torch::randn(weight.sizes()));
    }
  }

  torch::Tensor forward(const UNetInput& input, const BlockAttention& attend) {
    const auto height = input.x.size(2), width = input.x.size(3);
    // Odd sides are filled up to whole patches.
    const auto x = torch::constant_pad_nd(input.x, {0, width % 2, 0, height % 2});
    const auto rows = x.size(2) / 2, cols = x.size(3) / 2;
    const auto patches =
        x.unflatten(2, {rows, 2}).unflatten(4, {cols, 2}).permute({0, 2, 4, 1, 3, 5});
    auto picture = patch_in(patches.flatten(1, 2).flatten(2)) +
                   transformer::positions(rows, cols, x.device()).to(x.scalar_type());
    auto text = where == JointText::none ? torch::Tensor() : text_in(input.context);
    const auto time = transformer::waves(input.timesteps, {1, 0.1, 0.01, 0.001});
    const auto condition = torch::silu(time_in(time.to(x.scalar_type())) + pooled_in(input.y));
    for (auto& block : blocks) block->forward(picture, text, condition, attend);
    const auto m = modulation_out(condition).unsqueeze(1).chunk(2, 2);
    const auto out = patch_out(transformer::modulated(picture, m[0], m[1]))
                         .unflatten(2, {transformer::kChannels, 2, 2})
                         .unflatten(1, {rows, cols})
                         .permute({0, 3, 1, 4, 2, 5})
                         .reshape_as(x);
    return out.narrow(2, 0, height).narrow(3, 0, width);
  }

  JointText where;
  torch::nn::Linear patch_in = nullptr, time_in = nullptr, pooled_in = nullptr, text_in = nullptr,
                    modulation_out = nullptr, patch_out = nullptr;
  std::vector<transformer::Block> blocks;
};
TORCH_MODULE(Transformer);

/// The name of a block's attention: diffusers' for SD3 and Flux.
inline std::string transformer_site(std::int64_t block) {
  return "transformer_blocks." + std::to_string(block) + ".attn";
}

class TransformerUNet final : public UNet {
 public:
  explicit TransformerUNet(JointText text, torch::Device device = torch::kCPU,
                           torch::ScalarType dtype = torch::kFloat)
      : net_(text), device_(device), dtype_(dtype) {
    net_->to(device, dtype);
  }

  torch::Tensor forward(const UNetInput& input) const override {
    return net_->forward(input, [](const torch::Tensor& q, const torch::Tensor& k,
                                   const torch::Tensor& v, std::int64_t block) {
      return attention(q, k, v, {.site = transformer_site(block)});
    });
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    std::vector<AttentionSiteInfo> sites;
    for (std::int64_t i = 0; i < kTransformerBlocks; ++i)
      sites.push_back({.name = transformer_site(i), .ordinal = i});
    return sites;
  }
  torch::Device device() const override { return device_; }
  torch::ScalarType dtype() const override { return dtype_; }

 private:
  mutable Transformer net_;
  torch::Device device_;
  torch::ScalarType dtype_;
};

}  // namespace sag::test

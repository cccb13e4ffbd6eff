#pragma once

// Small networks as other people build them, whose names are neither ComfyUI's nor diffusers'.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/torch.h>

#include "sag/attention.h"
#include "sag/unet.h"

namespace sag::test {

inline constexpr std::int64_t kFlowWidth = 8, kFlowContextWidth = 6;

/// Builds the TorchScript file of a flow model, forward(x, timestep, context, context_mask): 3
/// channels, timestep from 0 to 1, a bool mask over the context's tokens. The self-attentions
/// "model.down.4.1", "model.mid.1" and "model.up.3.1" work on 1/4, 1/16 and 1/4 of the picture's
/// places; a cross-attention follows each.
class FlowUNetBuilder {
 public:
  torch::jit::Module build() {
    torch::manual_seed(1);
    const auto block = [this] {
      return container({{"1", self_attention()}, {"2", cross_attention()}});
    };
    auto unet = module("FlowUNet");
    unet.register_module("model", container({{"down", container({{"4", block()}})},
                                             {"mid", block()},
                                             {"up", container({{"3", block()}})}}));
    weight(unet, "conv_in", {kFlowWidth, 3, 3, 3});
    weight(unet, "conv_out", {3, kFlowWidth, 3, 3});
    weight(unet, "time", {kFlowWidth, kFlowWidth});
    unet.register_buffer("frequencies", 1000 * torch::exp(-torch::arange(kFlowWidth)));
    unet.define(kForward);
    return unet;
  }

 private:
  torch::jit::Module module(const std::string& name) {
    torch::jit::Module owner(c10::QualifiedName("__torch__." + name), unit_, /*shouldMangle=*/true);
    owner.register_attribute("training", c10::BoolType::get(), false);
    return owner;
  }

  torch::jit::Module container(
      const std::vector<std::pair<std::string, torch::jit::Module>>& parts) {
    auto owner = module("Container");
    for (const auto& [name, part] : parts) owner.register_module(name, part);
    return owner;
  }

  static void weight(torch::jit::Module& owner, const std::string& name,
                     const std::vector<std::int64_t>& sizes) {
    owner.register_parameter(name, torch::randn(sizes) * 0.3, /*is_buffer=*/false);
  }

  torch::jit::Module self_attention() {
    auto attention = module("SelfAttention");
    weight(attention, "qkv", {3 * kFlowWidth, kFlowWidth});
    weight(attention, "out", {kFlowWidth, kFlowWidth});
    attention.define(std::string(kHeads) + R"(
def forward(self, h: Tensor) -> Tensor:
    t = torch.transpose(torch.flatten(h, 2), 1, 2)
    q, k, v = torch.chunk(torch.linear(t, self.qkv), 3, -1)
    a = torch.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v))
    return h + self.picture(a, h)
)");
    return attention;
  }

  torch::jit::Module cross_attention() {
    auto attention = module("CrossAttention");
    weight(attention, "q", {kFlowWidth, kFlowWidth});
    weight(attention, "kv", {2 * kFlowWidth, kFlowContextWidth});
    weight(attention, "out", {kFlowWidth, kFlowWidth});
    attention.define(std::string(kHeads) + R"(
def forward(self, h: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
    q = torch.linear(torch.transpose(torch.flatten(h, 2), 1, 2), self.q)
    k, v = torch.chunk(torch.linear(context, self.kv), 2, -1)
    mask = torch.reshape(context_mask, [context_mask.size(0), 1, 1, context_mask.size(1)])
    a = torch.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v), mask)
    return h + self.picture(a, h)
)");
    return attention;
  }

  static constexpr const char* kHeads = R"(
def heads(self, t: Tensor) -> Tensor:
    return torch.transpose(torch.reshape(t, [t.size(0), t.size(1), 2, t.size(2) // 2]), 1, 2)
def picture(self, a: Tensor, h: Tensor) -> Tensor:
    t = torch.linear(torch.flatten(torch.transpose(a, 1, 2), 2), self.out)
    return torch.reshape(torch.transpose(t, 1, 2), h.shape)
)";

  static constexpr const char* kForward = R"(
def forward(self, x: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
    e = torch.linear(torch.sin(torch.unsqueeze(timestep, 1) * self.frequencies), self.time)
    h = torch.conv2d(x, self.conv_in, None, [1, 1], [1, 1]) + torch.unsqueeze(torch.unsqueeze(e, 2), 3)
    down = getattr(self.model.down, "4")
    d = getattr(down, "1").forward(torch.avg_pool2d(h, [2, 2]))
    d = getattr(down, "2").forward(d, context, context_mask)
    m = getattr(self.model.mid, "1").forward(torch.avg_pool2d(d, [2, 2]))
    m = getattr(self.model.mid, "2").forward(m, context, context_mask)
    up = getattr(self.model.up, "3")
    u = getattr(up, "1").forward(d + torch.upsample_nearest2d(m, [d.size(2), d.size(3)]))
    u = getattr(up, "2").forward(u, context, context_mask)
    h = h + torch.upsample_nearest2d(u, [h.size(2), h.size(3)])
    return torch.conv2d(h, self.conv_out, None, [1, 1], [1, 1])
)";

  std::shared_ptr<torch::jit::CompilationUnit> unit_ =
      std::make_shared<torch::jit::CompilationUnit>();
};

inline torch::jit::Module make_flow_unet() {
  return FlowUNetBuilder().build();
}

/// Returns an input of the flow UNet, on `height` x `width`: the last token of the context is
/// hidden.
inline UNetInput flow_input(std::int64_t rows = 2, std::int64_t height = 8,
                            std::int64_t width = 12) {
  torch::manual_seed(2);
  auto mask = torch::ones({rows, 4}, torch::kBool);
  mask.select(1, 3).fill_(false);
  return {.x = torch::randn({rows, 3, height, width}),
          .timesteps = torch::linspace(0.1, 0.9, rows),
          .context = torch::randn({rows, 4, kFlowContextWidth}),
          .extra = {{"context_mask", mask}}};
}

inline constexpr std::int64_t kTransformerWidth = 8, kTransformerTextWidth = 5;

/// Builds the TorchScript file of a transformer, forward(x, timesteps, context): 4 channels,
/// patches of 2 × 2, and two blocks "blocks.0" and "blocks.1" of self-attention over a class token,
/// the picture's tokens and those of the text, in this order.
inline torch::jit::Module make_transformer() {
  torch::manual_seed(6);
  const auto unit = std::make_shared<torch::jit::CompilationUnit>();
  const auto module = [&](const std::string& name) {
    torch::jit::Module owner(c10::QualifiedName("__torch__." + name), unit, /*shouldMangle=*/true);
    owner.register_attribute("training", c10::BoolType::get(), false);
    return owner;
  };
  const auto weight = [](torch::jit::Module& owner, const std::string& name,
                         const std::vector<std::int64_t>& sizes) {
    owner.register_parameter(name, torch::randn(sizes) * 0.5, /*is_buffer=*/false);
  };
  auto blocks = module("Blocks");
  for (const char* name : {"0", "1"}) {
    auto block = module("Block");
    weight(block, "qkv", {3 * kTransformerWidth, kTransformerWidth});
    weight(block, "out", {kTransformerWidth, kTransformerWidth});
    block.define(R"(
def heads(self, t: Tensor) -> Tensor:
    return torch.transpose(torch.reshape(t, [t.size(0), t.size(1), 2, t.size(2) // 2]), 1, 2)
def forward(self, h: Tensor) -> Tensor:
    n = torch.layer_norm(h, [h.size(2)])
    q, k, v = torch.chunk(torch.linear(n, self.qkv), 3, -1)
    a = torch.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v))
    return h + torch.linear(torch.flatten(torch.transpose(a, 1, 2), 2), self.out)
)");
    blocks.register_module(name, block);
  }
  auto transformer = module("Transformer");
  transformer.register_module("blocks", blocks);
  weight(transformer, "patch", {kTransformerWidth, 4, 2, 2});
  weight(transformer, "text", {kTransformerWidth, kTransformerTextWidth});
  weight(transformer, "class_token", {1, 1, kTransformerWidth});
  weight(transformer, "unpatch", {kTransformerWidth, 4, 2, 2});
  transformer.define(R"(
def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    p = torch.conv2d(x, self.patch, None, [2, 2])
    picture = torch.transpose(torch.flatten(p, 2), 1, 2)
    first = self.class_token.expand(x.size(0), -1, -1) + 0.001 * torch.reshape(timesteps, [-1, 1, 1])
    h = torch.cat([first, picture, torch.linear(context, self.text)], 1)
    h = getattr(self.blocks, "0").forward(h)
    h = getattr(self.blocks, "1").forward(h)
    h = torch.slice(h, 1, 1, 1 + picture.size(1))
    return torch.conv_transpose2d(torch.reshape(torch.transpose(h, 1, 2), p.shape), self.unpatch, None, [2, 2])
)");
  return transformer;
}

/// Attention of one head over a picture's places, q, k and v from a 1 x 1 convolution.
struct PictureAttentionImpl : torch::nn::Module {
  PictureAttentionImpl(std::int64_t channels, std::string site) : site(std::move(site)) {
    qkv = register_module("qkv", torch::nn::Conv2d(channels, 3 * channels, 1));
    out = register_module("out", torch::nn::Conv2d(channels, channels, 1));
  }
  torch::Tensor forward(const torch::Tensor& h) {
    // [rows, 1 head, tokens, channels]
    const auto parts = qkv(h).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1);
    const auto a = attention(parts[0], parts[1], parts[2], {.site = site});
    return h + out(a.squeeze(1).transpose(1, 2).reshape(h.sizes()));
  }

  const std::string site;
  torch::nn::Conv2d qkv{nullptr}, out{nullptr};
};
TORCH_MODULE(PictureAttention);

/// An unconditional UNet of torch::nn, forward(x, t), one channel.
struct PictureUNetImpl : torch::nn::Module {
  static constexpr std::int64_t kWidth = 8;

  PictureUNetImpl() {
    using torch::nn::Conv2dOptions;
    conv_in = register_module("conv_in", torch::nn::Conv2d(Conv2dOptions(1, kWidth, 3).padding(1)));
    time = register_module("time", torch::nn::Linear(1, kWidth));
    down = register_module("down", PictureAttention(kWidth, "down"));
    mid_attn = register_module("mid_attn", PictureAttention(kWidth, "mid_attn"));
    up = register_module("up", PictureAttention(kWidth, "up"));
    conv_out =
        register_module("conv_out", torch::nn::Conv2d(Conv2dOptions(kWidth, 1, 3).padding(1)));
  }
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& t) {
    const auto larger = [](const torch::Tensor& h, const torch::Tensor& like) {
      return torch::upsample_nearest2d(h, like.sizes().slice(2));
    };
    const auto h = conv_in(x) + time(t.unsqueeze(1) / 1000).unsqueeze(2).unsqueeze(3);
    const auto d = down(torch::avg_pool2d(torch::silu(h), 2));
    const auto m = mid_attn(torch::avg_pool2d(torch::silu(d), 2));
    const auto u = up(d + larger(m, d));
    return conv_out(torch::silu(h + larger(u, h)));
  }

  torch::nn::Conv2d conv_in{nullptr}, conv_out{nullptr};
  torch::nn::Linear time{nullptr};
  PictureAttention down{nullptr}, mid_attn{nullptr}, up{nullptr};
};

/// What makes it a UNet of this library.
class PictureUNet final : public UNet {
 public:
  explicit PictureUNet(std::shared_ptr<PictureUNetImpl> net) : net_(std::move(net)) {
    net_->eval();
  }

  torch::Tensor forward(const UNetInput& input) const override {
    const torch::NoGradGuard no_grad;
    return net_->forward(input.x, input.timesteps);
  }
  std::vector<AttentionSiteInfo> attention_sites() const override {
    return {{.name = "down", .ordinal = 0},
            {.name = "mid_attn", .ordinal = 1},
            {.name = "up", .ordinal = 2}};
  }
  torch::Device device() const override { return net_->parameters().front().device(); }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  std::shared_ptr<PictureUNetImpl> net_;
};

/// The same network every time.
inline std::shared_ptr<PictureUNet> make_picture_unet() {
  torch::manual_seed(3);
  return std::make_shared<PictureUNet>(std::make_shared<PictureUNetImpl>());
}

}  // namespace sag::test

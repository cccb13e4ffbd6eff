#pragma once

// A small UNet-shaped TorchScript module, written in C++: LDM's names, two self-attentions and a
// cross-attention.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/torch.h>

namespace sag::test {

using torch::jit::Module;

inline constexpr std::int64_t kWidth = 8, kContextWidth = 6;

struct TorchScriptFixture {
  /// The arguments of forward.
  std::string arguments = "x: Tensor, timesteps: Tensor, context: Tensor";
  /// Statements between the input block and the output block; `t` is [rows, tokens, kWidth].
  std::string body =
      "    t = t + block(self.input_blocks).attn1.forward(t, t)\n"
      "    t = t + block(self.input_blocks).attn2.forward(t, context)\n"
      "    t = t + block(self.middle_block).attn1.forward(t, t)\n";
  /// The expression of the time embedding, [rows, kWidth].
  std::string time =
      "torch.linear(torch.sin(torch.unsqueeze(timesteps, 1) * self.frequencies), self.time)";
  /// The expression that is returned; `out` is the UNet's output.
  std::string result = "out";
  /// How an attention combines q, k and v, [rows, 2, tokens, kWidth / 2].
  std::string attention = "torch.scaled_dot_product_attention(q, k, v)";
  /// Methods of the attentions, which `attention` may call.
  std::string methods = {};
};

/// Knows "fork", which otherwise only code from archives can call.
struct ResolverWithFork : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(
      const std::string& name, torch::jit::GraphFunction& m,
      const torch::jit::SourceRange& loc) override {
    if (name == "fork") return torch::jit::SpecialFormValue::create(c10::prim::fork);
    return torch::jit::nativeResolver()->resolveValue(name, m, loc);
  }
  c10::TypePtr resolveType(const std::string&, const torch::jit::SourceRange&) override {
    return nullptr;
  }
};

/// Builds the module; the same every time.
class TorchScriptBuilder {
 public:
  explicit TorchScriptBuilder(TorchScriptFixture fixture) : fixture_(std::move(fixture)) {}

  Module build() {
    torch::manual_seed(1);
    Module unet = module("UNet");
    unet.register_module("input_blocks",
                         container({{"1", container({{"1", spatial_transformer(true)}})}}));
    unet.register_module("middle_block", container({{"1", spatial_transformer(false)}}));
    weight(unet, "conv_in", {kWidth, 4, 3, 3});
    weight(unet, "conv_out", {4, kWidth, 3, 3});
    weight(unet, "time", {kWidth, kWidth});
    unet.register_buffer("frequencies", torch::exp(-torch::arange(kWidth)));
    unet.define(forward(), std::make_shared<ResolverWithFork>());
    return unet;
  }

 private:
  Module module(const std::string& name) {
    Module owner(c10::QualifiedName("__torch__." + name), unit_, /*shouldMangle=*/true);
    owner.register_attribute("training", c10::BoolType::get(), false);
    return owner;
  }

  void weight(Module& owner, const std::string& name, std::vector<std::int64_t> sizes) {
    owner.register_parameter(name, torch::randn(sizes) * 0.3, /*is_buffer=*/false);
  }

  // All attentions of one kind are objects of one class, as torch.jit.script makes them.
  Module attention(std::int64_t context_width) {
    Module attn = module("Attention");
    for (const char* name : {"q", "out"}) weight(attn, name, {kWidth, kWidth});
    for (const char* name : {"k", "v"}) weight(attn, name, {kWidth, context_width});
    if (context_width == kWidth && self_attention_class_) {
      Module shared(unit_, self_attention_class_);
      for (const char* name : {"q", "out", "k", "v"}) shared.setattr(name, attn.attr(name));
      shared.setattr("training", false);
      return shared;
    }
    attn.define(fixture_.methods + R"(
def heads(self, t: Tensor, w: Tensor) -> Tensor:
    t = torch.linear(t, w)
    return torch.transpose(torch.reshape(t, [t.size(0), t.size(1), 2, t.size(2) // 2]), 1, 2)
def forward(self, t: Tensor, context: Tensor) -> Tensor:
    q, k, v = self.heads(t, self.q), self.heads(context, self.k), self.heads(context, self.v)
    return torch.linear(torch.flatten(torch.transpose()" +
                fixture_.attention + R"(, 1, 2), 2), self.out)
)");
    if (context_width == kWidth) self_attention_class_ = attn.type();
    return attn;
  }

  Module container(const std::vector<std::pair<std::string, Module>>& parts) {
    Module owner = module("Container");
    for (const auto& [name, part] : parts) owner.register_module(name, part);
    return owner;
  }

  Module spatial_transformer(bool with_cross_attention) {
    Module block = container({{"attn1", attention(kWidth)}});
    if (with_cross_attention) block.register_module("attn2", attention(kContextWidth));
    return container({{"transformer_blocks", container({{"0", block}})}});
  }

  // "block(self.x)" stands for the path to the transformer block inside x.
  std::string forward() const {
    std::string body = fixture_.body;
    const std::pair<std::string, std::string> blocks[] = {
        {"input_blocks", R"(getattr(getattr(self.input_blocks, "1"), "1"))"},
        {"middle_block", R"(getattr(self.middle_block, "1"))"}};
    for (const auto& [name, place] : blocks) {
      const auto call = "block(self." + name + ")";
      for (auto at = body.find(call); at != std::string::npos; at = body.find(call)) {
        body.replace(at, call.size(), "getattr(" + place + ".transformer_blocks, \"0\")");
      }
    }
    return "def forward(self, " + fixture_.arguments + R"():
    e = )" +
           fixture_.time +
           R"(
    h = torch.conv2d(x, self.conv_in, None, [1, 1], [1, 1]) + torch.unsqueeze(torch.unsqueeze(e, 2), 3)
    t = torch.transpose(torch.flatten(h, 2), 1, 2)
)" + body + R"(
    h = torch.reshape(torch.transpose(t, 1, 2), h.shape)
    out = torch.conv2d(h, self.conv_out, None, [1, 1], [1, 1])
    return )" +
           fixture_.result + "\n";
  }

  TorchScriptFixture fixture_;
  std::shared_ptr<torch::jit::CompilationUnit> unit_ =
      std::make_shared<torch::jit::CompilationUnit>();
  c10::ClassTypePtr self_attention_class_;
};

inline Module make_torchscript_unet(TorchScriptFixture fixture = {}) {
  return TorchScriptBuilder(std::move(fixture)).build();
}

}  // namespace sag::test

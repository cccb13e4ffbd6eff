// Attention over windows of the picture that are folded into rows, as HyperTile and Swin have it,
// and heads that are folded into rows, which look alike.
#include <memory>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/self_attention_guidance.h"
#include "sag/torchscript_unet.h"

namespace sag {
namespace {

// A network of one attention "attn1" whose code sees h, [rows, 8, 16, 16], and weights qkv and out.
torch::jit::Module network(const std::string& attention) {
  torch::manual_seed(8);
  const auto unit = std::make_shared<torch::jit::CompilationUnit>();
  const auto module = [&](const std::string& name) {
    torch::jit::Module owner(c10::QualifiedName("__torch__." + name), unit, /*shouldMangle=*/true);
    owner.register_attribute("training", c10::BoolType::get(), false);
    return owner;
  };
  auto layer = module("Attention");
  layer.register_parameter("qkv", torch::randn({24, 8}) * 0.5, false);
  layer.register_parameter("out", torch::randn({8, 8}) * 0.5, false);
  layer.define(R"(
def windows(self, h: Tensor) -> Tensor:
    w = torch.reshape(h, [h.size(0), 8, 2, 8, 2, 8])
    return torch.reshape(torch.permute(w, [0, 2, 4, 3, 5, 1]), [h.size(0) * 4, 64, 8])
def whole(self, w: Tensor) -> Tensor:
    w = torch.permute(torch.reshape(w, [w.size(0) // 4, 2, 2, 8, 8, 8]), [0, 5, 1, 3, 2, 4])
    return torch.reshape(w, [w.size(0), 8, 16, 16])
def pooled(self, h: Tensor) -> Tensor:
    return torch.transpose(torch.flatten(torch.avg_pool2d(h, [2, 2]), 2), 1, 2)
def grown(self, t: Tensor) -> Tensor:
    p = torch.reshape(torch.transpose(t, 1, 2), [t.size(0), 8, 8, 8])
    return torch.repeat_interleave(torch.repeat_interleave(p, 2, 2), 2, 3)
def heads_into_rows(self, t: Tensor) -> Tensor:
    t = torch.transpose(torch.reshape(t, [t.size(0), t.size(1), 4, 2]), 1, 2)
    return torch.reshape(t, [t.size(0) * 4, t.size(2), 2])
def heads_out_of_rows(self, t: Tensor) -> Tensor:
    t = torch.transpose(torch.reshape(t, [t.size(0) // 4, 4, t.size(1), 2]), 1, 2)
    return torch.reshape(t, [t.size(0), t.size(1), 8])
)");
  layer.define("\ndef forward(self, h: Tensor) -> Tensor:\n" + attention);
  auto unet = module("Net");
  unet.register_module("attn1", layer);
  unet.register_parameter("conv_in", torch::randn({8, 4, 1, 1}) * 0.5, false);
  unet.register_parameter("conv_out", torch::randn({4, 8, 1, 1}) * 0.5, false);
  unet.define(R"(
def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    h = torch.conv2d(x, self.conv_in)
    return torch.conv2d(h + self.attn1.forward(h), self.conv_out) + 0 * torch.mean(context) + 0 * torch.mean(timesteps)
)");
  return unet;
}

// Windows, then the projections: one head of its own dimension, one without, and without any
// projection of q.
constexpr const char* kWindows = R"(
    q, k, v = torch.chunk(torch.linear(self.windows(h), self.qkv), 3, -1)
)";
const std::string kFourDims = std::string(kWindows) + R"(
    a = torch.scaled_dot_product_attention(torch.unsqueeze(q, 1), torch.unsqueeze(k, 1), torch.unsqueeze(v, 1))
    return self.whole(torch.linear(torch.squeeze(a, 1), self.out))
)";
const std::string kThreeDims = std::string(kWindows) + R"(
    return self.whole(torch.linear(torch.scaled_dot_product_attention(q, k, v), self.out))
)";
const std::string kUnfused = std::string(kWindows) + R"(
    a = torch.softmax(torch.bmm(q, torch.transpose(k, 1, 2)) * 0.35, -1)
    return self.whole(torch.linear(torch.bmm(a, v), self.out))
)";
// The projections first, then windows of them.
const std::string kProjectedFirst = R"(
    t = torch.linear(torch.permute(h, [0, 2, 3, 1]), self.qkv)
    q, k, v = torch.chunk(torch.permute(t, [0, 3, 1, 2]), 3, 1)
    return self.whole(torch.scaled_dot_product_attention(self.windows(q), self.windows(k), self.windows(v)))
)";
const std::string kNotProjected = R"(
    w = self.windows(h)
    return self.whole(torch.scaled_dot_product_attention(w, w, w))
)";
// Windows in rows before the projections, and their heads in rows after them.
const std::string kWindowsAndHeads = std::string(kWindows) + R"(
    a = torch.scaled_dot_product_attention(self.heads_into_rows(q), self.heads_into_rows(k), self.heads_into_rows(v))
    return self.whole(torch.linear(self.heads_out_of_rows(a), self.out))
)";
// Four heads in rows, over the whole picture of 8 x 8.
const std::string kHeads = R"(
    q, k, v = torch.chunk(torch.linear(self.pooled(h), self.qkv), 3, -1)
    a = torch.scaled_dot_product_attention(self.heads_into_rows(q), self.heads_into_rows(k), self.heads_into_rows(v))
    return self.grown(torch.linear(self.heads_out_of_rows(a), self.out))
)";
const std::string kUnfusedHeads = R"(
    q, k, v = torch.chunk(torch.linear(self.pooled(h), self.qkv), 3, -1)
    a = torch.softmax(torch.bmm(self.heads_into_rows(q), torch.transpose(self.heads_into_rows(k), 1, 2)) * 0.7, -1)
    return self.grown(torch.linear(self.heads_out_of_rows(torch.bmm(a, self.heads_into_rows(v))), self.out))
)";
// As in guided-diffusion: 1 x 1 convolutions over the flattened picture.
const std::string kConvolvedHeads = R"(
    p = torch.flatten(torch.avg_pool2d(h, [2, 2]), 2)
    qkv = torch.transpose(torch.conv1d(p, torch.unsqueeze(self.qkv, 2)), 1, 2)
    q, k, v = torch.chunk(qkv, 3, -1)
    a = torch.scaled_dot_product_attention(self.heads_into_rows(q), self.heads_into_rows(k), self.heads_into_rows(v))
    return self.grown(self.heads_out_of_rows(a))
)";

GuiderReport guide(const std::string& attention) {
  const auto unet = TorchScriptUNet::from_module(network(attention));
  const auto model =
      apply_self_attention_guidance({unet, ModelSampling::discrete()}, {.site = "attn1"});
  torch::manual_seed(9);
  const Conditioning prompt{.context = torch::randn({1, 3, 4})};
  CfgGuider guider(model, {prompt}, {prompt}, {.cond_scale = 3});
  guider(4 * torch::randn({2, 4, 16, 16}), 4);
  return guider.report();
}

struct Case {
  const char* name;
  std::string attention;
};
class Windows : public testing::TestWithParam<Case> {};

TEST_P(Windows, FoldedIntoRowsAreNotGuided) {
  const auto report = guide(GetParam().attention);
  EXPECT_EQ(report.guided(), 0);
  EXPECT_THAT(report.skipped(),
              testing::ElementsAre(testing::Pair(testing::HasSubstr("works on windows"), 1)));
}
INSTANTIATE_TEST_SUITE_P(Of, Windows,
                         testing::Values(Case{"FourDims", kFourDims}, Case{"ThreeDims", kThreeDims},
                                         Case{"Unfused", kUnfused},
                                         Case{"ProjectedFirst", kProjectedFirst},
                                         Case{"NotProjected", kNotProjected},
                                         Case{"WithHeads", kWindowsAndHeads}),
                         [](const auto& info) { return std::string(info.param.name); });

class Heads : public testing::TestWithParam<Case> {};

TEST_P(Heads, FoldedIntoRowsAreGuided) {
  const auto report = guide(GetParam().attention);
  EXPECT_EQ(report.guided(), 1) << report.skipped().begin()->first;
}
INSTANTIATE_TEST_SUITE_P(Of, Heads,
                         testing::Values(Case{"ThreeDims", kHeads}, Case{"Unfused", kUnfusedHeads},
                                         Case{"Convolved", kConvolvedHeads}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace sag

// A UNet written in C++ (torch::nn) that hooks can reach: its attention calls sag::attention in
// place of scaled_dot_product_attention, and attention_sites() lists it. SAG and a hook of our own
// are patched on.
#include <iostream>

#include <torch/torch.h>

#include <sag/sag.h>

namespace {

struct TinyUNetImpl : torch::nn::Module {
  TinyUNetImpl() {
    namespace nn = torch::nn;
    down = register_module("down", nn::Conv2d(nn::Conv2dOptions(4, 32, 3).stride(4).padding(1)));
    qkv = register_module("qkv", nn::Linear(32, 96));
    text = register_module("text", nn::Linear(16, 32));
    up = register_module("up", nn::ConvTranspose2d(nn::ConvTranspose2dOptions(32, 4, 4).stride(4)));
  }

  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& context) {
    // [B, 32, H/4, W/4]
    const auto h = down(x) + text(context.mean(1)).unsqueeze(-1).unsqueeze(-1);
    const auto parts =
        qkv(h.flatten(2).transpose(1, 2)).unflatten(-1, {3, 4, 8}).permute({2, 0, 3, 1, 4});
    const auto out = sag::attention(parts[0], parts[1], parts[2], {.site = "middle.0.0"});
    return up(h + out.transpose(1, 2).flatten(2).transpose(1, 2).reshape_as(h));
  }

  torch::nn::Conv2d down = nullptr;
  torch::nn::Linear qkv = nullptr, text = nullptr;
  torch::nn::ConvTranspose2d up = nullptr;
};
TORCH_MODULE(TinyUNet);

class MyUNet final : public sag::UNet {
 public:
  torch::Tensor forward(const sag::UNetInput& input) const override {
    return net_->forward(input.x, input.context);
  }
  std::vector<sag::AttentionSiteInfo> attention_sites() const override {
    return {{.name = "middle.0.0"}};
  }
  torch::Device device() const override { return torch::kCPU; }
  torch::ScalarType dtype() const override { return torch::kFloat; }

 private:
  // UNet::forward is const, for one UNet may serve several threads; a torch::nn module's is not.
  mutable TinyUNet net_;
};

}  // namespace

int main() {
  torch::manual_seed(0);
  const sag::ModelPatcher model(std::make_shared<MyUNet>(), sag::ModelSampling::discrete());
  auto patched = sag::apply_self_attention_guidance(model, {.scale = 0.75});

  // A hook of our own, on the same attention: it counts the rows of each kind that pass.
  std::int64_t cond = 0, uncond = 0, extra = 0;
  patched.set_attn1_replace(
      [&](const sag::AttentionCall& call, const sag::Pass& pass, const sag::NextAttention& next) {
        for (const auto& rows : pass.groups) {
          auto& count = rows.owner != sag::Owner::main     ? extra
                        : rows.branch == sag::Branch::cond ? cond
                                                           : uncond;
          count += rows.count;
        }
        return next(call);
      },
      "middle.0.0");

  sag::CfgGuider guider(patched, {{.context = torch::randn({1, 8, 16})}},
                        {{.context = torch::zeros({1, 8, 16})}}, {.cond_scale = 4.0});
  const auto latent =
      sag::sample(guider, torch::randn({2, 4, 32, 32}), {.sampler = "heun", .steps = 10});
  std::cout << latent.sizes() << ": rows cond " << cond << ", uncond " << uncond
            << ", of SAG's own pass " << extra << "\n";
}

#include "shuffle.h"

#include <cstdint>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include "errors.h"

namespace sag_sample {
namespace {

// A random order of the tokens for each row of the pass, [rows, tokens].
torch::Tensor random_orders(const sag::Pass& pass, std::int64_t tokens, torch::Device device) {
  // The generator uses 32 bits of it; there are fewer images than the prime.
  const auto seed =
      static_cast<std::uint64_t>(pass.step_index * 1'000'003 + pass.groups.front().image);
  const auto generator = at::detail::createCPUGenerator(seed);
  return torch::rand({pass.size(), tokens}, generator).to(device).argsort(std::int64_t{1});
}

// The tokens of t, [rows, heads, tokens, head_dim] or with heads folded into rows, in their row's
// order.
torch::Tensor in_order(const torch::Tensor& t, const torch::Tensor& orders) {
  auto index = orders.repeat_interleave(t.size(0) / orders.size(0), 0).unsqueeze(-1);
  if (t.dim() == 4) index = index.unsqueeze(1);
  return t.gather(-2, index.expand_as(t));
}

}  // namespace

sag::ModelPatcher shuffle_tokens(const sag::ModelPatcher& model, const sag::AttentionSite& site) {
  auto patched = model.clone();
  // Not capturable: the orders come from the host.
  patched.set_attn1_replace(
      [](const sag::AttentionCall& call, const sag::Pass& pass, const sag::NextAttention& next) {
        if (call.probabilities.defined()) {
          throw UsageError("--sag-shuffle needs a model that calls scaled_dot_product_attention.");
        }
        if (pass.groups.empty()) return next(call);
        const auto orders = random_orders(pass, call.q.size(-2), call.q.device());
        auto shuffled = call;
        for (auto* t : {&shuffled.q, &shuffled.k, &shuffled.v}) *t = in_order(*t, orders);
        return in_order(next(shuffled), orders.argsort(std::int64_t{1}));
      },
      site);
  return patched;
}

}  // namespace sag_sample

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
  return torch::rand({pass.size(), tokens}, generator, torch::kFloat)
      .to(device)
      .argsort(std::int64_t{1});
}

// The same for all tokens of an attention: those beside the picture's stay where they are.
torch::Tensor with_others(const torch::Tensor& orders, const sag::TokenRange& picture,
                          std::int64_t tokens) {
  const auto all = torch::arange(tokens, orders.options()).expand({orders.size(0), -1});
  const auto end = picture.begin + picture.count;
  return torch::cat(
      {all.narrow(1, 0, picture.begin), orders + picture.begin, all.narrow(1, end, tokens - end)},
      1);
}

// The tokens of t, [rows, heads, tokens, head_dim] or with heads folded into rows, in their row's
// order.
torch::Tensor in_order(const torch::Tensor& t, const torch::Tensor& orders) {
  auto index = orders.repeat_interleave(t.size(0) / orders.size(0), 0).unsqueeze(-1);
  if (t.dim() == 4) index = index.unsqueeze(1);
  return t.gather(-2, index.expand_as(t));
}

}  // namespace

sag::ModelPatcher shuffle_tokens(const sag::ModelPatcher& model, const sag::AttentionSite& site,
                                 const sag::PictureTokens& where) {
  auto patched = model.clone();
  // Not capturable: the orders come from the host.
  patched.set_attn1_replace(
      [where](const sag::AttentionCall& call, const sag::Pass& pass,
              const sag::NextAttention& next) {
        if (call.probabilities.defined()) {
          throw UsageError("--sag-shuffle needs a model that calls scaled_dot_product_attention.");
        }
        if (pass.groups.empty()) return next(call);
        const auto queries = call.q.size(-2), keys = call.k.size(-2);
        const auto picture = sag::find_picture_tokens(keys, pass.height, pass.width, where);
        // SAG does not guide either, and says why.
        if (!picture || (queries != keys && queries != picture->count)) return next(call);
        const auto orders = random_orders(pass, picture->count, call.q.device());
        const auto of_keys = with_others(orders, *picture, keys);
        const auto of_queries = queries == keys ? of_keys : orders;
        auto shuffled = call;
        shuffled.q = in_order(call.q, of_queries);
        shuffled.k = in_order(call.k, of_keys);
        shuffled.v = in_order(call.v, of_keys);
        return in_order(next(shuffled), of_queries.argsort(std::int64_t{1}));
      },
      site);
  return patched;
}

}  // namespace sag_sample

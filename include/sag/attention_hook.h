#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/pass.h"

namespace sag {

/// Names one self-attention of a UNet: ComfyUI's key, a dotted module path, an ordinal, or
/// "middle", which is found.
class SAG_API AttentionSite {
 public:
  /// ComfyUI's key: block "input", "middle" or "output", the block's number, and the index of the
  /// transformer block inside it. {"middle", 0, 0} has the name "middle.0.0".
  AttentionSite(std::string block, std::int64_t number, std::int64_t transformer_index = 0);
  /// Any name that a UNet knows: "middle.0.0", "mid_block.attentions.0.transformer_blocks.0.attn1",
  /// or "#6", the attention that runs seventh. "middle" is the middle block's, in UNets of any
  /// naming (`find_middle_attention`). Throws ValueError when empty.
  AttentionSite(std::string name);
  AttentionSite(const char* name);

  const std::string& name() const { return name_; }
  bool operator==(const AttentionSite&) const = default;

 private:
  std::string name_;
};

/// One call of attention: of scaled dot-product attention, with SDPA's own arguments, or the last
/// product of attention that a model file computes step by step (`probabilities`).
struct AttentionCall {
  /// [rows, heads, tokens, head_dim], or with the heads folded into rows (`Pass::select`).
  torch::Tensor q = {}, k = {}, v = {};
  std::optional<torch::Tensor> attn_mask = {};
  double dropout_p = 0.0;
  bool is_causal = false;
  /// Nothing: 1 / sqrt(head_dim).
  std::optional<double> scale = {};
  bool enable_gqa = false;
  /// Unfused attention, softmax(…) and then a product with v: what softmax returned, [rows, heads,
  /// tokens, key tokens] or [rows * heads, tokens, key tokens], masks and all. Then q and k are
  /// undefined, v lies as the file lays it out, and the other fields mean nothing; `next`
  /// multiplies the call's probabilities by its v. Undefined: the call is SDPA.
  torch::Tensor probabilities = {};
};

/// Continues with the next hook of the site, and at the end with what the model does there.
using NextAttention = std::function<torch::Tensor(const AttentionCall&)>;

/// Replaces the attention of a site. Returns the attention's output, [rows, heads, tokens,
/// head_dim]: `next(call)` to leave it as it is, `call.v` to perturb it, and so on. The pass tells
/// which rows are which. A network may compute one attention in several calls, each with some of
/// the rows: the hook is called for each, with a pass of those rows. A hook must not keep tensors,
/// the call, the pass or `next` beyond the call unless it copies the tensors. It is copied itself:
/// state that it keeps must be shared, by reference or pointer. It may throw: the exception reaches
/// whoever evaluates the model, with its own type, and the model works afterwards.
using AttentionHook =
    std::function<torch::Tensor(const AttentionCall&, const Pass&, const NextAttention& next)>;

struct AttentionHookOptions {
  /// Whether the hook runs in this evaluation, whose sigma, step and latent size are known. Asked
  /// once before each pass, never inside it. Empty: always.
  std::function<bool(const StepContext& step)> active = {};
  /// True if the hook may run inside a captured CUDA graph: it launches the same device work for
  /// the same shapes and pass layout, reads no tensor but the call's (of a group's weight not the
  /// values: its memory changes from call to call) and those that it keeps itself, and keeps what
  /// it computes with StepContext::record. Host code of such a hook runs when a graph is captured,
  /// not when it is replayed.
  bool capturable = false;
};

/// A hook in its place.
struct InstalledHook {
  /// The UNet's own name of the site.
  std::string site;
  AttentionHook hook;
  AttentionHookOptions options;
  /// Shared by the copies of one installed hook and by no other; empty: unknown. Whoever keeps work
  /// per hook, as `CudaGraphUNet` does, tells hooks apart by it.
  std::shared_ptr<const void> identity = {};
};

/// Returns the hooks that are active in an evaluation, in their order.
SAG_API std::vector<InstalledHook> active_hooks(std::span<const InstalledHook> hooks,
                                                const StepContext& step);

}  // namespace sag

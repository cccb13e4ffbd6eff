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
/// "middle", which the library finds.
class SAG_API AttentionSite {
 public:
  /// ComfyUI's key: block "input", "middle" or "output", the block's number, and the index of the
  /// transformer block inside it. {"middle", 0, 0} has the name "middle.0.0".
  AttentionSite(const std::string& block, std::int64_t number, std::int64_t transformer_index = 0);
  /// Any name that a UNet knows: "middle.0.0", "mid_block.attentions.0.transformer_blocks.0.attn1",
  /// or "#6", the attention that runs seventh. "middle" is that of the middle block, whatever names
  /// the UNet uses (`find_middle_attention`). Throws ValueError when empty.
  AttentionSite(std::string name);
  /// The same from a literal.
  AttentionSite(const char* name);

  /// Returns the name.
  const std::string& name() const { return name_; }
  /// Compares the names.
  bool operator==(const AttentionSite&) const = default;

 private:
  std::string name_;
};

/// One call of attention: either scaled dot-product attention, with SDPA's own arguments, or the
/// last product of an attention that a model file computes step by step (`probabilities`). Also one
/// run of a transformer block (`ModelPatcher::set_block_replace`): then q is what the block was
/// given, v what it returned, both [rows, tokens, channels], `next` returns v, and the other fields
/// are unused.
struct AttentionCall {
  /// [rows, heads, tokens, head_dim], or with the heads folded into rows (`Pass::select`).
  torch::Tensor q = {};
  /// As q, with the key tokens.
  torch::Tensor k = {};
  /// As k.
  torch::Tensor v = {};
  /// SDPA's mask, boolean or added; nothing: none.
  std::optional<torch::Tensor> attn_mask = {};
  /// SDPA's dropout, in training.
  double dropout_p = 0.0;
  /// Whether a token sees only itself and those before it.
  bool is_causal = false;
  /// Unset: 1 / sqrt(head_dim).
  std::optional<double> scale = {};
  /// Whether k and v may have fewer heads than q.
  bool enable_gqa = false;
  /// For unfused attention, softmax(…) and then a product with v: what softmax returned, with masks
  /// applied, [rows, heads, tokens, key tokens] or [rows * heads, tokens, key tokens]. Then q and k
  /// are undefined, v has the layout of the file, and the other fields are unused; `next`
  /// multiplies the call's probabilities by its v. Undefined: the call is SDPA.
  torch::Tensor probabilities = {};
};

/// Runs the next hook of the site or, after the last one, what the model does there.
using NextAttention = std::function<torch::Tensor(const AttentionCall&)>;

/// Replaces the attention of a site. Returns the attention's output, [rows, heads, tokens,
/// head_dim]: `next(call)` to leave it as it is, `call.v` to perturb it, and so on. The pass tells
/// which rows are which. A network may compute one attention in several calls, each with some of
/// the rows: the hook is called for each, with a pass of those rows. A hook must not keep the call,
/// the pass or `next` after the call; tensors it must copy to keep. Hooks are copied, so state that
/// a hook keeps must be shared, by reference or pointer. A hook may throw: the exception reaches
/// the code that evaluates the model, with its own type, and the model works afterwards.
using AttentionHook =
    std::function<torch::Tensor(const AttentionCall&, const Pass&, const NextAttention& next)>;

/// When and where a hook may run.
struct AttentionHookOptions {
  /// Returns whether the hook runs in this evaluation. Its sigma, step and latent size are known.
  /// Called once before each pass, never inside it. Empty: the hook always runs.
  std::function<bool(const StepContext& step)> active = {};
  /// True if the hook may run inside a captured CUDA graph: it launches the same device work for
  /// the same shapes and pass layout, reads only the call's tensors and its own (but not the values
  /// of a group's weight, whose memory changes from call to call), and keeps what it computes with
  /// StepContext::record. Host code of such a hook runs when a graph is captured, not when it is
  /// replayed.
  bool capturable = false;
};

/// A hook and the site that it is set on.
struct InstalledHook {
  /// The UNet's own name of the site.
  std::string site;
  /// What runs there.
  AttentionHook hook;
  /// When it runs.
  AttentionHookOptions options;
  /// Shared by the copies of one installed hook and by no other; empty: unknown. Code that keeps
  /// work per hook, such as `CudaGraphUNet`, tells hooks apart by it.
  std::shared_ptr<const void> identity = {};
};

/// Returns the hooks that are active in an evaluation, in their order.
SAG_API std::vector<InstalledHook> active_hooks(std::span<const InstalledHook> hooks,
                                                const StepContext& step);

}  // namespace sag

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/pass.h"

namespace c10 {
class DebugInfoGuard;
}

namespace sag {

struct AttentionScopeState;

/// Names one self-attention of a UNet: ComfyUI's key, a dotted module path, or an ordinal.
class SAG_API AttentionSite {
 public:
  /// ComfyUI's key: block "input", "middle" or "output", the block's number, and the index of the
  /// transformer block inside it. {"middle", 0, 0} has the name "middle.0.0".
  AttentionSite(std::string block, std::int64_t number, std::int64_t transformer_index = 0);
  /// Any name a UNet knows: "middle.0.0", "mid_block.attentions.0.transformer_blocks.0.attn1", or
  /// "#6", the attention that runs seventh. Throws ValueError when empty.
  explicit AttentionSite(std::string name);

  const std::string& name() const { return name_; }
  bool operator==(const AttentionSite&) const = default;

 private:
  std::string name_;
};

/// One call of attention: of scaled dot-product attention, with SDPA's own arguments, or the last
/// product of attention that a model file computes step by step (`probabilities`).
struct AttentionCall {
  torch::Tensor
      q = {},
      k = {},
      v = {};  ///< [rows, heads, tokens, head_dim] (or heads folded into rows: Pass::select)
  std::optional<torch::Tensor> attn_mask = {};
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = {};  ///< nothing: 1 / sqrt(head_dim)
  bool enable_gqa = false;
  /// Unfused attention, softmax(…) and then a product with v: what softmax returned, [rows, heads,
  /// tokens, key tokens] or [rows * heads, tokens, key tokens], masks and all. Then q and k are
  /// undefined, v lies as the file lays it out, and the other fields say nothing; `next` multiplies
  /// the call's probabilities by its v. Undefined: the call is SDPA.
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
  std::string site;  ///< the UNet's own name of the site
  AttentionHook hook;
  AttentionHookOptions options;
  /// Shared by the copies of one installed hook and by no other; empty: unknown. Whoever keeps work
  /// per hook, as `CudaGraphUNet` does, tells hooks apart by it.
  std::shared_ptr<const void> identity = {};
};

/// Returns the hooks that are active in an evaluation, in their order.
SAG_API std::vector<InstalledHook> active_hooks(std::span<const InstalledHook> hooks,
                                                const StepContext& step);

/// While it lives, calls of `sag::attention` on this thread, and on those to which LibTorch hands
/// its tasks (at::launch; not a std::thread), run the hooks of their site: installed first is
/// outermost. Scopes nest; the innermost counts. Without a scope `sag::attention` is plain SDPA.
///
/// The calls of a site must bring each row of the pass once: all in one call (heads may be folded
/// into rows), or some in each, [rows, heads, tokens, head_dim], in order and one call after the
/// other. Hooks then see a pass of the call's rows. A call that fits neither gets a pass without
/// groups.
class SAG_API AttentionScope {
 public:
  /// `hooks` must be active (see `active_hooks`); `pass.step` must not be null.
  AttentionScope(std::vector<InstalledHook> hooks, Pass pass);
  ~AttentionScope();
  AttentionScope(const AttentionScope&) = delete;
  AttentionScope& operator=(const AttentionScope&) = delete;

  /// Ends the pass: whoever owns the scope calls this after the UNet returned, or threw. Rethrows
  /// what a hook threw: its exception cannot travel through an interpreter without losing its type,
  /// so the op keeps it and runs plain attention. Otherwise gives what hooks recorded to
  /// `pass.step`. Where the calls of a site did not bring each row once, as when heads are split
  /// over calls, the records of that site are dropped and `StepContext::skipped` says why.
  void finish() const;

  /// Returns the sites that have a hook in the innermost scope of this thread, in the order in
  /// which they were hooked. A UNet that rewrites its graph looks here.
  static std::vector<std::string> hooked_sites();
  /// Returns the hooks of the innermost scope of this thread; none without a scope.
  static std::span<const InstalledHook> hooks();
  /// Returns the pass of the innermost scope of this thread, or null.
  static const Pass* pass();

 private:
  std::shared_ptr<AttentionScopeState> state_;
  std::unique_ptr<c10::DebugInfoGuard> guard_;
};

struct AttentionOptions {
  /// The name of this attention, as `UNet::attention_sites` lists it.
  std::string_view site = {};
  std::optional<torch::Tensor> attn_mask = {};
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = {};
  bool enable_gqa = false;
};

/// Scaled dot-product attention that can be hooked. A UNet written in C++ calls it in place of
/// `at::scaled_dot_product_attention`; without a scope it is that function, to the bit.
/// q: [rows, heads, tokens, head_dim]; k, v: [rows, heads, key tokens, head_dim].
/// TorchScript and AOTInductor models reach the same code as the op `sag::attention`.
SAG_API torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k,
                                const torch::Tensor& v, const AttentionOptions& options);

/// Makes sure that the ops `sag::attention` and `sag::attention_probabilities` are registered.
/// Called by everything that loads models; a program that links the static library and loads models
/// itself calls it once.
SAG_API void ensure_ops_registered();

}  // namespace sag

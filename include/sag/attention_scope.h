#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/attention_hook.h"
#include "sag/export.h"
#include "sag/pass.h"

namespace c10 {
class DebugInfoGuard;
}

namespace sag {

struct AttentionScopeState;

/// While it exists, calls of `sag::attention` on this thread, and on threads that run LibTorch's
/// tasks (at::launch; not a std::thread), run the hooks of their site; the first installed is
/// outermost. Scopes nest, and only the innermost has an effect. Without a scope `sag::attention`
/// is plain SDPA.
///
/// The calls of a site must cover each row of the pass once: all rows in one call (heads may be
/// folded into rows), or some rows in each call, [rows, heads, tokens, head_dim], in order and one
/// call after the other. Hooks then see a pass of the call's rows. In any other case the call gets
/// a pass without groups.
class SAG_API AttentionScope {
 public:
  /// `hooks` must be active (see `active_hooks`); `pass.step` must not be null.
  AttentionScope(std::vector<InstalledHook> hooks, Pass pass);
  ~AttentionScope();
  AttentionScope(const AttentionScope&) = delete;
  AttentionScope& operator=(const AttentionScope&) = delete;

  /// Returns the sites that have a hook in the innermost scope of this thread, in the order in
  /// which they were hooked. UNets that rewrite their graph use it.
  static std::vector<std::string> hooked_sites();
  /// Returns the hooks of the innermost scope of this thread; none without a scope.
  static std::span<const InstalledHook> hooks();
  /// Returns the pass of the innermost scope of this thread, or null.
  static const Pass* pass();

 private:
  friend torch::Tensor run_hooked(std::vector<InstalledHook> hooks, Pass pass,
                                  const std::function<torch::Tensor()>& call);
  // Ends the pass: rethrows what a hook threw, or gives what hooks recorded to `pass.step`.
  void finish() const;

  std::shared_ptr<AttentionScopeState> state_;
  std::unique_ptr<c10::DebugInfoGuard> guard_;
};

/// Runs `call`, one call of a UNet, in a scope with these hooks and this pass, ends the pass and
/// returns what `call` returned. What hooks recorded is in `pass.step` afterwards. If the calls of
/// a site did not cover each row once, for example because heads are split over calls, the records
/// of that site are dropped and `StepContext::skipped` says why.
///
/// Rethrows what a hook threw, even if `call` did not throw or threw something else: an interpreter
/// would change the type of a hook's exception, so the op keeps it and continues with plain
/// attention. Throws ValueError when `pass.step` is null.
SAG_API torch::Tensor run_hooked(std::vector<InstalledHook> hooks, Pass pass,
                                 const std::function<torch::Tensor()>& call);

}  // namespace sag

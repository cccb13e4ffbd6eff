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

  /// Returns the sites that have a hook in the innermost scope of this thread, in the order in
  /// which they were hooked. A UNet that rewrites its graph looks here.
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
/// returns what `call` returned. What hooks recorded is in `pass.step` afterwards. Where the calls
/// of a site did not bring each row once, as when heads are split over calls, the records of that
/// site are dropped and `StepContext::skipped` says why.
///
/// Rethrows what a hook threw, even where `call` did not throw or threw something else: an
/// interpreter would change the type of a hook's exception, so the op keeps it and goes on with
/// plain attention. Throws ValueError when `pass.step` is null.
SAG_API torch::Tensor run_hooked(std::vector<InstalledHook> hooks, Pass pass,
                                 const std::function<torch::Tensor()>& call);

}  // namespace sag

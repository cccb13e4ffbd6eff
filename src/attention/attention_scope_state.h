#pragma once

#include <exception>
#include <mutex>
#include <string_view>
#include <vector>

#include <c10/util/ThreadLocalDebugInfo.h>

#include "sag/attention.h"

namespace sag {

/// What an AttentionScope puts into the thread's debug-info slot. LibTorch carries that slot to the
/// threads it forks, which a plain thread_local does not reach.
struct AttentionScopeState final : c10::DebugInfoBase {
  std::vector<InstalledHook> hooks;
  Pass pass;

  /// Keeps the first exception of a hook.
  void fail(std::exception_ptr error);
  std::exception_ptr error() const;

 private:
  mutable std::mutex mutex_;
  std::exception_ptr error_;
};

/// Returns the innermost scope's state on this thread, or null.
AttentionScopeState* current_attention_scope();

/// Runs the site's hooks in `scope`, or plain SDPA if it has none.
torch::Tensor run_hooks(const AttentionScopeState& scope, std::string_view site,
                        const AttentionCall& call);

/// Runs `at::scaled_dot_product_attention`.
torch::Tensor plain_attention(const AttentionCall& call);

}  // namespace sag

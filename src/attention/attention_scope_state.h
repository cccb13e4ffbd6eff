#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include <c10/util/ThreadLocalDebugInfo.h>

#include "sag/attention_hook.h"
#include "sag/step_context.h"

namespace sag {

/// The rows that the calls of one site had in a pass so far.
struct SiteCalls {
  explicit SiteCalls(const StepContext& step);

  /// Calls with every row of the pass.
  std::int64_t whole = 0;
  /// Rows of the other calls.
  std::int64_t rows = 0;
  bool has_unknown_rows = false;
  /// Whether a call worked on windows of the picture, folded into rows.
  bool has_windows = false;
  /// The rows of the layer's input, and the places of a row; 0: not known.
  std::int64_t layer_rows = 0, layer_places = 0;
  /// What hooks recorded in this pass, until it is known whether it is valid.
  StepContext records;
};

/// What an AttentionScope puts into the thread's debug-info slot. LibTorch passes that slot on to
/// the threads that it forks; a plain thread_local would not reach them.
struct AttentionScopeState final : c10::DebugInfoBase {
  std::vector<InstalledHook> hooks;
  Pass pass;

  /// Says what the layer of the next call of `site` is applied to. `channels`: its dimension.
  void enter_layer(std::string_view site, c10::IntArrayRef input, std::int64_t channels);
  /// Returns the pass of the next call of `site`, whose q or probabilities have this shape.
  Pass enter(std::string_view site, c10::IntArrayRef shape);
  /// Gives what hooks recorded to `pass.step`, except at sites whose calls do not add up.
  void finish();

  /// Keeps the first exception of a hook.
  void fail(std::exception_ptr error);
  std::exception_ptr error() const;

 private:
  SiteCalls& calls_of(std::string_view site);

  mutable std::mutex mutex_;
  std::exception_ptr error_;
  std::map<std::string, SiteCalls, std::less<>> sites_;
};

/// Returns the innermost scope's state on this thread, or null.
AttentionScopeState* current_attention_scope();

/// Runs the site's hooks in `scope`, or `plain` if it has none. Throws ValueError unless they
/// return `shape`.
torch::Tensor run_hooks(AttentionScopeState& scope, std::string_view site,
                        const AttentionCall& call, const NextAttention& plain,
                        c10::IntArrayRef shape);

/// Runs `at::scaled_dot_product_attention`.
torch::Tensor plain_attention(const AttentionCall& call);

/// Returns what the block returned, in a call that is a run of a transformer block.
torch::Tensor returned_by_block(const AttentionCall& call);

/// Returns what hooks call the transformer block with this path: no attention has such a name.
std::string key_of_block(std::string_view path);

/// Returns the shape of what `plain_attention` returns.
std::vector<std::int64_t> attention_shape(const AttentionCall& call);

/// Multiplies probabilities by values as `product` says: "matmul" and "bmm", values on the right;
/// "matmul_transposed", values · probabilitiesᵀ; or an einsum equation.
torch::Tensor multiply_probabilities(const torch::Tensor& probabilities, const torch::Tensor& value,
                                     std::string_view product);

}  // namespace sag

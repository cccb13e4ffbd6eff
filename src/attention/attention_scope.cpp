#include "sag/attention_scope.h"

#include <algorithm>
#include <utility>

#include <ATen/autocast_mode.h>

#include "attention_scope_state.h"

namespace sag {

SiteCalls::SiteCalls(const StepContext& step)
    : records(step.sigma(), step.step_index(), step.height(), step.width()) {}

SiteCalls& AttentionScopeState::calls_of(std::string_view site) {
  return sites_.try_emplace(std::string(site), *pass.step).first->second;
}

void AttentionScopeState::enter_layer(std::string_view site, c10::IntArrayRef input,
                                      std::int64_t channels) {
  const std::lock_guard lock(mutex_);
  auto& calls = calls_of(site);
  const auto dims = static_cast<std::int64_t>(input.size());
  const bool known = dims >= 3 && c10::multiply_integers(input) > 0;
  const auto dim = channels < 0 ? dims + channels : channels;
  calls.layer_rows = known ? input[0] : 0;
  calls.layer_places = known ? c10::multiply_integers(input.slice(1)) / input[dim] : 0;
}

namespace {

// Whether q's first dimension holds windows, where it could also hold heads. Heads have all places
// of the layer's input as tokens, windows a part of them: the layer's input then is in windows
// already, and q may hold their heads as well, or it has as many places as the windows of a row
// together.
bool are_windows(const SiteCalls& calls, std::int64_t rows, std::int64_t per_row,
                 std::int64_t tokens) {
  const bool layer_has_windows = calls.layer_rows > rows && calls.layer_rows % rows == 0;
  return (layer_has_windows && calls.layer_places == tokens) ||
         (calls.layer_rows == rows && calls.layer_places == per_row * tokens);
}

}  // namespace

Pass AttentionScopeState::enter(std::string_view site, c10::IntArrayRef shape) {
  const std::lock_guard lock(mutex_);
  auto& calls = calls_of(site);
  auto of_call = pass;
  const auto size = pass.size(), rows = shape.front();
  // Otherwise a few rows could just as well be a few heads of one row.
  const bool heads_are_apart = shape.size() == 4 && shape[1] > 1;
  if (size == 0 || rows == size || (rows % size == 0 && !heads_are_apart)) {
    ++calls.whole;
    const auto tokens = shape[shape.size() - 2];
    if (size > 0 && rows > size && are_windows(calls, size, rows / size, tokens))
      calls.has_windows = true;
  } else if (heads_are_apart && calls.rows + rows <= size) {
    of_call = pass.part(calls.rows, rows);
    calls.rows += rows;
  } else {
    of_call.groups.clear();
    calls.has_unknown_rows = true;
  }
  of_call.step = &calls.records;
  return of_call;
}

namespace {

// Returns why the maps of a site's calls cannot be used, or an empty string. Calls with some of the
// heads, folded into rows or not, have more rows than the pass, or the same rows again.
std::string fault_of(const SiteCalls& calls, std::int64_t size) {
  // Only the layer's input is known.
  if (calls.whole == 0 && calls.rows == 0 && !calls.has_unknown_rows) return {};
  if (calls.has_windows)
    return "the attention of the site works on windows of the picture, folded into rows";
  if (size == 0 || (calls.whole == 1 && calls.rows == 0 && !calls.has_unknown_rows)) return {};
  if (calls.whole == 0 && calls.rows == size && !calls.has_unknown_rows) return {};
  if (calls.whole == 0 && !calls.has_unknown_rows)
    return c10::str("the attention of the site ran for ", calls.rows, " of the pass's ", size,
                    " rows");
  return "the attention of the site ran in several calls that are not parts of the batch";
}

}  // namespace

void AttentionScopeState::finish() {
  const std::lock_guard lock(mutex_);
  for (const auto& [site, calls] : sites_)
    pass.step->take(calls.records, fault_of(calls, pass.size()));
  sites_.clear();
}

void AttentionScopeState::fail(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  if (!error_) error_ = std::move(error);
}

std::exception_ptr AttentionScopeState::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

AttentionScopeState* current_attention_scope() {
  // The slot may hold an entry of another library.
  return dynamic_cast<AttentionScopeState*>(
      c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::INFERENCE_CONTEXT));
}

AttentionScope::AttentionScope(std::vector<InstalledHook> hooks, Pass pass)
    : state_(std::make_shared<AttentionScopeState>()) {
  TORCH_CHECK_VALUE(pass.step != nullptr, "[AttentionScope] pass.step must not be null.");
  state_->hooks = std::move(hooks);
  state_->pass = std::move(pass);
  guard_ = std::make_unique<c10::DebugInfoGuard>(c10::DebugInfoKind::INFERENCE_CONTEXT, state_);
}

AttentionScope::~AttentionScope() = default;

void AttentionScope::finish() const {
  if (const auto error = state_->error()) std::rethrow_exception(error);
  state_->finish();
}

torch::Tensor run_hooked(std::vector<InstalledHook> hooks, Pass pass,
                         const std::function<torch::Tensor()>& call) {
  const AttentionScope scope(std::move(hooks), std::move(pass));
  torch::Tensor out;
  try {
    out = call();
  } catch (...) {
    // If a hook threw, that is the cause of what the UNet threw.
    scope.finish();
    throw;
  }
  scope.finish();
  return out;
}

std::vector<std::string> AttentionScope::hooked_sites() {
  std::vector<std::string> sites;
  for (const auto& hook : hooks())
    if (std::find(sites.begin(), sites.end(), hook.site) == sites.end()) sites.push_back(hook.site);
  return sites;
}

std::span<const InstalledHook> AttentionScope::hooks() {
  const auto* scope = current_attention_scope();
  return scope ? std::span<const InstalledHook>(scope->hooks) : std::span<const InstalledHook>();
}

const Pass* AttentionScope::pass() {
  const auto* scope = current_attention_scope();
  return scope ? &scope->pass : nullptr;
}

namespace {

torch::Tensor run_chain(const Pass& pass, std::span<const InstalledHook* const> chain,
                        const AttentionCall& call, const NextAttention& plain) {
  if (chain.empty()) return plain(call);
  const auto next = [&pass, &plain, rest = chain.subspan(1)](const AttentionCall& changed) {
    return run_chain(pass, rest, changed, plain);
  };
  return chain.front()->hook(call, pass, next);
}

}  // namespace

torch::Tensor run_hooks(AttentionScopeState& scope, std::string_view site,
                        const AttentionCall& call, const NextAttention& plain,
                        c10::IntArrayRef shape) {
  std::vector<const InstalledHook*> chain;
  for (const auto& hook : scope.hooks)
    if (hook.site == site) chain.push_back(&hook);
  const auto& first = call.probabilities.defined() ? call.probabilities : call.q;
  // An empty call is a part beyond the end of the batch.
  if (chain.empty() || first.numel() == 0) return plain(call);
  const auto pass = scope.enter(site, first.sizes());
  auto out = run_chain(pass, chain, call, plain);
  TORCH_CHECK_VALUE(out.defined() && out.sizes() == shape, "[attention] the hooks of site \"", site,
                    "\" must return the attention's shape, ", shape, ", got ",
                    out.defined() ? c10::str(out.sizes()) : "an undefined tensor", ".");
  // Under autocast, autocast decides the dtype of attention.
  const bool fits = out.device() == call.v.device() && out.layout() == call.v.layout() &&
                    (out.scalar_type() == call.v.scalar_type() ||
                     at::autocast::is_autocast_enabled(call.v.device().type()));
  TORCH_CHECK_TYPE(fits, "[attention] the hooks of site \"", site,
                   "\" must return a tensor like v, ", call.v.toString(), " on ", call.v.device(),
                   ", got ", out.toString(), " on ", out.device(), ".");
  return out;
}

}  // namespace sag

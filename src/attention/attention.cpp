#include "sag/attention.h"

#include <algorithm>
#include <utility>

#include <ATen/ops/scaled_dot_product_attention.h>

#include "attention_scope_state.h"

namespace sag {

AttentionSite::AttentionSite(std::string block, std::int64_t number, std::int64_t transformer_index)
    : AttentionSite(c10::str(block, ".", number, ".", transformer_index)) {
  TORCH_CHECK_VALUE(!block.empty() && number >= 0 && transformer_index >= 0,
                    "[AttentionSite] block must not be empty and both numbers at least 0, got \"",
                    name_, "\".");
}

AttentionSite::AttentionSite(std::string name) : name_(std::move(name)) {
  TORCH_CHECK_VALUE(!name_.empty(), "[AttentionSite] name must not be empty.");
}

std::vector<InstalledHook> active_hooks(std::span<const InstalledHook> hooks,
                                        const StepContext& step) {
  std::vector<InstalledHook> active;
  for (const auto& hook : hooks)
    if (!hook.options.active || hook.options.active(step)) active.push_back(hook);
  return active;
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
  // Somebody else's entry may sit in the slot.
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

void AttentionScope::rethrow_if_failed() const {
  if (const auto error = state_->error()) std::rethrow_exception(error);
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

torch::Tensor plain_attention(const AttentionCall& call) {
  return at::scaled_dot_product_attention(call.q, call.k, call.v, call.attn_mask, call.dropout_p,
                                          call.is_causal, call.scale, call.enable_gqa);
}

namespace {

torch::Tensor run_chain(const AttentionScopeState& scope,
                        std::span<const InstalledHook* const> chain, const AttentionCall& call) {
  if (chain.empty()) return plain_attention(call);
  const auto next = [&scope, rest = chain.subspan(1)](const AttentionCall& changed) {
    return run_chain(scope, rest, changed);
  };
  return chain.front()->hook(call, scope.pass, next);
}

}  // namespace

torch::Tensor run_hooks(const AttentionScopeState& scope, std::string_view site,
                        const AttentionCall& call) {
  std::vector<const InstalledHook*> chain;
  for (const auto& hook : scope.hooks)
    if (hook.site == site) chain.push_back(&hook);
  auto out = run_chain(scope, chain, call);
  TORCH_CHECK_VALUE(
      out.defined() && out.dim() == call.q.dim() &&
          out.sizes().slice(0, out.dim() - 1) == call.q.sizes().slice(0, call.q.dim() - 1) &&
          out.size(-1) == call.v.size(-1),
      "[attention] the hooks of site \"", site,
      "\" must return the shape of q with v's last size, ", "q ", call.q.sizes(), " and v ",
      call.v.sizes(), ", got ", out.defined() ? c10::str(out.sizes()) : "an undefined tensor", ".");
  return out;
}

torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionOptions& options) {
  const auto mask =
      options.attn_mask && options.attn_mask->defined() ? options.attn_mask : std::nullopt;
  const AttentionCall call{
      q, k, v, mask, options.dropout_p, options.is_causal, options.scale, options.enable_gqa};
  const auto* scope = current_attention_scope();
  return scope ? run_hooks(*scope, options.site, call) : plain_attention(call);
}

}  // namespace sag

#include "sag/attention_hook.h"

#include <utility>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace sag {

AttentionSite::AttentionSite(const std::string& block, std::int64_t number,
                             std::int64_t transformer_index)
    : AttentionSite(c10::str(block, ".", number, ".", transformer_index)) {
  TORCH_CHECK_VALUE(!block.empty() && number >= 0 && transformer_index >= 0,
                    "[AttentionSite] block must not be empty and both numbers at least 0, got \"",
                    name_, "\".");
}

AttentionSite::AttentionSite(std::string name) : name_(std::move(name)) {
  TORCH_CHECK_VALUE(!name_.empty(), "[AttentionSite] name must not be empty.");
}

AttentionSite::AttentionSite(const char* name) : AttentionSite(std::string(name)) {}

std::vector<InstalledHook> active_hooks(std::span<const InstalledHook> hooks,
                                        const StepContext& step) {
  std::vector<InstalledHook> active;
  for (const auto& hook : hooks)
    if (!hook.options.active || hook.options.active(step)) active.push_back(hook);
  return active;
}

}  // namespace sag

#include "open_site.h"

#include <algorithm>

namespace sag {

bool has_open_site(const ModelPatcher& model, const StepContext& step) {
  const auto hooks = active_hooks(model.attention_hooks(), step);
  return std::any_of(hooks.begin(), hooks.end(),
                     [](const InstalledHook& hook) { return hook.site.empty(); });
}

}  // namespace sag

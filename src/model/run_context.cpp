#include "sag/run_context.h"

#include <algorithm>
#include <utility>

namespace sag {

void RunContext::keep(const Owner& owner, std::int64_t step_index, torch::Tensor value) {
  const auto own = [&](const Kept& kept) { return kept.owner == owner; };
  // A value further ahead than samplers look is from an earlier run.
  std::erase_if(kept_, [&](const Kept& kept) {
    return own(kept) && (kept.step_index == step_index || kept.step_index > step_index + 2);
  });
  kept_.push_back({owner, step_index, std::move(value)});
  if (std::count_if(kept_.begin(), kept_.end(), own) > 3)
    kept_.erase(std::min_element(kept_.begin(), kept_.end(), [&](const Kept& a, const Kept& b) {
      return own(a) && (!own(b) || a.step_index < b.step_index);
    }));
}

torch::Tensor RunContext::latest_before(const Owner& owner, std::int64_t step_index) const {
  const Kept* latest = nullptr;
  for (const auto& kept : kept_)
    if (kept.owner == owner && kept.step_index < step_index &&
        (!latest || kept.step_index > latest->step_index))
      latest = &kept;
  return latest ? latest->value : torch::Tensor();
}

}  // namespace sag

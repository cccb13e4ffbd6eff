#pragma once

#include <cstdint>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/pass.h"

namespace sag {

/// What guidances keep from step to step within one run (one `CfgGuider`). Keyed by step, not by
/// evaluation: Heun and others evaluate a step twice.
class SAG_API RunContext {
 public:
  /// Keeps `value` for the guidance `owner`, made in step `step_index`. It replaces what that step
  /// kept. Three steps are kept, because samplers look up to two ahead. Values of steps still
  /// further ahead are dropped: a sampling loop may have started again without calling
  /// `CfgGuider::begin_run`.
  void keep(const Owner& owner, std::int64_t step_index, torch::Tensor value);
  /// Returns the value of the latest step before `step_index`; undefined if there is none.
  torch::Tensor latest_before(const Owner& owner, std::int64_t step_index) const;

 private:
  struct Kept {
    Owner owner;
    std::int64_t step_index;
    torch::Tensor value;
  };
  std::vector<Kept> kept_;
};

}  // namespace sag

#include "kept_before.h"

#include <ATen/ATen.h>

namespace sag {

torch::Tensor kept_before(const Owner& owner, const PostCfgArgs& args) {
  const auto kept = args.run.latest_before(owner, args.step.step_index());
  if (!kept.defined() || kept.sizes() != args.denoised.sizes()) return {};
  return kept.to(args.denoised.scalar_type());
}

}  // namespace sag

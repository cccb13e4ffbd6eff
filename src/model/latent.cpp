#include "latent.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace sag {

std::string shape_text(const torch::Tensor& t) {
  return t.defined() ? c10::str(t.sizes()) : "an undefined tensor";
}

void check_latent(const torch::Tensor& t, const char* name, const char* caller) {
  TORCH_CHECK_VALUE(t.defined() && t.dim() == 4 && t.numel() > 0, "[", caller, "] ", name,
                    " must have shape [images, channels, height, width], none of them 0, got ",
                    shape_text(t), ".");
  TORCH_CHECK_TYPE(t.is_floating_point(), "[", caller, "] ", name, " must be floating, got ",
                   t.scalar_type(), ".");
}

void check_returns_shape(const torch::Tensor& t, const torch::Tensor& x, const char* what,
                         const char* caller) {
  TORCH_CHECK_VALUE(t.defined() && t.sizes() == x.sizes(), "[", caller, "] ", what,
                    " must return the shape of x, ", x.sizes(), ", got ", shape_text(t), ".");
}

torch::Tensor at_least_fp32(const torch::Tensor& t) {
  return t.to(at::promote_types(t.scalar_type(), torch::kFloat));
}

}  // namespace sag

#include "conditioning_checks.h"

#include <cmath>
#include <string>

#include <c10/util/StringUtil.h>

namespace sag {
namespace {

void check_rows(const torch::Tensor& t, std::int64_t images, const char* what, const char* caller) {
  TORCH_CHECK_VALUE(
      t.dim() >= 1 && (t.size(0) == 1 || t.size(0) == images), "[", caller, "] ", what,
      images == 1 ? " must have 1 row" : c10::str(" must have 1 or ", images, " rows"),
      ", got shape ", t.sizes(), ".");
}

void check_mask(const torch::Tensor& mask, std::int64_t images, std::int64_t height,
                std::int64_t width, const char* caller) {
  TORCH_CHECK_TYPE(mask.is_floating_point(), "[", caller, "] mask must be floating, got ",
                   mask.scalar_type(), ".");
  const bool fits =
      (mask.dim() == 2 || mask.dim() == 3) && mask.size(-2) == height && mask.size(-1) == width;
  TORCH_CHECK_VALUE(fits, "[", caller, "] mask must have the latent's size, [", height, ", ", width,
                    "] or [images, ", height, ", ", width, "], got shape ", mask.sizes(), ".");
  if (mask.dim() == 3) check_rows(mask, images, "mask", caller);
}

void check_area(const Area& area, std::int64_t height, std::int64_t width, const char* caller) {
  TORCH_CHECK_VALUE(area.height > 0 && area.width > 0 && area.y >= 0 && area.x >= 0, "[", caller,
                    "] area must have positive sides and start at 0 or after, got ", area.height,
                    " x ", area.width, " at (", area.y, ", ", area.x, ").");
  TORCH_CHECK_VALUE(area.y < height && area.x < width, "[", caller,
                    "] area must touch the latent of ", height, " x ", width, ", got ", area.height,
                    " x ", area.width, " at (", area.y, ", ", area.x, ").");
}

void check_context(const torch::Tensor& context, const char* caller) {
  TORCH_CHECK_VALUE(context.dim() == 3 && context.size(1) > 0, "[", caller,
                    "] context must have shape [rows, tokens, width], got ", context.sizes(), ".");
  TORCH_CHECK_TYPE(context.is_floating_point(), "[", caller, "] context must be floating, got ",
                   context.scalar_type(), ".");
}

void check_parts(const Conditioning& cond, const char* caller) {
  std::int64_t sum = 0;
  for (const auto tokens : cond.context_parts) {
    TORCH_CHECK_VALUE(tokens > 0, "[", caller, "] context_parts must be greater than 0, got ",
                      tokens, ".");
    sum += tokens;
  }
  const auto tokens = cond.context.defined() ? cond.context.size(1) : 0;
  TORCH_CHECK_VALUE(cond.context_parts.empty() || sum == tokens, "[", caller,
                    "] context_parts must add up to the context's tokens, ", tokens, ", got ", sum,
                    ".");
}

void check_y(const torch::Tensor& y, const char* caller) {
  TORCH_CHECK_VALUE(y.dim() == 2, "[", caller, "] y must have shape [rows, features], got ",
                    y.sizes(), ".");
}

void check_concat(const torch::Tensor& concat, const char* caller) {
  TORCH_CHECK_VALUE(concat.dim() == 4 && concat.size(1) > 0, "[", caller,
                    "] concat must have shape [rows, channels, height, width], got ",
                    concat.sizes(), ".");
  TORCH_CHECK_TYPE(concat.is_floating_point(), "[", caller, "] concat must be floating, got ",
                   concat.scalar_type(), ".");
}

void check_finite(const torch::Tensor& t, const char* what, const char* caller) {
  if (!t.defined() || !t.is_floating_point()) return;
  TORCH_CHECK_VALUE(t.isfinite().all().item<bool>(), "[", caller, "] ", what,
                    " must be finite, got NaN or infinity.");
}

std::string extra_name(const std::string& name) {
  return "extra input \"" + name + "\"";
}

}  // namespace

Conditioning to_device(Conditioning cond, torch::Device device) {
  const auto move = [device](torch::Tensor& t) {
    if (t.defined()) t = t.to(device);
  };
  move(cond.context);
  move(cond.y);
  move(cond.concat);
  move(cond.mask);
  for (auto& [name, tensor] : cond.extra) move(tensor);
  return cond;
}

bool is_in_window(double sigma, double sigma_start, double sigma_end) {
  return sigma_end <= sigma * (1 + kSigmaTolerance) && sigma * (1 - kSigmaTolerance) <= sigma_start;
}

bool is_active(const Conditioning& cond, double sigma) {
  return is_in_window(sigma, cond.sigma_start, cond.sigma_end);
}

void check_conditioning(const Conditioning& cond, std::int64_t images, std::int64_t height,
                        std::int64_t width, const char* caller) {
  if (cond.context.defined()) {
    check_context(cond.context, caller);
    check_rows(cond.context, images, "context", caller);
  }
  check_parts(cond, caller);
  if (cond.y.defined()) {
    check_y(cond.y, caller);
    check_rows(cond.y, images, "y", caller);
  }
  if (cond.concat.defined()) {
    check_concat(cond.concat, caller);
    check_rows(cond.concat, images, "concat", caller);
    TORCH_CHECK_VALUE(cond.concat.size(2) == height && cond.concat.size(3) == width, "[", caller,
                      "] concat must have the latent's height and width, ", height, " x ", width,
                      ", got shape ", cond.concat.sizes(), ".");
  }
  for (const auto& [name, tensor] : cond.extra) {
    TORCH_CHECK_VALUE(tensor.defined(), "[", caller, "] ", extra_name(name), " must be a tensor.");
    check_rows(tensor, images, extra_name(name).c_str(), caller);
  }
  TORCH_CHECK_VALUE(std::isfinite(cond.strength), "[", caller, "] strength must be finite, got ",
                    cond.strength, ".");
  TORCH_CHECK_VALUE(cond.sigma_end <= cond.sigma_start, "[", caller,
                    "] sigma_end must be at most sigma_start, got ", cond.sigma_end, " and ",
                    cond.sigma_start, ".");
  if (cond.area) check_area(*cond.area, height, width, caller);
  if (cond.mask.defined()) check_mask(cond.mask, images, height, width, caller);
}

void check_conditioning_values(const Conditioning& cond, const char* caller) {
  if (cond.context.defined()) check_context(cond.context, caller);
  if (cond.y.defined()) check_y(cond.y, caller);
  if (cond.concat.defined()) check_concat(cond.concat, caller);
  check_finite(cond.context, "context", caller);
  check_finite(cond.y, "y", caller);
  check_finite(cond.concat, "concat", caller);
  for (const auto& [name, tensor] : cond.extra)
    check_finite(tensor, extra_name(name).c_str(), caller);
  if (!cond.mask.defined() || cond.mask.numel() == 0) return;
  TORCH_CHECK_TYPE(cond.mask.is_floating_point(), "[", caller, "] mask must be floating, got ",
                   cond.mask.scalar_type(), ".");
  check_finite(cond.mask, "mask", caller);
  const auto least = cond.mask.min().item<double>(), most = cond.mask.max().item<double>();
  TORCH_CHECK_VALUE(least >= 0 && most <= 1, "[", caller, "] mask must be between 0 and 1, got ",
                    least, " to ", most, ".");
}

}  // namespace sag

#include "sag/denoiser.h"

#include <cmath>
#include <utility>

#include <ATen/ATen.h>

#include "conditioning_checks.h"
#include "latent.h"

namespace sag {
namespace {

// Prepares a conditioning tensor for the UNet: one row per row of x, floating ones in the UNet's
// dtype.
torch::Tensor to_rows(const torch::Tensor& t, std::int64_t rows, const UNet& unet) {
  if (!t.defined()) return t;
  const auto moved = t.to(unet.device(), t.is_floating_point() ? unet.dtype() : t.scalar_type());
  if (moved.size(0) == rows) return moved;
  auto sizes = moved.sizes().vec();
  sizes[0] = rows;
  return moved.expand(sizes);
}

// A device without a number ("cuda") means any of its kind.
bool is_on(const torch::Tensor& t, torch::Device device) {
  return t.device().type() == device.type() &&
         (!device.has_index() || t.device().index() == device.index());
}

// ComfyUI: `apply_model` appends c_concat to x after it was scaled.
torch::Tensor with_concat(const torch::Tensor& x, const torch::Tensor& concat, const UNet& unet) {
  return concat.defined() ? at::cat({x, to_rows(concat, x.size(0), unet)}, 1) : x;
}

void check_x(const torch::Tensor& x, double sigma, const UNet& unet) {
  check_latent(x, "x", "Denoiser");
  TORCH_CHECK_VALUE(is_on(x, unet.device()), "[Denoiser] x must be on the UNet's device ",
                    unet.device(), ", got ", x.device(), ".");
  TORCH_CHECK_VALUE(std::isfinite(sigma) && sigma > 0,
                    "[Denoiser] sigma must be finite and > 0, got ", sigma, ".");
}

}  // namespace

Denoiser::Denoiser(std::shared_ptr<const UNet> unet, ModelSampling sampling)
    : unet_(std::move(unet)), sampling_(std::move(sampling)) {
  TORCH_CHECK_VALUE(unet_, "[Denoiser] unet must not be null.");
}

UNetInput Denoiser::unet_input(const torch::Tensor& x, double sigma,
                               const Conditioning& cond) const {
  check_x(x, sigma, *unet_);
  const auto rows = x.size(0);
  check_conditioning(cond, rows, x.size(2), x.size(3), "Denoiser");

  const auto wide = at_least_fp32(x);
  auto scaled = sampling_.calculate_input(sigma, wide).to(unet_->dtype());
  // A network may write into its input.
  if (scaled.is_alias_of(x)) scaled = scaled.clone();
  UNetInput input{.x = with_concat(scaled, cond.concat, *unet_),
                  .timesteps = torch::full({rows}, sampling_.timestep(sigma),
                                           wide.options().dtype(torch::kFloat)),
                  .context = to_rows(cond.context, rows, *unet_),
                  .y = to_rows(cond.y, rows, *unet_)};
  for (const auto& [name, tensor] : cond.extra) input.extra[name] = to_rows(tensor, rows, *unet_);
  return input;
}

torch::Tensor Denoiser::operator()(const torch::Tensor& x, double sigma,
                                   const Conditioning& cond) const {
  const auto output = unet_->forward(unet_input(x, sigma, cond));
  check_returns_shape(output, x, "the UNet", "Denoiser");
  const auto wide = at_least_fp32(x);
  return sampling_.calculate_denoised(sigma, output.to(wide.scalar_type()), wide);
}

}  // namespace sag

#include "sag/inpaint.h"

#include <utility>

#include <ATen/ExpandUtils.h>

namespace sag {

DenoiseFunction inpaint_model(DenoiseFunction model, const ModelSampling& sampling,
                              const torch::Tensor& latent, const torch::Tensor& noise,
                              const torch::Tensor& mask) {
  TORCH_CHECK_VALUE(model, "[inpaint_model] model must not be empty.");
  TORCH_CHECK_VALUE(latent.defined() && noise.defined() && mask.defined(),
                    "[inpaint_model] latent, noise and mask must be defined.");
  TORCH_CHECK_TYPE(latent.is_floating_point() && noise.is_floating_point(),
                   "[inpaint_model] latent and noise must be floating, got ", latent.scalar_type(),
                   " and ", noise.scalar_type(), ".");
  TORCH_CHECK_TYPE(mask.is_floating_point() || mask.scalar_type() == torch::kBool,
                   "[inpaint_model] mask must be floating or bool, got ", mask.scalar_type(), ".");
  TORCH_CHECK_VALUE(latent.dim() == 4 && latent.sizes() == noise.sizes(),
                    "[inpaint_model] latent and noise must both be [images, channels, height, "
                    "width], got ",
                    latent.sizes(), " and ", noise.sizes(), ".");
  TORCH_CHECK_VALUE(at::is_expandable_to(mask.sizes(), latent.sizes()),
                    "[inpaint_model] mask must be broadcastable to ", latent.sizes(), ", got ",
                    mask.sizes(), ".");

  const auto repaint = mask.to(latent.scalar_type());
  const auto keep = 1 - repaint;
  return [=, model = std::move(model)](const torch::Tensor& x, double sigma) -> Denoised {
    TORCH_CHECK_VALUE(x.sizes() == latent.sizes(),
                      "[inpaint_model] x must have the shape of latent, ", latent.sizes(), ", got ",
                      x.sizes(), ".");
    const auto known = sampling.noise_scaling(sigma, noise, latent);
    const auto [denoised, uncond_denoised] = model(x * repaint + known * keep, sigma);
    return {denoised * repaint + latent * keep, uncond_denoised};
  };
}

}  // namespace sag

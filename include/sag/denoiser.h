#pragma once

#include <memory>

#include <torch/types.h>

#include "sag/conditioning.h"
#include "sag/export.h"
#include "sag/model_sampling.h"
#include "sag/unet.h"

namespace sag {

/// A UNet with its sampling constants: turns a noisy latent into a prediction of the clean one.
/// k-diffusion: `external.py`; ComfyUI: `BaseModel.apply_model`.
class SAG_API Denoiser {
 public:
  /// Throws ValueError when `unet` is null.
  Denoiser(std::shared_ptr<const UNet> unet, ModelSampling sampling);

  /// Returns the denoised latent, the shape of x, fp32 (fp64 for fp64 x), from one UNet call.
  /// x: [rows, channels, height, width], floating, on the UNet's device. Of `cond` it uses only the
  /// tensors for the UNet (context, y, concat, extra); `calc_cond_batch` handles strength, area,
  /// mask and range. Throws ValueError or TypeError on other shapes, dtypes and devices, and if
  /// sigma is not finite or <= 0.
  torch::Tensor operator()(const torch::Tensor& x, double sigma, const Conditioning& cond) const;

  /// Returns what the UNet is called with for these arguments. Throws like operator().
  UNetInput unet_input(const torch::Tensor& x, double sigma, const Conditioning& cond) const;

  /// Returns the network.
  const UNet& unet() const { return *unet_; }
  /// Returns its sampling constants.
  const ModelSampling& model_sampling() const { return sampling_; }

 private:
  std::shared_ptr<const UNet> unet_;
  ModelSampling sampling_;
};

}  // namespace sag

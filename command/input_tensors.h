#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <torch/types.h>

#include "settings.h"

namespace sag_sample {

/// The tensors that the user gives, fp32 on the CPU; undefined where none is given.
struct InputTensors {
  torch::Tensor cond, uncond, cond_y, uncond_y;
  torch::Tensor noise, latent, mask, inpaint_noise, concat;
  /// --image, [1, 3, height, width] in [−1, 1], and --mask as a picture, [1, 1, height, width] in
  /// 0 … 1.
  torch::Tensor picture, mask_picture;
};

/// Returns pictures [images, 3, height, width] in [−1, 1] as the model's clean latents, fp32 on the
/// CPU. Throws UsageError when the model cannot encode them.
torch::Tensor encode_picture(const torch::Tensor& picture, const Network& network,
                             torch::Device device);

/// Reads the tensors; `latent` is what --latent holds, or what the model makes of --image, and
/// `mask` what --mask holds, or its picture with a pixel per latent cell. Throws UsageError.
InputTensors read_input_tensors(const PictureOptions& options, const FurtherOptions& further,
                                const Network& network, torch::Device device);

/// Returns the size of all latents, which the given ones decide, or else the network. Throws
/// UsageError when it does not fit the network.
LatentSize latent_size(const InputTensors& tensors, const PictureOptions& options,
                       const Network& network);

/// Returns how many pictures the tensors stand for: the noise tells, or else whatever comes in
/// rows. Throws UsageError when --batch says something else.
std::int64_t count_images(const InputTensors& tensors, const PictureOptions& options);

/// Throws UsageError when the tensors do not fit so many images of this size.
void check_sizes(const InputTensors& tensors, const PictureOptions& options, const LatentSize& size,
                 std::int64_t images);

/// Reads the noise levels of --sigmas. Throws UsageError.
std::vector<double> read_sigmas(const std::string& where);

}  // namespace sag_sample

#pragma once

#include <torch/types.h>

#include "input_tensors.h"
#include "inputs.h"
#include "settings.h"

namespace sag_sample {

// What networks take beside the latent, text and sizes: a picture to repaint or to edit, a class,
// an embedded scale of guidance.

/// Throws UsageError unless the options give what the network takes, and nothing that it does not.
void check_further_inputs(const Settings& settings);

/// Returns whether the picture, and not the user's tensor, fills the network's further channels.
bool sees_picture(const Settings& settings);

/// Returns whether the run starts from the picture. One that the network sees is its start only if
/// --denoise or --mask keep something of it.
bool starts_from_picture(const Settings& settings);

/// Returns whether the sampler blends what is not repainted. Inpainting networks are trained to
/// keep it, and diffusers' pipeline leaves it to them.
bool blends_mask(const Settings& settings);

/// Returns the network's further channels, [1 or images, channels, height, width], for latents of
/// this size; undefined: it has none. Throws UsageError when they do not fit.
torch::Tensor further_channels(const InputTensors& tensors, const Settings& settings,
                               const LatentSize& size, torch::Device device);

/// Gives every conditioning of the batch what the network takes. `channels`: of the batch's
/// pictures, on the device.
void add_further_inputs(Batch& batch, const torch::Tensor& channels, const Settings& settings);

}  // namespace sag_sample

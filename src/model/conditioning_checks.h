#pragma once

#include <cstdint>

#include <torch/types.h>

#include "sag/conditioning.h"

// What denoiser, guider and guidances require of conditionings and windows.

namespace sag {

/// Returns the conditioning with every tensor on `device`.
Conditioning to_device(Conditioning cond, torch::Device device);

/// Sigmas that differ by less, relative to each other, are the same for windows and steps: samplers
/// compute them again, and the references do so in fp32.
inline constexpr double kSigmaTolerance = 1e-6;

/// Returns whether sigma_end <= sigma <= sigma_start.
bool is_in_window(double sigma, double sigma_start, double sigma_end);

/// Returns whether the conditioning is active at `sigma`. ComfyUI: `get_area_and_mult`.
bool is_active(const Conditioning& cond, double sigma);

/// Throws ValueError, IndexError or TypeError, naming `caller`, unless the conditioning fits a
/// latent of `images` × `height` × `width`: dimensions and first sizes of its tensors, floating
/// dtypes, a mask of the latent's size, an area that touches the latent, a finite strength,
/// sigma_end <= sigma_start. Reads no values from the device.
void check_conditioning(const Conditioning& cond, std::int64_t images, std::int64_t height,
                        std::int64_t width, const char* caller);

/// Throws ValueError or TypeError, naming `caller`, when a tensor of the conditioning holds NaN or
/// infinity, when the mask holds a value outside 0 … 1, or when context, y or concat have the wrong
/// number of dimensions. Waits for the device, so call it before the first step.
void check_conditioning_values(const Conditioning& cond, const char* caller);

}  // namespace sag

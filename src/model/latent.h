#pragma once

#include <string>

#include <torch/types.h>

// What every room requires of a latent. sampling/ may include it too.

namespace sag {

/// Returns the tensor's sizes for a message, or "an undefined tensor".
std::string shape_text(const torch::Tensor& t);

/// Throws ValueError or TypeError, naming `caller`, unless `t` is a floating tensor of shape
/// [images, channels, height, width], none of them 0.
void check_latent(const torch::Tensor& t, const char* name, const char* caller);

/// Throws ValueError, naming `caller`, unless `t` has the shape of `x`: "[caller] what must return
/// the shape of x, …".
void check_returns_shape(const torch::Tensor& t, const torch::Tensor& x, const char* what,
                         const char* caller);

/// Returns the tensor in fp32 at least. Half precision is for the network; sums of large and small
/// numbers need more.
torch::Tensor at_least_fp32(const torch::Tensor& t);

}  // namespace sag

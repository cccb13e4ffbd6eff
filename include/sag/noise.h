#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

/// Returns unit Gaussian noise for a sampler's step from sigma to sigma_next, in the shape of the
/// latent.
using NoiseSampler = std::function<torch::Tensor(double sigma, double sigma_next)>;

/// Unit Gaussian noise that depends only on seeds: drawn on the CPU in fp32, one generator per
/// image, so it is the same on every device, and an image does not depend on the rest of its batch.
/// An image's first draw is what PyTorch's `torch.manual_seed(seed); torch.randn(image_shape)`
/// gives on the CPU.
class SAG_API SeededNoise {
 public:
  /// One seed per image. Throws ValueError when there are no seeds.
  explicit SeededNoise(std::span<const std::uint64_t> seeds);
  ~SeededNoise();
  /// Moves the generators, with their state.
  SeededNoise(SeededNoise&&) noexcept;
  /// Moves the generators, with their state.
  SeededNoise& operator=(SeededNoise&&) noexcept;

  /// Returns the number of images, one per seed.
  std::int64_t images() const;

  /// Draws the next noise, [seeds, image_shape…] fp32 on `device`. The first draw is the start
  /// noise; later ones are unrelated to it.
  torch::Tensor draw(torch::IntArrayRef image_shape, torch::Device device);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Returns a noise sampler that keeps drawing from `noise`, for latents of the shape, dtype and
/// device of x. `noise` is shared, not copied. Throws ValueError unless x has one image per seed.
SAG_API NoiseSampler seeded_noise_sampler(std::shared_ptr<SeededNoise> noise,
                                          const torch::Tensor& x);

/// Returns a noise sampler that follows one Brownian path W per image: (W(sigma) − W(sigma_next)) /
/// √|sigma − sigma_next|. The path depends only on the seed and sigma_max, so a run with more steps
/// sees the same noise in finer detail, down to steps of 1e-4 of sigma (narrower ones share theirs,
/// and get less of it). Drawn on the CPU in fp32, the same on every device. For latents of the
/// shape, dtype and device of x, and sigmas in [0, sigma_max]. Throws ValueError unless x has one
/// image per seed and sigma_max is finite and positive; the sampler throws ValueError on other
/// sigmas. k-diffusion: `BrownianTreeNoiseSampler`.
SAG_API NoiseSampler brownian_noise_sampler(std::span<const std::uint64_t> seeds,
                                            const torch::Tensor& x, double sigma_max);

}  // namespace sag

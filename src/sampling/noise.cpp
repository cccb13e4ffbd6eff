#include "sag/noise.h"

#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>

namespace sag {

struct SeededNoise::State {
  std::vector<at::Generator> generators;
};

SeededNoise::SeededNoise(std::span<const std::uint64_t> seeds) : state_(std::make_unique<State>()) {
  TORCH_CHECK_VALUE(!seeds.empty(), "[SeededNoise] seeds must not be empty.");
  state_->generators.reserve(seeds.size());
  for (const auto seed : seeds) {
    state_->generators.push_back(at::detail::createCPUGenerator(seed));
  }
}

SeededNoise::~SeededNoise() = default;
SeededNoise::SeededNoise(SeededNoise&&) noexcept = default;
SeededNoise& SeededNoise::operator=(SeededNoise&&) noexcept = default;

std::int64_t SeededNoise::images() const {
  return static_cast<std::int64_t>(state_->generators.size());
}

torch::Tensor SeededNoise::draw(torch::IntArrayRef image_shape, torch::Device device) {
  std::vector<std::int64_t> shape = {images()};
  shape.insert(shape.end(), image_shape.begin(), image_shape.end());
  // Pinned, so that the copy to a GPU does not make the host wait for the device.
  const bool pinned = device.is_cuda();
  auto noise = torch::empty(
      shape, torch::TensorOptions(torch::kCPU).dtype(torch::kFloat32).pinned_memory(pinned));
  for (std::int64_t i = 0; i < images(); ++i) {
    noise[i].normal_(0.0, 1.0, state_->generators[static_cast<std::size_t>(i)]);
  }
  return noise.to(device, /*non_blocking=*/pinned);
}

NoiseSampler seeded_noise_sampler(std::shared_ptr<SeededNoise> noise, const torch::Tensor& x) {
  TORCH_CHECK_VALUE(noise != nullptr, "[seeded_noise_sampler] noise must not be null.");
  TORCH_CHECK_VALUE(x.defined() && x.dim() >= 1 && x.size(0) == noise->images(),
                    "[seeded_noise_sampler] x must have one image per seed, ", noise->images(),
                    ", got ", x.defined() ? c10::str(x.sizes()) : "an undefined tensor", ".");
  return [noise = std::move(noise), image_shape = x.sizes().slice(1).vec(), options = x.options()](
             double, double) {
    return noise->draw(image_shape, options.device()).to(options.dtype());
  };
}

}  // namespace sag

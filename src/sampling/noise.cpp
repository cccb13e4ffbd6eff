#include "sag/noise.h"

#include <cmath>
#include <deque>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>

namespace sag {

namespace {

// From pinned memory, so that the host does not wait for the device.
torch::Tensor to_device(const torch::Tensor& noise, torch::Device device) {
  return device.is_cuda() ? noise.pin_memory().to(device, /*non_blocking=*/true) : noise;
}

}  // namespace

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
  auto noise =
      torch::empty(shape, torch::TensorOptions(torch::kFloat32).pinned_memory(device.is_cuda()));
  for (std::int64_t i = 0; i < images(); ++i) {
    noise[i].normal_(0.0, 1.0, state_->generators[static_cast<std::size_t>(i)]);
  }
  return to_device(noise, device);
}

namespace {

void check_images(const torch::Tensor& x, std::int64_t images, const char* caller) {
  TORCH_CHECK_VALUE(x.defined() && x.dim() >= 1 && x.size(0) == images, "[", caller,
                    "] x must have one image per seed, ", images, ", got ",
                    x.defined() ? c10::str(x.sizes()) : "an undefined tensor", ".");
}

}  // namespace

NoiseSampler seeded_noise_sampler(std::shared_ptr<SeededNoise> noise, const torch::Tensor& x) {
  TORCH_CHECK_VALUE(noise != nullptr, "[seeded_noise_sampler] noise must not be null.");
  check_images(x, noise->images(), "seeded_noise_sampler");
  return [noise = std::move(noise), image_shape = x.sizes().slice(1).vec(), options = x.options()](
             double, double) {
    return noise->draw(image_shape, options.device()).to(options.dtype());
  };
}

namespace {

// Spreads all bits of a number over all bits of the result. Steele et al. 2014: SplitMix64.
std::uint64_t scramble(std::uint64_t z) {
  z += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// A Brownian path for every cell of every image, known at any time without a record of it: [0, end]
// is halved again and again, and each middle is the mean of its neighbours plus noise that depends
// only on the seed and the place in the tree.
class BrownianPath {
 public:
  BrownianPath(std::span<const std::uint64_t> seeds, torch::IntArrayRef image_shape, double end)
      : seeds_(seeds.begin(), seeds.end()), shape_(image_shape.vec()), end_(end) {
    shape_.insert(shape_.begin(), static_cast<std::int64_t>(seeds_.size()));
  }

  // W(time), fp32 on the CPU.
  torch::Tensor at(double time) {
    for (const auto& [known_time, value] : known_)
      if (known_time == time) return value;
    known_.emplace_front(time, descend(time));
    // A step asks for at most three.
    if (known_.size() > 4) known_.pop_back();
    return known_.front().second;
  }

 private:
  torch::Tensor descend(double time) const {
    double left = 0, right = end_;
    auto w_left = torch::zeros(shape_, torch::kFloat), w_right = draw(0) * std::sqrt(end_);
    for (std::uint64_t node = 1;;) {
      if (time == left) return w_left;
      if (time == right) return w_right;
      // Steps are wider than this, relative to their time; closer ones would share their noise.
      const bool last = right - left <= 1e-4 * time;
      const double middle = last ? time : (left + right) / 2;
      const double share = (middle - left) / (right - left);
      const auto w_middle =
          w_left + (w_right - w_left) * share + draw(node) * std::sqrt(share * (right - middle));
      if (last) return w_middle;
      const bool go_right = time >= middle;
      (go_right ? left : right) = middle;
      (go_right ? w_left : w_right) = w_middle;
      node = scramble(2 * node + (go_right ? 1 : 0));
    }
  }

  // Unit noise of a place in the tree.
  torch::Tensor draw(std::uint64_t node) const {
    auto noise = torch::empty(shape_, torch::kFloat);
    for (std::size_t i = 0; i < seeds_.size(); ++i) {
      auto generator = at::detail::createCPUGenerator(scramble(scramble(seeds_[i]) ^ node));
      noise[static_cast<std::int64_t>(i)].normal_(0.0, 1.0, generator);
    }
    return noise;
  }

  std::vector<std::uint64_t> seeds_;
  std::vector<std::int64_t> shape_;
  double end_;
  std::deque<std::pair<double, torch::Tensor>> known_;
};

}  // namespace

NoiseSampler brownian_noise_sampler(std::span<const std::uint64_t> seeds, const torch::Tensor& x,
                                    double sigma_max) {
  TORCH_CHECK_VALUE(!seeds.empty(), "[brownian_noise_sampler] seeds must not be empty.");
  check_images(x, static_cast<std::int64_t>(seeds.size()), "brownian_noise_sampler");
  TORCH_CHECK_VALUE(std::isfinite(sigma_max) && sigma_max > 0,
                    "[brownian_noise_sampler] sigma_max must be finite and > 0, got ", sigma_max,
                    ".");
  const auto path = std::make_shared<BrownianPath>(seeds, x.sizes().slice(1), sigma_max);
  return [path, sigma_max, options = x.options()](double sigma, double sigma_next) {
    TORCH_CHECK_VALUE(0 <= sigma_next && sigma_next < sigma && sigma <= sigma_max,
                      "[brownian_noise_sampler] sigmas must fall and be between 0 and ", sigma_max,
                      ", got ", sigma, " to ", sigma_next, ".");
    const auto noise = (path->at(sigma) - path->at(sigma_next)) / std::sqrt(sigma - sigma_next);
    return to_device(noise, options.device()).to(options.dtype());
  };
}

}  // namespace sag

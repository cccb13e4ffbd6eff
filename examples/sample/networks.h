#pragma once

#include <memory>
#include <optional>
#include <string>

#include <torch/types.h>

namespace torch::jit {
struct Module;
}

namespace sag_sample {

/// A scripted text encoder: `encode(str) -> Tensor [1, tokens, width]`. Runs on the CPU in fp32.
class TextEncoder {
 public:
  /// Throws UsageError when the file is no such encoder.
  explicit TextEncoder(const std::string& path);
  ~TextEncoder();

  /// Returns what the UNet takes as context, [1, tokens, width] fp32 on the CPU. Throws RunError
  /// when the encoder fails or returns something else.
  torch::Tensor encode(const std::string& text) const;

 private:
  std::string path_;
  std::unique_ptr<torch::jit::Module> module_;
};

/// A TorchScript decoder: latents [images, channels, height, width] → pictures in [−1, 1], [images,
/// 3 or 1, height, width]. Runs where and how the UNet does.
class Decoder {
 public:
  /// Throws UsageError when the file cannot be read.
  Decoder(const std::string& path, torch::Device device, torch::ScalarType dtype);
  ~Decoder();
  Decoder(Decoder&&) noexcept;

  /// Returns the pictures, one latent after the other, fp32 on the CPU. Throws RunError when the
  /// decoder fails.
  torch::Tensor decode(const torch::Tensor& latents) const;

 private:
  std::string path_;
  torch::Device device_;
  torch::ScalarType dtype_;
  std::unique_ptr<torch::jit::Module> module_;
};

}  // namespace sag_sample

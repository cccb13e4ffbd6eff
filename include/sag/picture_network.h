#pragma once

#include <memory>
#include <string>

#include <torch/types.h>

#include "sag/export.h"

namespace torch::jit {
struct Module;
}

namespace sag {

/// A half of a VAE, as a TorchScript network: a decoder makes pictures [images, 3, height, width]
/// in [−1, 1] of latents [images, channels, height, width], an encoder latents of pictures. Latents
/// are as the UNet takes them: the scale of the VAE is inside. Runs in the dtype of its file, on
/// the CPU in fp32; some give NaN in half precision, so sag-export and checkpoints make them fp32.
class SAG_API PictureNetwork {
 public:
  /// Loads an archive. Throws ValueError, in one sentence, when it cannot be read.
  static PictureNetwork load(const std::string& path, torch::Device device = torch::kCPU);
  /// Takes a loaded module, which moves to the device. `name` stands for it in messages.
  static PictureNetwork from_module(const torch::jit::Module& module, const std::string& name,
                                    torch::Device device = torch::kCPU);

  /// Returns the results, computed one input after the other, fp32 on the CPU. Throws
  /// c10::OutOfMemoryError when memory is short, and c10::Error, with one sentence, when the
  /// network fails or returns something else.
  torch::Tensor run(const torch::Tensor& inputs) const;

 private:
  struct State;
  explicit PictureNetwork(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

}  // namespace sag

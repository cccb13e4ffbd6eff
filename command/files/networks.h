#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/ivalue.h>
#include <torch/types.h>

#include "prompt_piece.h"

namespace torch::jit {
struct Module;
}

namespace sag_sample {

/// What the UNet takes for a text, fp32 on the CPU.
struct EncodedText {
  /// [1, tokens, width].
  torch::Tensor context = {};
  /// [1, features], or undefined.
  torch::Tensor y = {};
  /// The part of the text that did not fit.
  std::string cut = {};
};

/// A scripted text encoder: `encode(str) -> Tensor context [1, tokens, width]`, or, given the
/// latent's height and width too, `encode(str, int, int) -> (Tensor context, Tensor y [1,
/// features])`. One that cannot read texts of any length has `cut(str) -> str`, the part that does
/// not fit.
///
/// One that weighs parts of a prompt and gives other layers has the same for pieces:
/// `encode_pieces(str[] pieces, float[] weights, int clip_skip[, int, int])`, with the layer
/// counted from the end (1: the last; 0: its own), `cut_pieces(str[]) -> str`, and
/// `clip_skip_range() -> (int, int)`, the lowest and the highest. Runs on the CPU in fp32.
class TextEncoder {
 public:
  /// Throws UsageError when the file is not such an encoder.
  explicit TextEncoder(const std::string& path);
  ~TextEncoder();

  /// Encodes a prompt for latents of this height and width. Throws UsageError when it has weights,
  /// or a layer is asked for, that the encoder cannot give; RunError when the encoder fails or
  /// returns something else.
  EncodedText encode(const std::vector<PromptPiece>& prompt, std::optional<std::int64_t> clip_skip,
                     std::int64_t height, std::int64_t width) const;

 private:
  c10::IValue call(const char* method, std::vector<c10::IValue> arguments) const;
  void check_gives(const std::vector<PromptPiece>& prompt,
                   std::optional<std::int64_t> clip_skip) const;
  EncodedText checked(c10::IValue result) const;

  std::string path_;
  bool takes_size_ = false, takes_pieces_ = false;
  std::unique_ptr<torch::jit::Module> module_;
};

/// A TorchScript network from pictures to pictures, four dimensions each. Runs in the dtype of its
/// file, on the CPU in fp32: some decoders give NaN in half precision.
class PictureNetwork {
 public:
  /// `what`: "decoder" or "encoder", for messages. Throws UsageError when the file cannot be read.
  PictureNetwork(const char* what, const std::string& path, torch::Device device);
  ~PictureNetwork();
  PictureNetwork(PictureNetwork&&) noexcept;

  /// Returns the results, one input after the other, fp32 on the CPU. Throws RunError when the
  /// network fails.
  torch::Tensor run(const torch::Tensor& inputs) const;

 private:
  const char* what_;
  std::string path_;
  torch::Device device_;
  torch::ScalarType dtype_ = torch::kFloat;
  std::unique_ptr<torch::jit::Module> module_;
};

/// Latents [images, channels, height, width] → pictures in [−1, 1], [images, 3 or 1, height,
/// width].
struct Decoder : PictureNetwork {
  Decoder(const std::string& path, torch::Device device)
      : PictureNetwork("decoder", path, device) {}
};

/// Pictures in [−1, 1], [images, 3, height, width] → latents as the UNet takes them.
struct Encoder : PictureNetwork {
  Encoder(const std::string& path, torch::Device device)
      : PictureNetwork("encoder", path, device) {}
};

}  // namespace sag_sample

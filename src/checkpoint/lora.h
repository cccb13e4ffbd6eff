#pragma once

#include <memory>
#include <string>
#include <vector>

#include <torch/types.h>

namespace sag {

/// A weight of the model that a LoRA may change, by all its names.
struct LoraTarget {
  /// "unet", "text_encoder" or "text_encoder_2".
  std::string part;
  /// Its path in diffusers' or transformers' module, without ".weight":
  /// "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q".
  std::string path;
  /// What the checkpoint calls it, without ".weight":
  /// "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q". Empty where it is
  /// only some rows of a tensor of the checkpoint.
  std::string key;
};

/// A LoRA (low-rank adaptation): for some weights of a model a product of two small matrices, which
/// is added. Read from a safetensors file with the names of kohya's scripts, of LyCORIS, ComfyUI,
/// diffusers (all versions) or PEFT. A copy shares the file.
///
/// Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685; for
/// convolutions with a kernel between the two, LoCon of LyCORIS, arXiv:2309.14859.
class Lora {
 public:
  /// Reads a file and checks all that can be checked without a model. `strength`: what all is
  /// multiplied by, also 0 or less.
  ///
  /// Throws ValueError, in one sentence with the first name and the count, when the file holds
  /// anything else than whole pairs of finite floating point numbers that fit together, and their
  /// alphas: LoHa, LoKr, DoRA and other kinds are named.
  static Lora open(const std::string& path, double strength);

  /// Checks that everything in the file belongs to exactly one of the targets, which are all that
  /// the model has. Looks at names only. Throws ValueError otherwise.
  void check_targets(const std::vector<LoraTarget>& all) const;

  /// Returns weight + strength · alpha / rank · up · down, computed in fp32 and returned so, on the
  /// weight's device. `weight` [out, in] or [out, in, height, width] is the target's, as the module
  /// has it. The same tensor comes back when the file has nothing for the target. Throws ValueError
  /// when the shapes do not fit, or the sum is not finite.
  torch::Tensor merged(const LoraTarget& target, const torch::Tensor& weight) const;

 private:
  struct State;
  explicit Lora(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

}  // namespace sag

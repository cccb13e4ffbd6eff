#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/unet.h"

namespace torch::jit {
struct Module;
}

namespace sag {

struct TorchScriptUNetOptions {
  torch::Device device = torch::kCPU;
  /// The dtype to run in. Nothing: fp32 on the CPU, whatever the file holds (half precision is some
  /// 60 times slower there), the file's own elsewhere.
  std::optional<torch::ScalarType> dtype = {};
  /// Whether convolutions' weights, and x, are laid out with channels last, which tensor cores like
  /// better. Nothing: on CUDA in half precision, if convolutions hold at least 5 % of the
  /// parameters: UNets, not transformers that only cut their picture into patches (frozen files
  /// have no parameters, and stay as they are). It takes a quarter off SD1.5's guided step, and 6 %
  /// off SDXL's, whose convolutions hold 13 %.
  std::optional<bool> channels_last = {};
};

/// A UNet from a TorchScript archive, traced, scripted or frozen, in ComfyUI's (LDM's) or
/// diffusers' naming, whose self-attentions can be hooked. Its attention is
/// `scaled_dot_product_attention`, or a softmax of a product (matmul, bmm, baddbmm or einsum;
/// scaled, masked, cast) and then a product with v: see `AttentionCall::probabilities`. Several
/// attentions under one path are one site, for networks that split their batch.
///
/// The arguments of the file's `forward` are, in this order: x, timesteps, context (if it takes
/// one), and further ones by name: "y", and those of `Conditioning::extra`, tensors, or dicts,
/// lists and tuples of tensors; ones with a default may be missing. Where the third may be missing,
/// one that is called "context" or "encoder_hidden_states" is the context. The result is a tensor,
/// or a tuple, list or dict that holds the tensor ("sample", "out", or the first).
///
/// The archive's module is never edited. `forward` runs a private, flattened copy of its graph, in
/// which the hooked attention, and nothing else, is replaced by an op that runs the hooks; a copy
/// is made per set of hooked sites, on first use. May be used from several threads.
class SAG_API TorchScriptUNet final : public UNet {
 public:
  /// Loads an archive, also one for the lite interpreter (.ptl). Throws ValueError, in one
  /// sentence, when the file cannot be read, is truncated, is no TorchScript archive, calls an op
  /// that nobody registered, or has no self-attention that could be hooked.
  static std::shared_ptr<TorchScriptUNet> load(const std::string& path,
                                               const TorchScriptUNetOptions& options);
  static std::shared_ptr<TorchScriptUNet> load(const std::string& path);
  /// Wraps a loaded module as it is: its device, its dtype, its weights, shared. It must be in eval
  /// mode.
  static std::shared_ptr<TorchScriptUNet> from_module(const torch::jit::Module& module);
  ~TorchScriptUNet() override;

  torch::Tensor forward(const UNetInput& input) const override;
  std::vector<AttentionSiteInfo> attention_sites() const override;
  torch::Device device() const override;
  torch::ScalarType dtype() const override;

  /// Returns the names of the arguments of the file's `forward`, without self.
  std::vector<std::string> argument_names() const;

 private:
  struct State;
  explicit TorchScriptUNet(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sag

#pragma once

#include <cstddef>
#include <functional>
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

/// Where and how a file runs.
struct TorchScriptUNetOptions {
  /// Where the weights are kept and the UNet runs.
  torch::Device device = torch::kCPU;
  /// The dtype to run in. Nothing: on the CPU fp32, whatever the file holds (half precision is some
  /// 60 times slower there); elsewhere the file's own.
  std::optional<torch::ScalarType> dtype = {};
  /// Whether x and the weights of convolutions are stored with channels last, which is faster on
  /// tensor cores. Nothing: on CUDA in half precision, if convolutions hold at least 5 % of the
  /// parameters. UNets do; transformers that only cut their picture into patches do not, and frozen
  /// files have no parameters. A guided step of SD1.5 becomes a quarter faster, one of SDXL, whose
  /// convolutions hold 13 %, 6 %.
  std::optional<bool> channels_last = {};
  /// The number of rows that is written into the file, for traces that work with no other: every
  /// call is split and filled up to it. 0: the inputs that torch.jit.trace stores in a file tell;
  /// without them (frozen files) any number of rows is given to the file as it is.
  std::int64_t rows = 0;
  /// Gives each parameter of the file its value, by its name (a dotted path): for files whose own
  /// are only placeholders, such as the skeletons of checkpoints. It is called once for each, and
  /// returns a floating tensor of its shape (a convolution may take other channels), on any device
  /// and in any dtype.
  std::function<torch::Tensor(const std::string& parameter)> weights = {};
};

/// A UNet from a TorchScript archive, traced, scripted or frozen, whose self-attentions can be
/// hooked. An attention is `scaled_dot_product_attention`, or a softmax of a product (matmul, bmm,
/// baddbmm or einsum; scaled, masked, cast) and then a product with v: see
/// `AttentionCall::probabilities`. Several attentions under one path are one site, for networks
/// that split their batch. Sites have ComfyUI's names if the modules have LDM's or diffusers', else
/// their dotted paths.
///
/// The arguments of the file's `forward` are, in this order: x, timesteps, context (if it takes
/// one), and others by name: "y", and those of `Conditioning::extra`, which are tensors, or dicts,
/// lists and tuples of tensors. Arguments with a default may be missing. If the third may be
/// missing, the one called "context" or "encoder_hidden_states" is the context. The result is a
/// tensor, or a tuple, list or dict that holds the tensor ("sample", "out", or the first).
///
/// Timesteps are given as [rows] fp32. A file that was traced with a single one, of no dimensions
/// or one element for several rows, gets one for all rows, which must be equal (on CUDA the result
/// is NaN if they are not). A scripted `forward(x, t: int)` or `t: float` gets a number. Where
/// timesteps are indices (of an embedding or a table) or are cast to whole numbers, they are
/// rounded to the nearest one; one between 0 and 1 throws ValueError, as nothing would be left of
/// it, outside of CUDA graphs.
///
/// A trace can have its number of rows written into it, which fails for another number, or mixes
/// rows without a word. So where a file holds the inputs that it was traced with (torch.jit.trace
/// and save keep their shapes), the first call with each other number of rows runs its inputs with
/// noise too, as they are and in calls of the traced number. If the results differ, all calls are
/// split and filled up to that number from then on: see `evaluated_rows`. Files of sag-export were
/// checked when they were written.
///
/// The archive's module is never edited. `forward` runs a private, flattened copy of its graph, in
/// which only the hooked attention is replaced, by an op that runs the hooks. There is one copy for
/// each set of hooked sites, made on first use. May be used from several threads.
class SAG_API TorchScriptUNet final : public UNet {
 public:
  /// Loads an archive, also one for the lite interpreter (.ptl). Throws ValueError, in one
  /// sentence, when the file cannot be read, is truncated, is not a TorchScript archive, calls an
  /// op that is not registered, has no self-attention that can be hooked, or holds a number in
  /// place of the timesteps; or when `weights` returns something else than it must.
  static std::shared_ptr<TorchScriptUNet> load(const std::string& path,
                                               const TorchScriptUNetOptions& options = {});
  /// Wraps a loaded module as it is, on its device, in its dtype, and shares its weights. Throws
  /// ValueError unless it is in eval mode and has a self-attention that can be hooked.
  /// `rows`: see `TorchScriptUNetOptions::rows`.
  static std::shared_ptr<TorchScriptUNet> from_module(const torch::jit::Module& module,
                                                      std::int64_t rows = 0);
  ~TorchScriptUNet() override;

  /// Returns the raw network output, [rows, channels, height, width]. Throws ValueError or
  /// TypeError when an input does not fit, c10::OutOfMemoryError when memory is short, and
  /// c10::Error with one sentence when the network fails. An exception of a hook arrives unchanged.
  torch::Tensor forward(const UNetInput& input) const override;
  std::vector<AttentionSiteInfo> attention_sites() const override;
  std::vector<AttentionSiteInfo> cross_attention_sites() const override;
  std::vector<AttentionSiteInfo> block_sites() const override;
  torch::Device device() const override;
  torch::ScalarType dtype() const override;
  std::int64_t evaluated_rows(c10::IntArrayRef x) const override;

  /// Returns the names of the arguments of the file's `forward`, without self.
  std::vector<std::string> argument_names() const;

 private:
  struct State;
  explicit TorchScriptUNet(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sag

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/unet.h"

namespace sag {

/// Where a compiled UNet runs, and with which weights.
struct AotiUNetOptions {
  /// Nothing: the device that the packages were compiled for; "cuda" without a number is the
  /// current one.
  std::optional<torch::Device> device = {};
  /// The weights of packages that were compiled without theirs, in place of the file weights.pt: a
  /// function for each parameter or buffer, by its dotted path in the module that was exported. It
  /// is called once, and returns a dense tensor of the sizes that the packages list, on the CPU or
  /// on their device. What has another floating dtype, other strides or another device is copied;
  /// the rest is shared, and must not change while the UNet lives. Every weight that a package
  /// lists must be here, and no other.
  std::map<std::string, std::function<torch::Tensor()>> weights = {};
};

/// A UNet compiled by AOTInductor: a package that `sag-export --format aoti` wrote
/// (`unet.pt2`), or a folder of such packages, compiled for several shapes. Each call runs the most
/// specific package that takes its shapes: one compiled for exactly these comes before one for a
/// range. Where none takes the rows of a call, but one takes more, the call is filled up with
/// copies of its last row, and where all take fewer, it is split. Packages compiled without their
/// weights share the file `weights.pt` next to them, or those of `AotiUNetOptions::weights`.
///
/// A package holds machine code, which runs in this process: load only files that you trust. It
/// works with the kind of CPU, the GPU (compute capability) and the minor version of LibTorch that
/// it was compiled for, and with the shapes, dtypes, device and attention sites named at export;
/// `attention_sites()` lists those. All of this is checked, at load and at every call.
///
/// May be used from several threads and on several CUDA streams: a call launches its work on the
/// current stream of its thread. Threads that call the same package wait for each other while it
/// launches its work (on the CPU, while it computes). A hook may call the UNet that it runs in.
/// Hooks of two compiled UNets that call each other's UNet from two threads would deadlock. While a
/// package is loaded, LibTorch keeps its unpacked files in a folder of /tmp.
class SAG_API AotiUNet final : public UNet {
 public:
  /// Loads a package or a folder of packages. Throws ValueError, in one sentence, when a file
  /// cannot be read, is not such a package, was compiled for another machine or another LibTorch,
  /// or when the packages of a folder do not belong together; when weights are missing, left over,
  /// of other sizes or, from `options`, not finite in the package's dtype; and when the packages
  /// were compiled from a skeleton and `options` has no weights.
  static std::shared_ptr<AotiUNet> load(const std::string& path,
                                        const AotiUNetOptions& options = {});
  /// Whether a path is to be loaded here (a *.pt2 or a folder), not as a TorchScript archive.
  static bool is_package(const std::string& path);
  /// Returns the family of checkpoints ("sd1", "sd2", "sdxl") whose skeleton a package or a folder
  /// of packages was compiled from; empty for those of one model. Throws ValueError as `load` does,
  /// but loads nothing.
  static std::string skeleton(const std::string& path);
  ~AotiUNet() override;

  /// Returns the raw network output, [rows, channels, height, width], contiguous. Throws ValueError
  /// when an input is missing, unknown, on another device, or of a shape that no package takes, and
  /// TypeError when it has another dtype. An exception of a hook arrives unchanged.
  torch::Tensor forward(const UNetInput& input) const override;
  std::vector<AttentionSiteInfo> attention_sites() const override;
  std::vector<AttentionSiteInfo> cross_attention_sites() const override;
  std::string note_on_sites() const override;
  std::int64_t max_rows() const override;
  std::int64_t evaluated_rows(c10::IntArrayRef x) const override;
  torch::Device device() const override;
  torch::ScalarType dtype() const override;

 private:
  struct State;
  explicit AotiUNet(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sag

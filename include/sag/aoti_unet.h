#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/unet.h"

namespace sag {

struct AotiUNetOptions {
  /// Nothing: the device that the packages were compiled for; "cuda" without a number is the
  /// current one.
  std::optional<torch::Device> device = {};
};

/// A UNet compiled by AOTInductor: a package that `tools/export_model.py --format aoti` wrote
/// (`unet.pt2`), or a folder of such packages, compiled for several shapes. Each call takes the
/// most specific package that fits its shapes, one compiled for just these before one that takes a
/// range. Packages compiled without their weights share the file `weights.pt` beside them.
///
/// A package holds machine code, which runs in this process: load only files that you trust. It
/// fits the kind of CPU, the GPU (compute capability) and the minor version of LibTorch that it was
/// compiled for, the shapes, dtypes and device named at export, and hooks at the sites marked then:
/// `attention_sites()` lists those alone. All of it is checked, at load and at every call.
///
/// May be used from several threads, and on several CUDA streams: a call launches its work on the
/// current stream of its thread. Threads wait for each other while one launches (on the CPU, while
/// it computes) with the same package, not with another; a hook that calls the UNet it runs in is
/// fine, hooks of two compiled UNets that call each other's from two threads would wait for ever.
/// While it is loaded, LibTorch keeps the unpacked package in a folder of /tmp.
class SAG_API AotiUNet final : public UNet {
 public:
  /// Loads a package or a folder of packages. Throws ValueError, in one sentence, when something
  /// cannot be read, is no such package, was compiled for something else than this machine and this
  /// LibTorch, or when the packages of a folder do not belong together.
  static std::shared_ptr<AotiUNet> load(const std::string& path, const AotiUNetOptions& options);
  static std::shared_ptr<AotiUNet> load(const std::string& path);
  /// Whether a path is one to load here, a *.pt2 or a folder, and not a TorchScript archive.
  static bool is_package(const std::string& path);
  ~AotiUNet() override;

  /// Returns the raw network output, [rows, channels, height, width], contiguous. Throws ValueError
  /// when an input is missing, unknown, on another device, or of a shape that no package takes, and
  /// TypeError when it has another dtype; what a hook threw, it throws itself.
  torch::Tensor forward(const UNetInput& input) const override;
  std::vector<AttentionSiteInfo> attention_sites() const override;
  std::string note_on_sites() const override;
  std::int64_t max_rows() const override;
  torch::Device device() const override;
  torch::ScalarType dtype() const override;

 private:
  struct State;
  explicit AotiUNet(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sag

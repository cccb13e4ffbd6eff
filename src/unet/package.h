#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/unet.h"

namespace sag {

/// What a dimension of an input may be.
struct PackageDim {
  std::int64_t low = 0, high = 0, multiple = 1;

  bool takes(std::int64_t size) const {
    return low <= size && size <= high && size % multiple == 0;
  }
};

struct PackageInput {
  std::string name;
  torch::ScalarType dtype;
  std::vector<PackageDim> dims;  ///< rows first

  bool takes(const torch::Tensor& t) const;
};

/// What a compiled package (.pt2) says about itself. The code in it checks nothing of what it is
/// given, so `tools/export/package.py` writes this into its metadata.
struct Package {
  std::string path;
  torch::DeviceType device = torch::kCPU;
  std::string model;                 ///< a fingerprint of the network
  std::string gpu;                   ///< the compute capability, "9.0"; empty for the CPU
  std::vector<PackageInput> inputs;  ///< in the order of its forward
  std::vector<AttentionSiteInfo> sites;
  /// "<dtype> <sizes> <strides>" of the tensors it needs from weights.pt, by name; empty: it holds
  /// its weights.
  std::map<std::string, std::string> weights;

  /// Returns "x [1-4, 4, 8-64 in steps of 8, …], timesteps [1-4], …".
  std::string list_inputs() const;
  /// Returns how many dimensions may vary: the fewer, the more specific is the package.
  std::size_t free_dims() const;
};

/// Reads the metadata of a package. Throws ValueError, in one sentence, when the file is none that
/// sag's exporter wrote, or was compiled for another LibTorch or another kind of machine.
Package read_package(const std::string& path);

/// Returns a tensor's dtype, sizes and strides as `Package::weights` writes them.
std::string describe_weight(const torch::Tensor& t);

/// Returns the packages in a folder (*.pt2), or the one that is named. Throws ValueError if there
/// is none.
std::vector<std::string> find_packages(const std::string& path);

}  // namespace sag

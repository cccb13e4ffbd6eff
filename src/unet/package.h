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
  /// Rows first.
  std::vector<PackageDim> dims;

  bool takes(const torch::Tensor& t) const;
};

/// How a tensor lies that a package needs from outside.
struct PackageWeight {
  torch::ScalarType dtype = torch::kFloat;
  std::vector<std::int64_t> sizes = {}, strides = {};

  bool operator==(const PackageWeight&) const = default;
  /// Returns "<dtype> <sizes> <strides>".
  std::string text() const;
};

/// Returns how a tensor lies.
PackageWeight weight_form(const torch::Tensor& t);

/// What a compiled package (.pt2) says about itself. Its code does not check what it is given, so
/// `exporter/sag_export/package.py` writes this into its metadata.
struct PackageInfo {
  std::string path;
  torch::DeviceType device = torch::kCPU;
  /// A fingerprint of the network.
  std::string model;
  /// The family of checkpoints whose skeleton it was compiled from; empty: it is of one model.
  std::string skeleton;
  /// The compute capability, "9.0"; empty for the CPU.
  std::string gpu;
  /// In the order of its forward.
  std::vector<PackageInput> inputs;
  std::vector<AttentionSiteInfo> sites;
  /// All that there are, or none.
  std::vector<AttentionSiteInfo> cross_sites;
  /// The tensors that it needs from outside, by name. Empty: it holds its own weights.
  std::map<std::string, PackageWeight> weights;

  /// Returns "x [1-4, 4, 8-64 in steps of 8, …], timesteps [1-4], …".
  std::string list_inputs() const;
  /// Returns how many dimensions may vary: the fewer, the more specific is the package.
  std::size_t free_dims() const;
};

/// Reads the metadata of a package. Throws ValueError, in one sentence, when the file was not
/// written by sag's exporter, or was compiled for another LibTorch or another kind of machine.
PackageInfo read_package(const std::string& path);

/// Returns the packages in a folder (*.pt2), or the one that is named. Throws ValueError if a
/// folder has none.
std::vector<std::string> find_packages(const std::string& path);

}  // namespace sag

#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

/// The tensors of a .safetensors file, or of several that an index names.
///
/// The files are mapped into memory and must not change while this or one of its tensors lives: a
/// file that becomes shorter ends the process (SIGBUS). Every number of the header is checked
/// before it is used, so a hostile file is an error.
///
/// Source: the format's description, https://huggingface.co/docs/safetensors.
class SAG_API Safetensors {
 public:
  /// What the header says about a tensor.
  struct Info {
    /// Its dtype.
    torch::ScalarType dtype = torch::kFloat;
    /// Its shape.
    std::vector<std::int64_t> sizes = {};
  };

  /// Opens a .safetensors file, or the .json index of a checkpoint in several (a "weight_map" from
  /// tensor to file; the files lie beside the index). Reads the headers only.
  ///
  /// Throws ValueError, in one sentence, when a file cannot be read, is truncated, is not
  /// safetensors, or breaks a rule of the format: a header of 100 MB at most, no name twice, dtypes
  /// of whole bytes that LibTorch has, sizes that agree with the offsets, no byte that two tensors
  /// share or that none has. An index and its files must name the same tensors.
  static Safetensors open(const std::string& path);

  /// Returns every tensor's name and what the header says about it, in the order of the names.
  const std::map<std::string, Info>& tensors() const;
  /// Returns the text notes of the header; those of an index that are texts or numbers.
  const std::map<std::string, std::string>& metadata() const;

  /// Returns a tensor, on the CPU, in the file's dtype. It shares the mapped memory, which it keeps
  /// alive; writing to it does not reach the file. Only what is not aligned to its dtype is copied.
  /// Throws ValueError when there is no such tensor, or when a bool is neither 0 nor 1.
  torch::Tensor tensor(const std::string& name) const;
  /// Gives the memory that a tensor's bytes take back to the system. Who uses them later reads them
  /// from the file again; what was written to them is lost. For those who have copied a tensor, to
  /// a device or into another dtype, and need no second copy of it in memory.
  void forget(const std::string& name) const;

 private:
  struct State;
  explicit Safetensors(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

}  // namespace sag

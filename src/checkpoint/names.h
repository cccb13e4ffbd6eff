#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "sag/safetensors.h"

namespace sag {

/// A tensor of a checkpoint that holds a parameter of a skeleton.
struct StoredTensor {
  /// What the checkpoint calls it.
  std::string key = {};
  /// Only these rows of it, first and one past the last.
  std::optional<std::pair<std::int64_t, std::int64_t>> rows = {};
  /// Its two dimensions are swapped.
  bool transposed = false;
};

/// How checkpoints hold a parameter of a skeleton.
struct StoredParameter {
  /// The usual tensor first, then others that may be there in its place.
  std::vector<StoredTensor> tensors = {};
  /// The parameter's own.
  std::vector<std::int64_t> shape = {};
  /// Dimensions whose size the checkpoint decides: the channels that a UNet takes.
  std::vector<std::int64_t> free = {};
};

/// What an archive of a skeleton says about checkpoints: its record names.json.
struct SkeletonNames {
  /// By the parameter's dotted path.
  std::map<std::string, StoredParameter> parameters = {};
  /// Tensors of checkpoints that nobody needs; a * at the end stands for any rest.
  std::vector<std::string> unneeded = {};
  /// A name that begins with the first may begin with the second instead.
  std::vector<std::pair<std::string, std::string>> spellings = {};
};

/// Reads them. Throws ValueError, in one sentence, for an archive that is no skeleton's.
SkeletonNames read_skeleton_names(const std::string& archive);

/// What a file was named for.
struct NamedFile {
  std::string path = {};
  /// The caller's word for it, and what it must be.
  std::string argument = "path", what = "a checkpoint of Stable Diffusion 1, 2 or XL";
};

/// The tensors of a checkpoint that belong to one network of a skeleton.
class StoredNetwork {
 public:
  /// Looks for every parameter. Throws ValueError, naming the file, when some of them are there and
  /// others are not, or when one has another shape or dtype than it must.
  StoredNetwork(SkeletonNames names, Safetensors file, const NamedFile& from);

  /// Whether the file has this network at all.
  bool is_there() const { return !found_.empty(); }
  /// Returns the dtype that most elements have.
  torch::ScalarType dtype() const { return dtype_; }
  /// How many elements its parameters have.
  std::int64_t elements() const { return elements_; }
  const SkeletonNames& names() const { return names_; }
  /// Returns the tensor that holds a parameter, by the file's own name. Throws ValueError when
  /// names.json has no such parameter.
  const StoredTensor& stored(const std::string& parameter) const;
  /// Returns a parameter's value in the file's dtype; it shares the file's memory.
  torch::Tensor value(const std::string& parameter) const;
  /// Gives back the memory of the tensor that holds a parameter: see `Safetensors::forget`.
  void forget(const std::string& parameter) const { file_.forget(stored(parameter).key); }

 private:
  void find(const NamedFile& from);
  std::optional<StoredTensor> look_for(const StoredParameter& parameter) const;
  void check_shapes(const NamedFile& from);

  SkeletonNames names_;
  Safetensors file_;
  // By the parameter.
  std::map<std::string, StoredTensor> found_ = {};
  torch::ScalarType dtype_ = torch::kFloat;
  std::int64_t elements_ = 0;
};

/// Throws ValueError, naming the file, if it has a tensor that none of the networks uses, none of
/// their skeletons knows to be unneeded, and `unneeded` does not name. Returns how many tensors are
/// unneeded, by the name or pattern that says so.
std::map<std::string, std::int64_t> check_all_used(
    const Safetensors& file, const std::vector<const StoredNetwork*>& networks,
    const NamedFile& from, std::vector<std::string> unneeded = {});

/// Ends the reading of a file: throws ValueError "[Checkpoint::open] path must name a checkpoint of
/// Stable Diffusion 1, 2 or XL, got "path", which …". `problem` is the end of that sentence.
[[noreturn]] void refuse_checkpoint(const NamedFile& from, const std::string& problem);

}  // namespace sag

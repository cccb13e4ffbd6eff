#pragma once

#include <memory>
#include <string>
#include <vector>

namespace torch::jit {
struct Graph;
struct Module;
}  // namespace torch::jit

namespace sag {

/// A private copy of a module's `forward` with every call inlined. Its first input is the module.
/// `sag::transformer_block` stands after each block that is called "….transformer_blocks.N".
struct FlatGraph {
  std::shared_ptr<torch::jit::Graph> graph;
  /// The dotted path of the module that holds each attention, in the order of `attention_nodes`;
  /// empty if the graph does not say (frozen files).
  std::vector<std::string> attention_paths;
};

/// Returns the flattened `forward`, without branches that are never taken. The module and the
/// caches of its functions stay as they are.
FlatGraph flatten(const torch::jit::Module& module);

}  // namespace sag

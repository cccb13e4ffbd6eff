#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace torch::jit {
struct Graph;
struct Module;
struct Node;
}  // namespace torch::jit

namespace sag {

/// A private copy of a module's `forward` with every call inlined. Its first input is the module.
struct FlatGraph {
  std::shared_ptr<torch::jit::Graph> graph;
  /// The dotted path of the module that holds each attention, in the order of `attention_nodes`;
  /// empty where the graph does not tell (frozen files).
  std::vector<std::string> attention_paths;
};

/// Returns the flattened `forward`, without branches that are never taken. Neither the module nor
/// its functions' caches are touched.
FlatGraph flatten(const torch::jit::Module& module);

/// Calls `visit` for every node, in order of execution, blocks and forked graphs included. The
/// visitor may destroy its node and insert others beside it.
void for_each_node(torch::jit::Graph& graph, const std::function<void(torch::jit::Node*)>& visit);

/// Returns the graph that a node forks or keeps for later, or null.
torch::jit::Graph* subgraph_of(const torch::jit::Node* node);

}  // namespace sag

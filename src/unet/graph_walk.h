#pragma once

#include <functional>

namespace torch::jit {
struct Block;
struct Graph;
struct Node;
}  // namespace torch::jit

// How to visit the nodes of a TorchScript graph.
namespace sag {

/// Calls `visit` for every node, in order of execution, blocks and forked graphs included. The
/// visitor may destroy its node and insert others next to it.
void for_each_node(torch::jit::Graph& graph, const std::function<void(torch::jit::Node*)>& visit);

/// The same for the nodes of one block, without the blocks and graphs inside them.
void for_each_node_of(torch::jit::Block* block,
                      const std::function<void(torch::jit::Node*)>& visit);

/// Returns the graph that a node forks or keeps for later, or null.
torch::jit::Graph* subgraph_of(const torch::jit::Node* node);

}  // namespace sag

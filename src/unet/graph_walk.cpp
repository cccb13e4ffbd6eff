#include "graph_walk.h"

#include <torch/csrc/jit/ir/ir.h>

namespace sag {
namespace {

// Includes c10's attr.
using namespace torch::jit;

void visit_deep(Block* block, const std::function<void(Node*)>& visit) {
  for_each_node_of(block, [&](Node* node) {
    for (Block* inner : node->blocks()) visit_deep(inner, visit);
    if (auto* forked = subgraph_of(node)) visit_deep(forked->block(), visit);
    // Last: it may destroy the node.
    visit(node);
  });
}

}  // namespace

void for_each_node(Graph& graph, const std::function<void(Node*)>& visit) {
  visit_deep(graph.block(), visit);
}

void for_each_node_of(Block* block, const std::function<void(Node*)>& visit) {
  // The nodes may change under the visitor, so the next one is looked up before each visit.
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* node = *it++;
    visit(node);
  }
}

// prim::fork and prim::awaitable keep what they run in an attribute.
Graph* subgraph_of(const Node* node) {
  const bool has_one =
      node->hasAttribute(attr::Subgraph) && node->kindOf(attr::Subgraph) == AttributeKind::g;
  return has_one ? node->g(attr::Subgraph).get() : nullptr;
}

}  // namespace sag

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torch::jit {
struct Graph;
struct Node;
struct Value;
}  // namespace torch::jit

// What counts as an attention in a flattened graph (see flatten.h).
namespace sag {

/// An attention: `scaled_dot_product_attention`, or (unfused) a product, softmax, and a product
/// with v.
struct AttentionNode {
  /// Computes the output, and is replaced by an op that runs hooks: SDPA, or the last product.
  torch::jit::Node* node = nullptr;
  torch::jit::Value *q = nullptr, *k = nullptr, *v = nullptr;
  /// What softmax returned, as it enters the last product; null: the node is SDPA.
  torch::jit::Value* probabilities = nullptr;
  /// How the probabilities are multiplied by v: see the op `sag::attention_probabilities`.
  std::string product = {};
};

/// What the layer around an attention is applied to.
struct LayerInput {
  /// Null: not known.
  torch::jit::Value* value = nullptr;
  /// The dimension of its channels, 1 or -1.
  std::int64_t channels = -1;
};

/// Returns the attentions in order of execution.
std::vector<AttentionNode> attention_nodes(torch::jit::Graph& graph);

/// Whether the node can be `AttentionNode::node`.
bool may_be_attention(const torch::jit::Node* node);

/// Whether the node is a softmax, in an attention or elsewhere.
bool is_softmax(const torch::jit::Node* node);

/// Whether the node is a whole attention layer in one op, as in nn.MultiheadAttention, or makes the
/// nested tensor that only such an op takes.
bool is_fast_path(const torch::jit::Node* node);

}  // namespace sag

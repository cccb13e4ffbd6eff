#include "attention_nodes.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <set>
#include <utility>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include "graph_walk.h"
#include "ops.h"

namespace sag {
namespace {

using namespace torch::jit;

// Two tensors that a node multiplies, as matrices.
struct Product {
  Value *left, *right;
  // "matmul", "bmm", "baddbmm", or einsum's equation without spaces.
  std::string how;
};

std::optional<Product> einsum_of(Node* node) {
  const auto equation = toIValue(node->input(0));
  auto* operands = node->input(1)->node();
  if (!equation || !equation->isString() || operands->kind() != prim::ListConstruct ||
      operands->inputs().size() != 2)
    return std::nullopt;
  auto how = equation->toStringRef();
  how.erase(std::remove(how.begin(), how.end(), ' '), how.end());
  return Product{operands->input(0), operands->input(1), std::move(how)};
}

std::optional<Product> product_of(Node* node) {
  const auto op = node->kind();
  if (op == aten::matmul) return Product{node->input(0), node->input(1), "matmul"};
  if (op == aten::bmm) return Product{node->input(0), node->input(1), "bmm"};
  if (op == aten::baddbmm) return Product{node->input(1), node->input(2), "baddbmm"};
  return op == aten::einsum ? einsum_of(node) : std::nullopt;
}

// Whether an equation multiplies [..., queries, keys] by something with keys, as in "bij,bjd->bid"
// and "bts,bcs->bct".
bool sums_over_keys(const std::string& equation) {
  const auto comma = equation.find(','), arrow = equation.find("->");
  if (comma == std::string::npos || arrow == std::string::npos || comma < 3) return false;
  const auto v = equation.substr(comma + 1, arrow - comma - 1), out = equation.substr(arrow + 2);
  const auto has = [](const std::string& letters, char letter) {
    return letters.find(letter) != std::string::npos;
  };
  const char queries = equation[comma - 2], keys = equation[comma - 1];
  const auto leading = equation.substr(0, comma - 2);
  return has(v, keys) && !has(out, keys) && has(out, queries) && !has(v, queries) &&
         std::all_of(leading.begin(), leading.end(),
                     [&](char letter) { return has(v, letter) && has(out, letter); });
}

// Goes back from a value, through the given ops, to the first node that is wanted, or null.
Node* find_before(Value* value, const Ops& through, const std::function<bool(Node*)>& wanted,
                  std::set<const Value*>& seen) {
  if (!seen.insert(value).second) return nullptr;
  Node* node = value->node();
  if (wanted(node)) return node;
  if (node->kind() == prim::If) {
    // Either side shows what it is.
    for (Block* side : node->blocks())
      if (Node* found = find_before(side->outputs()[value->offset()], through, wanted, seen))
        return found;
  }
  if (!through.contains(node->kind())) return nullptr;
  // A cast's other inputs say only what to cast to.
  const auto inputs = kCasts.contains(node->kind()) ? 1 : node->inputs().size();
  for (Value* input : node->inputs().slice(0, inputs))
    if (Node* found = find_before(input, through, wanted, seen)) return found;
  return nullptr;
}

Node* find_before(Value* value, const Ops& through, const std::function<bool(Node*)>& wanted) {
  std::set<const Value*> seen;
  return find_before(value, through, wanted, seen);
}

// What may happen to scores between their product and softmax: scales, masks, casts, shapes.
const Ops& score_ops() {
  static const Ops ops = [] {
    Ops all = {aten::mul,     aten::mul_,        aten::div,          aten::div_,
               aten::add,     aten::add_,        aten::sub,          aten::sub_,
               aten::where,   aten::masked_fill, aten::masked_fill_, aten::clamp,
               aten::reshape, aten::view,        aten::flatten,      aten::unflatten};
    all.insert(kCasts.begin(), kCasts.end());
    return all;
  }();
  return ops;
}

// Whether softmax sums over keys, the last dimension. How many dimensions there are is known only
// from the product that follows.
bool is_over_keys(const Node* softmax, const Product& last) {
  const auto dim = toIValue(softmax->input(1));
  if (!dim || !dim->isInt()) return false;
  const auto comma = last.how.find(',');
  const bool has_three_dims = last.how == "bmm" || comma == 3;
  return dim->toInt() == -1 || dim->toInt() == (has_three_dims ? 2 : 3);
}

// The integers of a list; empty if one of them is not constant.
std::vector<std::int64_t> integers(const Value* list) {
  if (const auto value = toIValue(list); value && value->isIntList()) return value->toIntVector();
  std::vector<std::int64_t> found;
  for (const Value* element : list->node()->inputs()) {
    const auto value = toIValue(element);
    if (!value || !value->isInt()) return {};
    found.push_back(value->toInt());
  }
  return found;
}

// The value whose transpose is the right side of `last`; null if that is not a transpose.
Value* untransposed(const Product& last) {
  using Dims = std::vector<std::int64_t>;
  const Node* node = last.right->node();
  if (node->kind() == aten::permute) {
    const auto order = integers(node->input(1));
    return order == Dims{0, 2, 1} || order == Dims{0, 1, 3, 2} ? node->input(0) : nullptr;
  }
  if (node->kind() != aten::transpose) return nullptr;
  const auto a = toIValue(node->input(1)), b = toIValue(node->input(2));
  if (!a || !a->isInt() || !b || !b->isInt()) return nullptr;
  const auto lower = std::min(a->toInt(), b->toInt()), upper = std::max(a->toInt(), b->toInt());
  const bool are_last = lower == -2 || lower == (last.how == "bmm" ? 1 : 2);
  return are_last && upper == lower + 1 ? node->input(0) : nullptr;
}

// The attention whose last product is `last`, if `probabilities` come from its softmax.
std::optional<AttentionNode> unfused(Node* node, const Product& last, Value* probabilities,
                                     Value* v) {
  Node* softmax = find_before(probabilities, kCasts, is_softmax);
  if (!softmax || !is_over_keys(softmax, last)) return std::nullopt;
  Node* scores = find_before(softmax->input(0), score_ops(),
                             [](Node* before) { return product_of(before).has_value(); });
  if (!scores) return std::nullopt;
  const auto first = product_of(scores);
  return AttentionNode{node, first->left, first->right, v, probabilities, last.how};
}

std::optional<AttentionNode> unfused(Node* node) {
  const auto last = product_of(node);
  if (!last || last->how == "baddbmm") return std::nullopt;
  const bool is_equation = last->how.find(',') != std::string::npos;
  if (is_equation && !sums_over_keys(last->how)) return std::nullopt;
  if (auto attention = unfused(node, *last, last->left, last->right)) return attention;
  auto* probabilities = is_equation ? nullptr : untransposed(*last);
  if (!probabilities) return std::nullopt;
  auto attention = unfused(node, *last, probabilities, last->left);
  if (attention) attention->product = "matmul_transposed";
  return attention;
}

}  // namespace

bool is_softmax(const Node* node) {
  static const Ops ops = {aten::softmax, aten::_softmax, aten::special_softmax};
  return ops.contains(node->kind());
}

bool is_fast_path(const Node* node) {
  static const Ops ops = {aten::_native_multi_head_attention, aten::_transformer_encoder_layer_fwd,
                          aten::_nested_tensor_from_mask};
  return ops.contains(node->kind());
}

bool may_be_attention(const Node* node) {
  static const Ops ops = {aten::scaled_dot_product_attention, aten::matmul, aten::bmm,
                          aten::einsum};
  return ops.contains(node->kind());
}

std::vector<AttentionNode> attention_nodes(Graph& graph) {
  std::vector<AttentionNode> found;
  for_each_node(graph, [&](Node* node) {
    if (node->kind() == aten::scaled_dot_product_attention)
      found.push_back({node, node->input(0), node->input(1), node->input(2)});
    else if (auto attention = unfused(node))
      found.push_back(std::move(*attention));
  });
  return found;
}

}  // namespace sag

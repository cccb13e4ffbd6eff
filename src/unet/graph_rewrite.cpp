#include "graph_rewrite.h"

#include <algorithm>
#include <map>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include "graph_walk.h"
#include "ops.h"

namespace sag {
namespace {

using namespace torch::jit;

// An op with weights: which of its inputs are the activation, the weight, the bias (if it takes
// one) and statistics, which are not parameters.
struct WeightedOp {
  std::size_t activation, weight;
  std::optional<std::size_t> bias;
  std::vector<std::size_t> statistics = {};
};

const WeightedOp* weighted_op(const Node* node) {
  static const std::unordered_map<c10::Symbol, WeightedOp> ops = {
      {aten::linear, {0, 1, 2}},
      {aten::conv1d, {0, 1, 2}},
      {aten::conv2d, {0, 1, 2}},
      {aten::conv3d, {0, 1, 2}},
      {aten::conv_transpose1d, {0, 1, 2}},
      {aten::conv_transpose2d, {0, 1, 2}},
      {aten::conv_transpose3d, {0, 1, 2}},
      {aten::_convolution, {0, 1, 2}},
      {aten::_convolution_mode, {0, 1, 2}},
      {aten::addmm, {1, 2, 0}},
      {aten::baddbmm, {1, 2, 0}},
      {aten::matmul, {0, 1, {}}},
      {aten::bmm, {0, 1, {}}},
      {aten::group_norm, {0, 2, 3}},
      {aten::layer_norm, {0, 2, 3}},
      {aten::batch_norm, {0, 1, 2, {3, 4}}},
      {aten::instance_norm, {0, 1, 2, {3, 4}}},
      {aten::prelu, {0, 1, {}}},
  };
  const auto found = ops.find(node->kind());
  return found == ops.end() ? nullptr : &found->second;
}

bool is_tensor(const Value* value) {
  return value->type()->isSubtypeOf(*c10::TensorType::get());
}

// The node that a weight comes from, an attribute or a constant, perhaps transposed; null if the
// value is computed.
Node* weight_source(Value* value) {
  static const Ops views = {aten::t, aten::transpose, aten::permute, aten::numpy_T, aten::detach};
  Node* node = value->node();
  while (views.contains(node->kind())) node = node->input(0)->node();
  return node->kind() == prim::GetAttr || node->kind() == prim::Constant ? node : nullptr;
}

// The inputs of a node that hold weights. In a product either side can be the weight.
std::vector<Value*> weights_of(Node* node) {
  const auto* op = weighted_op(node);
  if (!op) return {};
  std::vector<Value*> weights = {node->input(op->weight)};
  if (op->bias) weights.push_back(node->input(*op->bias));
  if (!weight_source(weights[0])) weights[0] = node->input(op->activation);
  return weights;
}

bool holds_tensor(const Node* node) {
  return node->kind() == prim::Constant && node->hasAttribute(attr::value) &&
         node->kindOf(attr::value) == AttributeKind::t;
}

std::unordered_set<Node*> constant_weights(Graph& graph) {
  std::unordered_set<Node*> constants;
  for_each_node(graph, [&](Node* node) {
    for (Value* weight : weights_of(node))
      if (Node* constant = weight_source(weight); constant && holds_tensor(constant))
        constants.insert(constant);
  });
  return constants;
}

void set_constant(Node* node, const torch::Tensor& value) {
  node->t_(attr::value, value);
  // A recorded dtype or device may be wrong now.
  node->output()->setType(c10::TensorType::get());
}

torch::Tensor constant_on(const torch::Tensor& t, torch::Device device) {
  return t.dim() == 0 ? t.cpu() : t.to(device);
}

c10::IValue constant_on(const c10::IValue& value, torch::Device device) {
  if (value.isTensor()) return constant_on(value.toTensor(), device);
  if (value.isTensorList()) {
    c10::List<torch::Tensor> list;
    for (const torch::Tensor& t : value.toTensorVector()) list.push_back(constant_on(t, device));
    return list;
  }
  if (value.isTuple()) {
    std::vector<c10::IValue> elements;
    for (const auto& element : value.toTupleRef().elements())
      elements.push_back(constant_on(element, device));
    return c10::ivalue::Tuple::create(std::move(elements));
  }
  return value;
}

void cast_input(Node* node, std::size_t input, Value* like) {
  Value* value = node->input(input);
  if (value == like || !is_tensor(value) || !is_tensor(like)) return;
  WithInsertPoint before(node);
  Graph& graph = *node->owningGraph();
  Node* cast = graph.create(aten::type_as, {value, like});
  cast->output()->setType(c10::TensorType::get());
  node->replaceInput(input, graph.insertNode(cast)->output());
}

void follow_weights_of(Node* node, const WeightedOp& op) {
  auto activation = op.activation, weight = op.weight;
  if (!op.bias && weight_source(node->input(activation)) && !weight_source(node->input(weight)))
    std::swap(activation, weight);
  Value* like = node->input(weight);
  cast_input(node, activation, like);
  if (op.bias && !weight_source(node->input(*op.bias))) cast_input(node, *op.bias, like);
  // A norm may have no weights.
  if (!is_tensor(like)) like = node->input(activation);
  for (const auto input : op.statistics) cast_input(node, input, like);
}

// Whether all uses of a value are cast to the dtype of weights.
bool follows_weights(const Value* value) {
  const auto& uses = value->uses();
  return std::all_of(uses.begin(), uses.end(), [](const Use& use) {
    const auto* op = weighted_op(use.user);
    // A norm may have no weights.
    return op && use.offset == op->activation && is_tensor(use.user->input(op->weight)) &&
           weight_source(use.user->input(op->weight));
  });
}

bool casts_to_float(const Node* node) {
  const auto* schema = node->kind() == aten::to ? node->maybeSchema() : nullptr;
  if (!schema || schema->overload_name() != "dtype") return false;
  const auto dtype = toIValue(node->input(1));
  return dtype && dtype->isInt() && dtype->toInt() == static_cast<std::int64_t>(torch::kFloat);
}

// diffusers casts what attention returns to the dtype of q, which traces of fp32 networks recorded.
// At half precision that would widen it for the next layer to narrow again: two passes over the
// same values.
void drop_widened_attention(Graph& graph) {
  static const Ops layouts = {aten::transpose, aten::permute, aten::reshape,
                              aten::view,      aten::flatten, aten::contiguous};
  for_each_node(graph, [](Node* node) {
    if (!casts_to_float(node) || !follows_weights(node->output())) return;
    const Node* source = node->input(0)->node();
    while (layouts.contains(source->kind())) source = source->input(0)->node();
    if (source->kind() != aten::scaled_dot_product_attention) return;
    node->output()->replaceAllUsesWith(node->input(0));
    node->destroy();
  });
}

// Whether a condition is PyTorch's "not why_not_fast_path", where the text is the reason. Other
// conditions belong to the model.
bool is_without_text(const Value* condition) {
  const Node* negation = condition->node();
  if (negation->kind() != aten::__not__) return false;
  const Node* has_text = negation->input(0)->node();
  if (has_text->kind() != aten::gt) return false;
  const Node* length = has_text->input(0)->node();
  return length->kind() == aten::len &&
         length->input(0)->type()->kind() == c10::TypeKind::StringType;
}

std::optional<std::size_t> list_length(const Value* list) {
  if (list->node()->kind() == prim::ListConstruct) return list->node()->inputs().size();
  const auto value = toIValue(list);
  if (value && value->isIntList()) return value->toIntList().size();
  return std::nullopt;
}

// Inputs of _convolution: input, weight, bias, stride, padding, dilation, transposed,
// output_padding, groups, and then the switches.
Node* plain_convolution(Node* node) {
  const auto transposed = toIValue(node->input(6));
  const auto dims = list_length(node->input(3));
  const auto same_length = [&](std::size_t input) {
    return list_length(node->input(input)) == dims;
  };
  if (!transposed || !dims || *dims < 1 || *dims > 3) return nullptr;
  if (!same_length(4) || !same_length(5) || !same_length(7)) return nullptr;
  static constexpr c10::Symbol kPlain[] = {aten::conv1d, aten::conv2d, aten::conv3d};
  static constexpr c10::Symbol kTransposed[] = {aten::conv_transpose1d, aten::conv_transpose2d,
                                                aten::conv_transpose3d};
  const bool transposes = transposed->toBool();
  const auto order = transposes ? std::vector<std::size_t>{0, 1, 2, 3, 4, 7, 8, 5}
                                : std::vector<std::size_t>{0, 1, 2, 3, 4, 5, 8};
  std::vector<Value*> inputs;
  for (const auto input : order) inputs.push_back(node->input(input));
  return node->owningGraph()->create((transposes ? kTransposed : kPlain)[*dims - 1], inputs);
}

}  // namespace

void replace_node(Node* node, Node* replacement) {
  replacement->copyMetadata(node);
  replacement->output()->copyMetadata(node->output());
  replacement->insertBefore(node);
  TORCH_INTERNAL_ASSERT(replacement->maybeOperator(), "no operator fits ", *replacement);
  node->output()->replaceAllUsesWith(replacement->output());
  node->destroy();
}

namespace {

// Whether a value exists where the node is.
bool is_known_at(const Value* value, const Node* node) {
  const Node* origin = value->node();
  for (const Block* block = node->owningBlock(); block;
       block = block->owningNode() ? block->owningNode()->owningBlock() : nullptr) {
    if (origin == block->param_node()) return true;
    if (origin->owningBlock() == block && origin->kind() != prim::Param)
      return origin->owningGraph() == node->owningGraph();
  }
  return false;
}

}  // namespace

void hook_attention(const AttentionNode& attention, const std::string& site,
                    const LayerInput& layer) {
  static const auto fused = c10::Symbol::fromQualString("sag::attention"),
                    unfused = c10::Symbol::fromQualString("sag::attention_probabilities"),
                    told = c10::Symbol::fromQualString("sag::attention_layer");
  WithInsertPoint before(attention.node);
  Graph& graph = *attention.node->owningGraph();
  if (layer.value && is_tensor(layer.value) && is_known_at(layer.value, attention.node))
    graph.insertNode(graph.create(
        told, {layer.value, graph.insertConstant(layer.channels), graph.insertConstant(site)}, 0));
  // The importer has filled in every default of the running version, so all of SDPA's inputs are
  // there.
  Node* hooked = attention.probabilities
                     ? graph.create(unfused, {attention.probabilities, attention.v,
                                              graph.insertConstant(attention.product)})
                     : graph.create(fused, attention.node->inputs());
  hooked->addInput(graph.insertConstant(site));
  replace_node(attention.node, hooked);
}

std::string marked_block(const Node* node) {
  if (node->kind() != kTransformerBlock) return "";
  // A file may hold such an op of its own, with any path.
  const auto path = toIValue(node->input(2));
  return path && path->isString() ? path->toStringRef() : "";
}

void leave_blocks(Graph& graph, const std::set<std::string>& hooked) {
  for_each_node(graph, [&](Node* node) {
    const auto path = marked_block(node);
    if (path.empty() || hooked.contains(path)) return;
    Node* copied = node->input(0)->node();
    node->output()->replaceAllUsesWith(node->input(1));
    node->destroy();
    // A copy of the input that only the mark needed.
    if (copied->kind() == aten::clone && !copied->output()->hasUses()) copied->destroy();
  });
}

void use_plain_convolutions(Graph& graph) {
  // Not graph_rewrite_helper::replaceConvolutionWithAtenConv: it folds all constants on the way,
  // which would turn the frequencies of an embedding into a constant of the graph.
  for_each_node(graph, [](Node* node) {
    if (node->kind() != aten::_convolution) return;
    if (Node* plain = plain_convolution(node)) replace_node(node, plain);
  });
}

void leave_fast_paths(Graph& graph) {
  for_each_node(graph, [](Node* node) {
    if (!is_fast_path(node)) return;
    // The branch's value also says whether forward returned there.
    for (Block* inside = node->owningBlock(); inside->owningNode();
         inside = inside->owningNode()->owningBlock()) {
      Node* branch = inside->owningNode();
      if (branch->kind() != prim::If || !is_without_text(branch->input(0))) continue;
      WithInsertPoint before(branch->input(0)->node());
      const bool other = inside != branch->blocks()[0];
      branch->input(0)->replaceAllUsesWith(branch->owningGraph()->insertConstant(other));
      return;
    }
  });
}

void move_constants(Graph& graph, torch::Device device) {
  for_each_node(graph, [&](Node* node) {
    if (node->kind() != prim::Constant || !node->hasAttribute(attr::value)) return;
    if (node->output()->type()->kind() == c10::TypeKind::DeviceObjType)
      node->s_(attr::value, device.str());
    else if (holds_tensor(node))
      set_constant(node, constant_on(node->t(attr::value), device));
    else if (node->kindOf(attr::value) == AttributeKind::ival)
      node->ival_(attr::value, constant_on(node->ival(attr::value), device));
  });
}

void let_views_copy(Graph& graph) {
  for_each_node(graph, [](Node* node) {
    const bool to_sizes =
        node->kind() == aten::view && node->input(1)->type()->kind() == c10::TypeKind::ListType;
    if (!to_sizes && node->kind() != aten::view_as) return;
    const auto kind = to_sizes ? aten::reshape : aten::reshape_as;
    replace_node(node, node->owningGraph()->create(kind, node->inputs()));
  });
}

void constants_to_channels_last(Graph& graph) {
  for (auto* node : constant_weights(graph)) {
    const auto value = node->t(attr::value);
    if (value.dim() == 4) set_constant(node, value.contiguous(at::MemoryFormat::ChannelsLast));
  }
}

void convert_constants(Graph& graph, torch::ScalarType dtype) {
  const auto weights = constant_weights(graph);
  for_each_node(graph, [&](Node* node) {
    if (!holds_tensor(node)) return;
    const auto value = node->t(attr::value);
    const bool wider = c10::elementSize(dtype) > c10::elementSize(value.scalar_type());
    if (value.dim() == 0 || !value.is_floating_point() || !(wider || weights.contains(node)))
      return;
    set_constant(node, value.to(dtype));
  });
}

void replace_recorded_dtype(Graph& graph, torch::ScalarType from, torch::ScalarType to) {
  for_each_node(graph, [&](Node* node) {
    const auto* schema = node->maybeSchema();
    if (!schema) return;
    const auto input = schema->argumentIndexWithName("dtype");
    if (!input || static_cast<std::size_t>(*input) >= node->inputs().size()) return;
    const auto recorded = toIValue(node->input(*input));
    if (!recorded || !recorded->isInt() || recorded->toInt() != static_cast<std::int64_t>(from))
      return;
    WithInsertPoint before(node);
    node->replaceInput(*input, node->owningGraph()->insertConstant(static_cast<std::int64_t>(to)));
  });
}

void follow_weights(Graph& graph) {
  drop_widened_attention(graph);
  for_each_node(graph, [](Node* node) {
    if (const auto* op = weighted_op(node)) follow_weights_of(node, *op);
  });
  for (const auto& attention : attention_nodes(graph)) {
    // v comes straight from its projection. q and k may have gone through a wider embedding, and
    // softmax may be wider.
    Node* node = attention.node;
    if (!attention.probabilities) {
      cast_input(node, 0, attention.v);
      cast_input(node, 1, attention.v);
    } else if (auto* operands = node->input(1)->node(); operands->kind() == prim::ListConstruct) {
      // Einsum takes a list.
      cast_input(operands, 0, attention.v);
    }
  }
}

std::optional<torch::ScalarType> constant_weights_dtype(Graph& graph) {
  std::map<torch::ScalarType, std::int64_t> elements;
  for (const Node* constant : constant_weights(graph)) {
    const auto& value = constant->t(attr::value);
    if (value.is_floating_point()) elements[value.scalar_type()] += value.numel();
  }
  if (elements.empty()) return std::nullopt;
  return std::max_element(elements.begin(), elements.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

std::optional<torch::Device> constants_device(Graph& graph) {
  std::optional<torch::Device> device;
  for_each_node(graph, [&](Node* node) {
    if (device || !holds_tensor(node) || node->t(attr::value).dim() == 0) return;
    device = node->t(attr::value).device();
  });
  return device;
}

}  // namespace sag

#include "flatten.h"

#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/constant_propagation.h>

#include "attention_nodes.h"
#include "graph_walk.h"
#include "ops.h"

namespace sag {
namespace {

// Includes c10's prim and attr.
using namespace torch::jit;

// Which module a value holds: its dotted path.
using Paths = std::unordered_map<const Value*, std::string>;

const c10::Symbol kPath = c10::Symbol::attr("sag_path");

std::optional<std::string> path_of(const Value* value, const Paths& paths) {
  if (const auto known = paths.find(value); known != paths.end()) return known->second;
  const Node* node = value->node();
  if (node->kind() != prim::GetAttr) return std::nullopt;
  auto parent = path_of(node->input(), paths);
  if (!parent) return std::nullopt;
  const auto& name = node->s(attr::name);
  return parent->empty() ? name : *parent + "." + name;
}

// The function behind a call, or null: builtin methods, and methods of interfaces, stay calls.
GraphFunction* callee_of(const Node* call) {
  if (call->kind() == prim::CallMethod) {
    const auto owner = call->input(0)->type()->cast<ClassType>();
    return owner ? tryToGraphFunction(owner->getMethod(call->s(attr::name))) : nullptr;
  }
  if (call->kind() == prim::CallFunction)
    return tryToGraphFunction(*call->input(0)->type()->expect<FunctionType>()->function());
  return nullptr;
}

// The part of a path before its last one.
std::string parent_of(const std::string& path) {
  const auto dot = path.rfind('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

// Whether the path is LDM's or diffusers' of a transformer block, "….transformer_blocks.0".
bool is_block(const std::string& path) {
  const auto parent = parent_of(path);
  return parent.substr(parent.rfind('.') + 1) == "transformer_blocks";
}

// Which of a graph's inputs its output was added to, through residual additions alone: what a
// transformer block is given. Nothing: there is not exactly one.
std::optional<std::size_t> residual_input(const Graph& graph) {
  if (graph.outputs().size() != 1) return std::nullopt;
  std::set<std::size_t> found;
  std::set<const Value*> seen;
  std::vector<const Value*> open = {graph.outputs()[0]};
  while (!open.empty()) {
    const Value* value = open.back();
    open.pop_back();
    if (!seen.insert(value).second) continue;
    const Node* node = value->node();
    if (node == graph.param_node()) {
      found.insert(value->offset());
    } else if (node->kind() == aten::add || node->kind() == aten::add_) {
      open.push_back(node->input(0));
      open.push_back(node->input(1));
    } else if (kCasts.contains(node->kind())) {
      open.push_back(node->input(0));
    }
  }
  return found.size() == 1 ? std::make_optional(*found.begin()) : std::nullopt;
}

// Whether the graph writes into a tensor (ComfyUI's blocks: x += …): then the input of a block may
// not be, after it, what the block was given.
bool writes(Graph& graph) {
  bool found = false;
  for_each_node(graph, [&](const Node* node) {
    const auto* schema = node->maybeSchema();
    found = found || (schema && schema->is_mutable());
  });
  return found;
}

bool is_tensor(const Value* value) {
  return value->type()->isSubtypeOf(*TensorType::get());
}

Value* copy_of(Value* input, Node* before) {
  WithInsertPoint at(before);
  Graph& graph = *before->owningGraph();
  return graph.insert(aten::clone, {input});
}

// Marks what a block returns, so that hooks find it.
void mark_block(Value* input, Value* output, const std::string& path, Node* before) {
  WithInsertPoint at(before);
  Graph& graph = *before->owningGraph();
  Node* mark = graph.create(kTransformerBlock, {input, output, graph.insertConstant(path)});
  graph.insertNode(mark);
  output->replaceAllUsesAfterNodeWith(mark, mark->output());
}

// torch::jit::Inline would lose the names of module lists. It also reads caches of the caller's
// functions, which another thread may have filled without inlining. Here every call gets its own
// copy of the callee, so instances of one class stay apart.
void flatten_block(Block* block, const Paths& paths, const std::string& here);

Paths paths_inside(const Graph& callee, at::ArrayRef<Value*> arguments, const Paths& paths) {
  Paths inside;
  for (std::size_t i = 0; i < arguments.size(); ++i)
    if (auto path = path_of(arguments[i], paths)) inside[callee.inputs()[i]] = *path;
  return inside;
}

void inline_call(Node* call, GraphFunction& function, const Paths& paths, const std::string& here) {
  const auto owner =
      call->kind() == prim::CallMethod ? path_of(call->input(0), paths) : std::nullopt;
  if (call->kind() == prim::CallFunction) call->removeInput(0);
  function.ensure_defined();
  const auto callee = function.graph()->copy();
  flatten_block(callee->block(), paths_inside(*callee, call->inputs(), paths),
                owner.value_or(here));
  const bool is_marked = owner && is_block(*owner) && call->s(attr::name) == "forward";
  const auto given = is_marked ? residual_input(*callee) : std::nullopt;
  const bool is_known = given && is_tensor(call->input(*given)) && is_tensor(call->output());
  Value* input = is_known ? call->input(*given) : nullptr;
  if (input && writes(*callee)) input = copy_of(input, call);
  Node* after = call->next();
  const auto outputs = inlineCallTo(call, &function, callee.get());
  if (input) mark_block(input, outputs.front(), *owner, after);
}

void flatten_block(Block* block, const Paths& paths, const std::string& here) {
  for_each_node_of(block, [&](Node* node) {
    if (auto* function = callee_of(node)) {
      inline_call(node, *function, paths, here);
      return;
    }
    if (may_be_attention(node)) node->s_(kPath, here);
    for (Block* inner : node->blocks()) flatten_block(inner, paths, here);
    if (auto* forked = subgraph_of(node))
      flatten_block(forked->block(), paths_inside(*forked, node->inputs(), paths), here);
  });
}

}  // namespace

FlatGraph flatten(const Module& module) {
  auto& forward = toGraphFunction(module.get_method("forward").function());
  forward.ensure_defined();
  FlatGraph flat{forward.graph()->copy(), {}};
  flatten_block(flat.graph->block(), {{flat.graph->inputs()[0], ""}}, "");
  // Scripted functions ask what they were given (softmax, whether its dim is None): now it is
  // known.
  ConstantPropagationImmutableTypes(flat.graph);
  for (const auto& attention : attention_nodes(*flat.graph))
    flat.attention_paths.push_back(attention.node->s(kPath));
  for_each_node(*flat.graph, [](Node* node) {
    if (node->hasAttribute(kPath)) node->removeAttribute(kPath);
  });
  return flat;
}

}  // namespace sag

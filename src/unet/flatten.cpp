#include "flatten.h"

#include <optional>
#include <unordered_map>
#include <utility>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/constant_propagation.h>

#include "attention_nodes.h"
#include "graph_walk.h"

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
  inlineCallTo(call, &function, callee.get());
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

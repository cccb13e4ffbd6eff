#include "attention_sites.h"

#include <algorithm>
#include <set>

#include <c10/util/StringUtil.h>
#include <torch/csrc/jit/ir/ir.h>

#include "attention_nodes.h"
#include "ops.h"
#include "site_names.h"

namespace sag {
namespace {

using namespace torch::jit;

using Values = std::set<const Value*>;

// The value that a projection is applied to, or null if the node is not a projection.
const Value* projected(const Node* node) {
  static const Ops ops = {aten::linear, aten::matmul, aten::conv1d, aten::conv2d,
                          aten::_convolution};
  if (ops.contains(node->kind())) return node->input(0);
  return node->kind() == aten::addmm ? node->input(1) : nullptr;
}

// Sees through what exporters put between a layer's input and its projections.
const Value* without_casts(const Value* value) {
  while (kCasts.contains(value->node()->kind())) value = value->node()->input(0);
  return value;
}

bool carries_tensors(const Value* value) {
  const auto kind = value->type()->kind();
  return kind == c10::TypeKind::TensorType || kind == c10::TypeKind::ListType ||
         kind == c10::TypeKind::TupleType || kind == c10::TypeKind::OptionalType;
}

// Adds to `sources` the layer inputs that `value` was projected from.
void trace_back(const Value* value, Values& sources, Values& seen) {
  if (!carries_tensors(value) || !seen.insert(value).second) return;
  const Node* node = value->node();
  if (const Value* input = projected(node)) {
    sources.insert(without_casts(input));
  } else if (node->kind() == prim::If) {
    for (const Block* side : node->blocks())
      trace_back(side->outputs()[value->offset()], sources, seen);
  } else if (node->kind() == prim::Param || !node->blocks().empty()) {
    sources.insert(value);
  } else if (node->kind() != prim::GetAttr) {
    // What an attribute stores is a weight.
    for (const Value* input : node->inputs()) trace_back(input, sources, seen);
  }
}

Values sources_of(const Value* value) {
  Values sources, seen;
  trace_back(value, sources, seen);
  return sources;
}

std::string last_component(const std::string& path) {
  return path.substr(path.rfind('.') + 1);
}

bool is_self_attention(const AttentionNode& attention, const std::string& path) {
  const auto name = last_component(path);
  if (name == "attn1") return true;
  if (name == "attn2") return false;
  const auto q = sources_of(attention.q);
  return !q.empty() && q == sources_of(attention.k);
}

}  // namespace

LayerInput layer_input(const AttentionNode& attention) {
  static const Ops over_last_dim = {aten::linear, aten::matmul, aten::addmm};
  static const Ops convolutions = {aten::conv1d, aten::conv2d, aten::_convolution};
  const auto sources = sources_of(attention.q);
  if (sources.size() != 1) return {};
  const Value* source = *sources.begin();
  const auto is_input_of = [source](const Ops& ops) {
    return std::any_of(source->uses().begin(), source->uses().end(),
                       [&](const Use& use) { return ops.contains(use.user->kind()); });
  };
  // A picture may also be used without a projection.
  const bool is_picture = is_input_of(convolutions) || source->node()->kind() == prim::Param;
  return {const_cast<Value*>(source), is_picture && !is_input_of(over_last_dim) ? 1 : -1};
}

std::vector<AttentionSiteInfo> self_attention_sites(const FlatGraph& flat) {
  std::vector<AttentionSiteInfo> sites;
  const auto nodes = attention_nodes(*flat.graph);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const auto& path = flat.attention_paths[i];
    if (!is_self_attention(nodes[i], path)) continue;
    const bool is_known = !path.empty() && std::any_of(sites.begin(), sites.end(), [&](auto& site) {
      return site.path == path;
    });
    if (is_known) continue;
    sites.push_back(make_site(path, static_cast<std::int64_t>(i)));
  }
  return sites;
}

std::vector<std::size_t> nodes_of(const FlatGraph& flat, const AttentionSiteInfo& site) {
  const auto first = static_cast<std::size_t>(site.ordinal);
  if (site.path.empty()) return {first};
  std::vector<std::size_t> found;
  const auto nodes = attention_nodes(*flat.graph);
  TORCH_INTERNAL_ASSERT(nodes.size() == flat.attention_paths.size());
  for (std::size_t i = first; i < nodes.size(); ++i)
    if (flat.attention_paths[i] == site.path && is_self_attention(nodes[i], site.path))
      found.push_back(i);
  return found;
}

}  // namespace sag

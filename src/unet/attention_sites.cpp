#include "attention_sites.h"

#include <algorithm>
#include <set>

#include <c10/util/StringUtil.h>
#include <torch/csrc/jit/ir/ir.h>

#include "attention_nodes.h"
#include "graph_rewrite.h"
#include "graph_walk.h"
#include "model/site_list.h"
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

// What a value was projected from: the inputs of layers, and the projections.
struct Sources {
  Values values;
  std::set<const Node*> projections;
};

void trace_back(const Value* value, Sources& sources, Values& seen) {
  if (!carries_tensors(value) || !seen.insert(value).second) return;
  const Node* node = value->node();
  if (const Value* input = projected(node)) {
    sources.values.insert(without_casts(input));
    sources.projections.insert(node);
  } else if (node->kind() == prim::If) {
    for (const Block* side : node->blocks())
      trace_back(side->outputs()[value->offset()], sources, seen);
  } else if (node->kind() == prim::Param || !node->blocks().empty()) {
    sources.values.insert(value);
  } else if (node->kind() != prim::GetAttr) {
    // What an attribute stores is a weight.
    for (const Value* input : node->inputs()) trace_back(input, sources, seen);
  }
}

Sources sources_of(const Value* value) {
  Sources sources;
  Values seen;
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
  const auto q = sources_of(attention.q).values;
  return !q.empty() && q == sources_of(attention.k).values;
}

}  // namespace

LayerInput layer_input(const AttentionNode& attention) {
  static const Ops over_last_dim = {aten::linear, aten::matmul, aten::addmm};
  static const Ops convolutions = {aten::conv1d, aten::conv2d, aten::_convolution};
  const auto sources = sources_of(attention.q).values;
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

namespace {

// Whether nothing but these projections reads a value's content, directly or through casts.
bool is_read_only_by(const std::set<const Node*>& projections, const Value* value) {
  return std::all_of(value->uses().begin(), value->uses().end(), [&](const Use& use) {
    const Node* user = use.user;
    if (projections.contains(user)) return true;
    if (kCasts.contains(user->kind())) return is_read_only_by(projections, user->output());
    // Its sizes may be asked for.
    return std::none_of(user->outputs().begin(), user->outputs().end(), carries_tensors) &&
           user->blocks().empty() && user->kind() != prim::Return;
  });
}

bool attends_to_others(const AttentionNode& attention) {
  return sources_of(attention.k).values != sources_of(attention.q).values;
}

// The input of the graph that keys and values are projected from; null: there is not exactly one.
const Value* context_of(const AttentionNode& attention, const Graph& graph) {
  const auto keys = sources_of(attention.k).values;
  const bool is_one = keys.size() == 1 && keys == sources_of(attention.v).values;
  return is_one && (*keys.begin())->node() == graph.param_node() ? *keys.begin() : nullptr;
}

}  // namespace

std::vector<AttentionSiteInfo> cross_attention_sites(const FlatGraph& flat) {
  if (!is_known_unet(self_attention_sites(flat))) return {};
  std::vector<AttentionSiteInfo> sites;
  std::set<const Node*> projections;
  const Value* context = nullptr;
  const auto nodes = attention_nodes(*flat.graph);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (!attends_to_others(nodes[i])) continue;
    const auto& path = flat.attention_paths[i];
    const Value* read = context_of(nodes[i], *flat.graph);
    if (last_component(path) != "attn2" || !read || (context && read != context)) return {};
    context = read;
    projections.merge(sources_of(nodes[i].k).projections);
    projections.merge(sources_of(nodes[i].v).projections);
    const bool is_known = std::any_of(sites.begin(), sites.end(),
                                      [&](const auto& site) { return site.path == path; });
    if (!is_known) sites.push_back(make_cross_site(path, static_cast<std::int64_t>(i)));
  }
  const bool is_theirs = !context || is_read_only_by(projections, context);
  return is_theirs ? sites : std::vector<AttentionSiteInfo>();
}

std::vector<AttentionSiteInfo> block_sites(const FlatGraph& flat) {
  std::vector<AttentionSiteInfo> sites;
  for_each_node(*flat.graph, [&](const Node* node) {
    const auto path = marked_block(node);
    const bool is_known = std::any_of(sites.begin(), sites.end(),
                                      [&](const auto& site) { return site.path == path; });
    if (!path.empty() && !is_known) sites.push_back(make_block_site(path));
  });
  return sites;
}

std::vector<std::size_t> nodes_of(const FlatGraph& flat, const AttentionSiteInfo& site) {
  const auto first = static_cast<std::size_t>(site.ordinal);
  if (site.path.empty()) return {first};
  std::vector<std::size_t> found;
  const auto nodes = attention_nodes(*flat.graph);
  TORCH_INTERNAL_ASSERT(nodes.size() == flat.attention_paths.size());
  const bool is_self = is_self_attention(nodes[first], site.path);
  for (std::size_t i = first; i < nodes.size(); ++i)
    if (flat.attention_paths[i] == site.path && is_self_attention(nodes[i], site.path) == is_self)
      found.push_back(i);
  return found;
}

}  // namespace sag

#include "attention_sites.h"

#include <algorithm>
#include <iterator>
#include <regex>
#include <set>
#include <unordered_set>

#include <c10/util/StringUtil.h>
#include <torch/csrc/jit/ir/ir.h>

#include "attention_nodes.h"

namespace sag {
namespace {

using namespace torch::jit;

using Values = std::set<const Value*>;

bool is_any_of(const Node* node, const std::unordered_set<std::string>& kinds) {
  return kinds.count(node->kind().toQualString()) > 0;
}

// The value that a projection is applied to, or null if the node is none.
const Value* projected(const Node* node) {
  if (is_any_of(node, {"aten::linear", "aten::matmul", "aten::conv1d", "aten::conv2d",
                       "aten::_convolution"})) {
    return node->input(0);
  }
  return is_any_of(node, {"aten::addmm"}) ? node->input(1) : nullptr;
}

// Sees through what exporters put between a layer's input and its projections.
const Value* without_casts(const Value* value) {
  while (is_any_of(value->node(), {"aten::to", "aten::type_as", "aten::contiguous", "aten::dropout",
                                   "aten::detach", "aten::clone"})) {
    value = value->node()->input(0);
  }
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
  } else if (node->kind() != prim::GetAttr) {  // what is stored is a weight
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

std::string short_site_name(const std::string& path) {
  static const std::regex ldm(
      R"((?:.*\.)?(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.(\d+)\.attn1)");
  static const std::regex diffusers(
      R"((?:.*\.)?mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.attn1)");
  std::smatch match;
  if (path.size() > 1000) return "";  // std::regex recurses with every character
  if (std::regex_match(path, match, ldm)) {
    const auto block = match[1].matched ? c10::str(match.str(1), ".", match.str(2)) : "middle.0";
    return c10::str(block, ".", match.str(3));
  }
  if (std::regex_match(path, match, diffusers)) return c10::str("middle.0.", match.str(1));
  return "";
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
    auto name = short_site_name(path);
    if (name.empty()) name = path.empty() ? c10::str("#", i) : path;
    sites.push_back({std::move(name), path, static_cast<std::int64_t>(i)});
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

const AttentionSiteInfo& site_called(const std::vector<AttentionSiteInfo>& sites,
                                     const std::string& name, const char* caller) {
  const auto is_called = [&](const auto& site) { return site.name == name || site.path == name; };
  const auto count = std::count_if(sites.begin(), sites.end(), is_called);
  TORCH_CHECK_VALUE(count > 0, "[", caller, "] hooked sites must be the UNet's, got '", name, "'; ",
                    list_sites(sites));
  TORCH_CHECK_VALUE(count == 1, "[", caller, "] a hooked site must be one attention, but '", name,
                    "' stands for ", count, " in this file");
  return *std::find_if(sites.begin(), sites.end(), is_called);
}

std::string list_sites(const std::vector<AttentionSiteInfo>& sites) {
  if (sites.empty()) return "it has no self-attention";
  std::string text = "its self-attentions are ";
  for (const auto& site : sites) {
    if (&site != &sites.front()) text += ", ";
    text += site.name;
    if (site.path != site.name && !site.path.empty()) text += c10::str(" (", site.path, ")");
  }
  return text;
}

}  // namespace sag

#pragma once

#include <cstddef>
#include <vector>

#include "attention_nodes.h"
#include "flatten.h"
#include "sag/unet.h"

// Which attentions of a flattened graph hooks can be set on.
namespace sag {

/// Returns the self-attentions in order of execution, one per path.
std::vector<AttentionSiteInfo> self_attention_sites(const FlatGraph& flat);

/// Returns the cross-attentions in order of execution, one per path: all that there are, in a
/// network of LDM's or diffusers' names in which only they read the context; else none.
std::vector<AttentionSiteInfo> cross_attention_sites(const FlatGraph& flat);

/// Returns the marked transformer blocks in order of execution, one per path.
std::vector<AttentionSiteInfo> block_sites(const FlatGraph& flat);

/// Returns which of the graph's attentions belong to a site: several if the network splits its
/// batch.
std::vector<std::size_t> nodes_of(const FlatGraph& flat, const AttentionSiteInfo& site);

/// Returns what the layer of an attention is applied to: the value that q is projected from, if
/// there is exactly one.
LayerInput layer_input(const AttentionNode& attention);

}  // namespace sag

#pragma once

#include <string>
#include <vector>

#include "flatten.h"
#include "sag/unet.h"

namespace sag {

/// Returns ComfyUI's name of the attention with this path ("middle.0.0"), under any prefix, in
/// LDM's naming and for the middle block in diffusers'; empty if there is none.
std::string short_site_name(const std::string& path);

/// Returns the self-attentions of a flattened graph in order of execution, one per path.
std::vector<AttentionSiteInfo> self_attention_sites(const FlatGraph& flat);

/// Returns which of the graph's attentions a site stands for. There are several where a network
/// splits its batch.
std::vector<std::size_t> nodes_of(const FlatGraph& flat, const AttentionSiteInfo& site);

/// Returns the site of that name or path, which a hook is set on. Throws ValueError, as `caller`,
/// unless there is just one.
const AttentionSiteInfo& site_called(const std::vector<AttentionSiteInfo>& sites,
                                     const std::string& name, const char* caller);

/// Returns a sentence that lists the sites, for errors.
std::string list_sites(const std::vector<AttentionSiteInfo>& sites);

}  // namespace sag

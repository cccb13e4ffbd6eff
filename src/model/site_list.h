#pragma once

#include <string>
#include <vector>

#include "sag/unet.h"

// Lists of sites: which one a name means, and how errors list them.
namespace sag {

/// Returns the sites whose name, path or "#ordinal" is `name`.
std::vector<AttentionSiteInfo> sites_called(const std::vector<AttentionSiteInfo>& sites,
                                            const std::string& name);

/// Returns the site that a hook gets, and why: by name or, for "middle", by the names of the UNet's
/// sites. Its `site` is empty where only a probe can tell. Throws ValueError, with the list of
/// sites, when there is none or more than one.
SiteChoice choose_site(const UNet& unet, const AttentionSite& site);

/// Returns what a hook calls a cross-attention: its path, as the name is that of the self-attention
/// beside it. Throws ValueError, with the list of sites, when there is none or more than one.
std::string choose_cross_site(const UNet& unet, const AttentionSite& site);

/// The same for a transformer block.
std::string choose_block(const UNet& unet, const AttentionSite& block);

/// Returns whether the names are those of LDM's or diffusers' UNets (an attn1 inside of
/// input_blocks, mid_block and so on), where only cross-attention reads the context. Transformers
/// use the name attn1 for joint attention, too.
bool is_known_unet(const std::vector<AttentionSiteInfo>& sites);

/// Returns all that a site is called: "middle.0.0 (middle_block.1.transformer_blocks.0.attn1, #6)".
std::string describe_site(const AttentionSiteInfo& site);

/// Returns a sentence that lists the sites. `kind`: what they are.
std::string list_sites(const std::vector<AttentionSiteInfo>& sites,
                       const std::string& kind = "self-attention");

}  // namespace sag

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

/// Returns whether the network attends to text in cross-attention only, as far as names tell:
/// blocks whose self-attention is called attn1 have it in their attn2.
bool attends_to_text_apart(const std::vector<AttentionSiteInfo>& sites);

/// Returns all that a site is called: "middle.0.0 (middle_block.1.transformer_blocks.0.attn1, #6)".
std::string describe_site(const AttentionSiteInfo& site);

/// Returns a sentence that lists the sites.
std::string list_sites(const std::vector<AttentionSiteInfo>& sites);

}  // namespace sag

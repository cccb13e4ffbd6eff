#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sag/unet.h"

// The names of attentions.
namespace sag {

/// Returns ComfyUI's name of the attention with this path ("middle.0.0"), under any prefix: for
/// LDM's naming, and for the middle block in diffusers'. Empty for all others.
std::string short_site_name(const std::string& path);

/// Returns the site with this path and ordinal. Its name is the short one, else the path, else
/// "#ordinal".
AttentionSiteInfo make_site(const std::string& path, std::int64_t ordinal);

/// Returns the cross-attention with this path, which ends with attn2. Its name is that of the
/// self-attention beside it, else the path.
AttentionSiteInfo make_cross_site(const std::string& path, std::int64_t ordinal);

/// Returns the transformer block with this path. Its name is that of its first self-attention, else
/// the path.
AttentionSiteInfo make_block_site(const std::string& path);

/// Returns the site that a hook names: the path of a cross-attention, or any name of a
/// self-attention. Throws ValueError, as `caller`, unless there is exactly one.
AttentionSiteInfo hooked_site(const std::vector<AttentionSiteInfo>& sites,
                              const std::vector<AttentionSiteInfo>& cross_sites,
                              const std::string& name, const char* caller);

}  // namespace sag

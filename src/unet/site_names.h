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

/// Returns the site that a hook names. Throws ValueError, as `caller`, unless there is exactly one.
AttentionSiteInfo hooked_site(const std::vector<AttentionSiteInfo>& sites, const std::string& name,
                              const char* caller);

}  // namespace sag

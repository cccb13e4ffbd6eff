#include "site_list.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>

#include <c10/util/StringUtil.h>

namespace sag {
namespace {

// "#6", or empty if the place is unknown.
std::string number_of(const AttentionSiteInfo& site) {
  return site.ordinal >= 0 ? c10::str("#", site.ordinal) : "";
}

}  // namespace

std::vector<AttentionSiteInfo> sites_called(const std::vector<AttentionSiteInfo>& sites,
                                            const std::string& name) {
  std::vector<AttentionSiteInfo> found;
  std::copy_if(sites.begin(), sites.end(), std::back_inserter(found), [&](const auto& site) {
    return name == site.name || name == site.path || (!name.empty() && name == number_of(site));
  });
  return found;
}

bool is_known_unet(const std::vector<AttentionSiteInfo>& sites) {
  // LDM's parts, then diffusers'.
  static constexpr std::array<std::string_view, 6> kParts = {"input_blocks.",  "middle_block.",
                                                             "output_blocks.", "down_blocks.",
                                                             "mid_block.",     "up_blocks."};
  return !sites.empty() && std::all_of(sites.begin(), sites.end(), [](const auto& site) {
    return site.path.ends_with(".attn1") &&
           std::any_of(kParts.begin(), kParts.end(), [&](std::string_view part) {
             return site.path.find(part) != std::string::npos;
           });
  });
}

std::string describe_site(const AttentionSiteInfo& site) {
  std::string others;
  for (const auto& name : {site.path, number_of(site)})
    if (!name.empty() && name != site.name) others += (others.empty() ? "" : ", ") + name;
  return others.empty() ? site.name : c10::str(site.name, " (", others, ")");
}

std::string list_sites(const std::vector<AttentionSiteInfo>& sites, const std::string& kind) {
  if (sites.empty()) return "It has no " + kind + " that can be hooked.";
  std::string text;
  for (const auto& site : sites) text += (text.empty() ? "" : ", ") + describe_site(site);
  return "Its " + kind + "s are " + text + ".";
}

}  // namespace sag

#include "sag/unet.h"

#include <algorithm>
#include <iterator>

#include <c10/util/StringUtil.h>

namespace sag {
namespace {

bool answers_to(const AttentionSiteInfo& info, const std::string& name) {
  return name == info.name || name == info.path ||
         (info.ordinal >= 0 && name == c10::str("#", info.ordinal));
}

std::string list(const std::vector<AttentionSiteInfo>& sites) {
  if (sites.empty()) return "It has none.";
  std::string text = "Its self-attentions are:";
  for (const auto& site : sites) {
    text += "\n  " + site.name;
    if (!site.path.empty() && site.path != site.name) text += "  " + site.path;
    if (site.ordinal >= 0) text += c10::str("  #", site.ordinal);
  }
  return text;
}

}  // namespace

UNet::~UNet() = default;

std::string UNet::note_on_sites() const {
  return "";
}

std::string resolve_attention_site(const UNet& unet, const AttentionSite& site) {
  const auto sites = unet.attention_sites();
  const auto note = unet.note_on_sites();
  std::vector<AttentionSiteInfo> found;
  std::copy_if(sites.begin(), sites.end(), std::back_inserter(found),
               [&](const auto& info) { return answers_to(info, site.name()); });
  TORCH_CHECK_VALUE(!found.empty(),
                    "[resolve_attention_site] site must be a self-attention of this UNet, got \"",
                    site.name(), "\". ", list(sites), note.empty() ? "" : "\n", note);
  TORCH_CHECK_VALUE(
      found.size() == 1, "[resolve_attention_site] site must name one self-attention, but \"",
      site.name(), "\" fits ", found.size(), "; use its path or #ordinal. ", list(found));
  const auto& name = found.front().name;
  const bool unique = std::count_if(sites.begin(), sites.end(),
                                    [&](const auto& info) { return info.name == name; }) == 1;
  TORCH_CHECK_VALUE(unique || !found.front().path.empty(), "[resolve_attention_site] site \"",
                    site.name(),
                    "\" must have a name or a path of its own, but several are called \"", name,
                    "\". ", list(sites));
  return unique ? name : found.front().path;
}

}  // namespace sag

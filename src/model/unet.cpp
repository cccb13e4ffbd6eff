#include "sag/unet.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <mutex>

#include <c10/util/StringUtil.h>

#include "attention/attention_scope_state.h"
#include "latent.h"
#include "sag/attention_scope.h"
#include "sag/step_context.h"
#include "site_list.h"

namespace sag {
namespace {

constexpr const char* kMiddle = "middle";

// The part of a site's path, or of its name, that says "middle block"; empty if there is none.
std::string middle_part(const AttentionSiteInfo& site) {
  constexpr std::array<std::string_view, 6> kParts = {"mid",       "middle",   "middle_block",
                                                      "mid_block", "mid_attn", "bottleneck"};
  const auto& path = site.path.empty() ? site.name : site.path;
  for (std::size_t begin = 0; begin <= path.size();) {
    const auto end = std::min(path.find('.', begin), path.size());
    const auto part = std::string_view(path).substr(begin, end - begin);
    if (std::find(kParts.begin(), kParts.end(), part) != kParts.end()) return std::string(part);
    begin = end + 1;
  }
  return "";
}

// What hooks call a site: its name, or the path where several share the name.
const std::string& own_name(const std::vector<AttentionSiteInfo>& sites,
                            const AttentionSiteInfo& site) {
  const auto same = [&](const auto& other) { return other.name == site.name; };
  return std::count_if(sites.begin(), sites.end(), same) == 1 ? site.name : site.path;
}

// The same for a cross-attention, whose name is that of the self-attention beside it.
const std::string& key_of_cross_site(const AttentionSiteInfo& site) {
  TORCH_CHECK_VALUE(!site.path.empty(), "[UNet::cross_attention_sites] site \"", site.name,
                    "\" must have a path, got none.");
  return site.path;
}

// Adds one of the site's calls; there are several if the network splits the batch.
void add_call(AttentionSiteShape& shape, const AttentionCall& call) {
  const auto& queries = call.probabilities.defined() ? call.probabilities : call.q;
  const auto heads = c10::multiply_integers(queries.sizes().begin(), queries.sizes().end() - 2);
  // Summed over all rows; divided by their number after the last call.
  shape.heads += heads;
  shape.tokens = queries.size(-2);
  shape.key_tokens = call.probabilities.defined() ? queries.size(-1) : call.k.size(-2);
  shape.head_dim = call.probabilities.defined()
                       ? call.v.numel() / std::max<std::int64_t>(heads * queries.size(-1), 1)
                       : call.q.size(-1);
}

}  // namespace

UNet::~UNet() = default;

std::vector<AttentionSiteInfo> UNet::cross_attention_sites() const {
  return {};
}

std::vector<AttentionSiteInfo> UNet::block_sites() const {
  return {};
}

std::int64_t UNet::max_rows() const {
  return 0;
}

std::int64_t UNet::evaluated_rows(c10::IntArrayRef x) const {
  return x.front();
}

std::string UNet::note_on_sites() const {
  return "";
}

namespace {

// Returns the own name of the only site in `found`.
std::string only_name(const UNet& unet, const std::vector<AttentionSiteInfo>& found,
                      const std::string& asked) {
  const auto sites = unet.attention_sites();
  TORCH_CHECK_VALUE(found.size() == 1,
                    "[resolve_attention_site] site must name one self-attention, but \"", asked,
                    "\" matches ", found.size(), "; use its path or #ordinal. ", list_sites(found));
  const auto& name = own_name(sites, found.front());
  TORCH_CHECK_VALUE(!name.empty(), "[resolve_attention_site] site \"", asked,
                    "\" must have a name or a path of its own, but several are called \"",
                    found.front().name, "\". ", list_sites(sites));
  return name;
}

}  // namespace

SiteChoice choose_site(const UNet& unet, const AttentionSite& site) {
  const auto sites = unet.attention_sites();
  const auto note = unet.note_on_sites();
  const auto found = sites_called(sites, site.name());
  if (found.empty() && site.name() == kMiddle)
    return find_middle_attention(unet).value_or(SiteChoice{.asked = kMiddle});
  TORCH_CHECK_VALUE(!found.empty(),
                    "[resolve_attention_site] site must be a self-attention of this UNet, got \"",
                    site.name(), "\". ", list_sites(sites), note.empty() ? "" : " ", note);
  return {site.name(), only_name(unet, found, site.name()), "it was named"};
}

namespace {

// The only one of `sites` with this name, which may be "middle".
AttentionSiteInfo only_one(const UNet& unet, const std::vector<AttentionSiteInfo>& sites,
                           const AttentionSite& site, const std::string& kind, const char* caller) {
  const auto note = unet.note_on_sites();
  TORCH_CHECK_VALUE(!sites.empty(), "[", caller, "] the UNet must list its ", kind, "s, got none.",
                    note.empty() ? "" : " ", note);
  const auto found = sites_called(sites, site.name() == kMiddle ? "middle.0.0" : site.name());
  TORCH_CHECK_VALUE(!found.empty(), "[", caller, "] site must be a ", kind, " of this UNet, got \"",
                    site.name(), "\". ", list_sites(sites, kind));
  TORCH_CHECK_VALUE(found.size() == 1, "[", caller, "] site must name one ", kind, ", but \"",
                    site.name(), "\" matches ", found.size(), ". ", list_sites(sites, kind));
  return found.front();
}

}  // namespace

std::string choose_cross_site(const UNet& unet, const AttentionSite& site) {
  return key_of_cross_site(only_one(unet, unet.cross_attention_sites(), site, "cross-attention",
                                    "ModelPatcher::set_attn2_replace"));
}

std::string choose_block(const UNet& unet, const AttentionSite& block) {
  return key_of_block(only_one(unet, unet.block_sites(), block, "transformer block",
                               "ModelPatcher::set_block_replace")
                          .path);
}

std::string resolve_attention_site(const UNet& unet, const AttentionSite& site) {
  const auto choice = choose_site(unet, site);
  TORCH_CHECK_VALUE(!choice.site.empty(),
                    "[resolve_attention_site] site must be named for this UNet, as the names of "
                    "its sites do not say which is the middle block's. ",
                    list_sites(unet.attention_sites()));
  return choice.site;
}

std::optional<SiteChoice> find_middle_attention(const UNet& unet) {
  const auto sites = unet.attention_sites();
  const auto note = unet.note_on_sites();
  TORCH_CHECK_VALUE(!sites.empty(),
                    "[find_middle_attention] the UNet must have a self-attention that can be "
                    "hooked, got none.",
                    note.empty() ? "" : " ", note);
  if (const auto known = sites_called(sites, "middle.0.0"); !known.empty())
    return SiteChoice{kMiddle, only_name(unet, known, "middle.0.0"), "its name is middle.0.0"};
  // Where some sites are missing, the only one, or the one with the fewest tokens, means nothing.
  if (sites.size() == 1 && note.empty())
    return SiteChoice{kMiddle, own_name(sites, sites.front()), "it is the only self-attention"};
  std::vector<AttentionSiteInfo> found;
  std::copy_if(sites.begin(), sites.end(), std::back_inserter(found),
               [](const auto& site) { return !middle_part(site).empty(); });
  TORCH_CHECK_VALUE(!found.empty() || note.empty(),
                    "[find_middle_attention] site must be named for this UNet, as it does not list "
                    "all its self-attentions and none of these is called the middle block's. ",
                    list_sites(sites), " ", note);
  if (found.empty()) return std::nullopt;
  TORCH_CHECK_VALUE(found.size() == 1, "[find_middle_attention] site must be named for this UNet, ",
                    "as ", found.size(), " self-attentions are in its middle block. ",
                    list_sites(found));
  return SiteChoice{kMiddle, only_name(unet, found, kMiddle),
                    middle_part(found.front()) + " is a part of its path"};
}

SiteChoice find_middle_attention(std::span<const AttentionSiteShape> probed) {
  std::vector<AttentionSiteInfo> sites;
  std::string text;
  std::int64_t fewest = 0;
  for (const auto& shape : probed) {
    sites.push_back(shape.site);
    text += c10::str(text.empty() ? "" : ", ", describe_site(shape.site), " with ", shape.tokens,
                     " tokens");
    if (shape.tokens > 0 && (fewest == 0 || shape.tokens < fewest)) fewest = shape.tokens;
  }
  const auto has_fewest = [fewest](const auto& shape) { return shape.tokens == fewest; };
  TORCH_CHECK_VALUE(fewest > 0 && std::count_if(probed.begin(), probed.end(), has_fewest) == 1,
                    "[find_middle_attention] site must be named for this UNet, as no single "
                    "self-attention has the fewest tokens. Its self-attentions are ",
                    text, ".");
  // A probe cannot look at sites that share their name, so it does not know which has the fewest.
  for (const auto& site : sites)
    TORCH_CHECK_VALUE(
        !own_name(sites, site).empty(), "[find_middle_attention] site \"", site.name,
        "\" must have a name or a path of its own, but several have this name: ", text, ".");
  const auto& chosen = *std::find_if(probed.begin(), probed.end(), has_fewest);
  return {
      kMiddle, own_name(sites, chosen.site),
      c10::str("it has the fewest tokens, ", fewest, ", of ", probed.size(), " self-attentions")};
}

namespace {

// `keys`: what hooks call the sites; empty: it cannot be looked at.
std::vector<AttentionSiteShape> probe(const UNet& unet, const UNetInput& input,
                                      const std::vector<AttentionSiteInfo>& sites,
                                      const std::vector<std::string>& keys) {
  const auto rows = input.x.size(0);
  std::vector<AttentionSiteShape> shapes(sites.size());
  std::vector<InstalledHook> hooks;
  // Forked parts of a network may run at the same time.
  std::mutex mutex;
  for (std::size_t i = 0; i < sites.size(); ++i) {
    shapes[i].site = sites[i];
    const auto look = [&mutex, &shape = shapes[i]](const AttentionCall& call, const Pass&,
                                                   const NextAttention& next) {
      {
        const std::lock_guard lock(mutex);
        add_call(shape, call);
      }
      return next(call);
    };
    if (!keys[i].empty()) hooks.push_back({keys[i], look, {}});
  }
  StepContext step(0, 0, input.x.size(2), input.x.size(3));
  run_hooked(std::move(hooks), {.groups = {{.count = rows}}, .step = &step},
             [&] { return unet.forward(input); });
  // Hooks see the rows that fill a call up, too.
  const auto evaluated = unet.evaluated_rows(input.x.sizes());
  for (auto& shape : shapes) shape.heads /= evaluated;
  return shapes;
}

}  // namespace

std::vector<AttentionSiteShape> probe_attention_sites(const UNet& unet, const UNetInput& input) {
  check_latent(input.x, "x", "probe_attention_sites");
  const auto sites = unet.attention_sites();
  std::vector<std::string> keys;
  for (const auto& site : sites) keys.push_back(own_name(sites, site));
  return probe(unet, input, sites, keys);
}

std::vector<AttentionSiteShape> probe_cross_attention_sites(const UNet& unet,
                                                            const UNetInput& input) {
  check_latent(input.x, "x", "probe_cross_attention_sites");
  const auto sites = unet.cross_attention_sites();
  std::vector<std::string> keys;
  for (const auto& site : sites) keys.push_back(key_of_cross_site(site));
  return probe(unet, input, sites, keys);
}

}  // namespace sag

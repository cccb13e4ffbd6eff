#include "sag/unet.h"

#include <algorithm>
#include <iterator>
#include <mutex>

#include <c10/util/StringUtil.h>

#include "sag/step_context.h"

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

// What hooks call a site: its name, or the path where several share the name.
const std::string& own_name(const std::vector<AttentionSiteInfo>& sites,
                            const AttentionSiteInfo& site) {
  const auto same = [&](const auto& other) { return other.name == site.name; };
  return std::count_if(sites.begin(), sites.end(), same) == 1 ? site.name : site.path;
}

// Adds one of the site's calls, of which there are several where the network splits the batch.
void add_call(AttentionSiteShape& shape, const AttentionCall& call) {
  const auto& queries = call.probabilities.defined() ? call.probabilities : call.q;
  const auto heads = c10::multiply_integers(queries.sizes().begin(), queries.sizes().end() - 2);
  shape.heads += heads;  // of all rows, until the last call is in
  shape.tokens = queries.size(-2);
  shape.head_dim = call.probabilities.defined()
                       ? call.v.numel() / std::max<std::int64_t>(heads * queries.size(-1), 1)
                       : call.q.size(-1);
}

}  // namespace

UNet::~UNet() = default;

std::int64_t UNet::max_rows() const {
  return 0;
}

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
  const auto& name = own_name(sites, found.front());
  TORCH_CHECK_VALUE(!name.empty(), "[resolve_attention_site] site \"", site.name(),
                    "\" must have a name or a path of its own, but several are called \"",
                    found.front().name, "\". ", list(sites));
  return name;
}

std::vector<AttentionSiteShape> probe_attention_sites(const UNet& unet, const UNetInput& input) {
  TORCH_CHECK_VALUE(
      input.x.defined() && input.x.dim() == 4 && input.x.numel() > 0,
      "[probe_attention_sites] x must have shape [rows, channels, height, width], none of them 0, "
      "got ",
      input.x.defined() ? c10::str(input.x.sizes()) : "an undefined tensor", ".");
  const auto rows = input.x.size(0);
  const auto sites = unet.attention_sites();
  std::vector<AttentionSiteShape> shapes(sites.size());
  std::vector<InstalledHook> hooks;
  std::mutex mutex;  // forked parts of a network run beside each other
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
    if (const auto& name = own_name(sites, sites[i]); !name.empty())
      hooks.push_back({name, look, {}});
  }
  StepContext step(0, 0, input.x.size(2), input.x.size(3));
  const AttentionScope scope(std::move(hooks), {.groups = {{.count = rows}}, .step = &step});
  try {
    static_cast<void>(unet.forward(input));
  } catch (...) {
    scope.finish();
    throw;
  }
  scope.finish();
  for (auto& shape : shapes) shape.heads /= rows;
  return shapes;
}

}  // namespace sag

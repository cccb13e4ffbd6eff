#include "site_names.h"

#include <algorithm>
#include <cctype>
#include <utility>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "model/site_list.h"

namespace sag {
namespace {

// The components of a dotted path, the last first.
std::vector<std::string> components(const std::string& path) {
  std::vector<std::string> parts(1);
  for (const char c : path)
    if (c == '.')
      parts.emplace_back();
    else
      parts.back() += c;
  std::reverse(parts.begin(), parts.end());
  return parts;
}

bool is_number(const std::string& text) {
  return !text.empty() && std::all_of(text.begin(), text.end(),
                                      [](unsigned char c) { return std::isdigit(c) != 0; });
}

}  // namespace

std::string short_site_name(const std::string& path) {
  // input_blocks.4.1.transformer_blocks.0.attn1, middle_block.1.transformer_blocks.0.attn1 or
  // mid_block.attentions.0.transformer_blocks.0.attn1, read from the end.
  const auto parts = components(path);
  const auto part = [&](std::size_t i) { return i < parts.size() ? parts[i] : std::string(); };
  const auto transformer = part(1);
  if (part(0) != "attn1" || !is_number(transformer) || part(2) != "transformer_blocks") return "";
  const bool is_middle = (part(3) == "1" && part(4) == "middle_block") ||
                         (part(3) == "0" && part(4) == "attentions" && part(5) == "mid_block");
  if (is_middle) return "middle.0." + transformer;
  if (part(3) != "1" || !is_number(part(4))) return "";
  if (part(5) == "input_blocks") return c10::str("input.", part(4), ".", transformer);
  if (part(5) == "output_blocks") return c10::str("output.", part(4), ".", transformer);
  return "";
}

AttentionSiteInfo make_site(const std::string& path, std::int64_t ordinal) {
  auto name = short_site_name(path);
  if (name.empty()) name = path.empty() ? c10::str("#", ordinal) : path;
  return {std::move(name), path, ordinal};
}

AttentionSiteInfo make_cross_site(const std::string& path, std::int64_t ordinal) {
  auto beside = path;
  beside.replace(beside.rfind('.') + 1, std::string::npos, "attn1");
  const auto name = short_site_name(beside);
  return {name.empty() ? path : name, path, ordinal};
}

AttentionSiteInfo make_block_site(const std::string& path) {
  const auto name = short_site_name(path + ".attn1");
  return {.name = name.empty() ? path : name, .path = path};
}

AttentionSiteInfo hooked_site(const std::vector<AttentionSiteInfo>& sites,
                              const std::vector<AttentionSiteInfo>& cross_sites,
                              const std::string& name, const char* caller) {
  for (const auto& site : cross_sites)
    if (site.path == name) return site;
  const auto found = sites_called(sites, name);
  TORCH_CHECK_VALUE(!found.empty(), "[", caller,
                    "] a hooked site must be one of the UNet's, got \"", name, "\". ",
                    list_sites(sites));
  TORCH_CHECK_VALUE(found.size() == 1, "[", caller, "] a hooked site must be one attention, got \"",
                    name, "\", which stands for ", found.size(), ".");
  return found.front();
}

}  // namespace sag

#include "checkpoint/json_text.h"

#include <cstdint>
#include <set>
#include <vector>

#include <c10/util/Exception.h>

namespace sag {

using nlohmann::json;

void refuse_safetensors(const std::string& path, const std::string& problem) {
  C10_THROW_ERROR(ValueError,
                  c10::str("[Safetensors::open] path must name a whole safetensors file, got \"",
                           path, "\", ", problem, "."));
}

std::string quoted_name(const std::string& name) {
  constexpr std::size_t kLongest = 120;
  // JSON's own form has no line breaks and no control characters; cutting it is safe, for it is
  // ASCII.
  auto text = json(name).dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "…\"";
  return text;
}

void read_json_entries(std::string_view text, int deepest, const std::string& path,
                       const std::function<void(const std::string&, const json&)>& take) {
  // More would be a file that wants to fill the memory.
  constexpr std::int64_t kMostValues = 100'000;
  // The keys of every object that is open, the outer one first.
  std::vector<std::set<std::string>> keys;
  std::string entry;
  std::int64_t values = 0;
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    const bool opens =
        event == json::parse_event_t::object_start || event == json::parse_event_t::array_start;
    if (opens && depth >= deepest) refuse_safetensors(path, "whose header is nested too deeply");
    if (depth == 0 &&
        (event == json::parse_event_t::array_start || event == json::parse_event_t::value))
      refuse_safetensors(path, "whose header is not a JSON object");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys.back().insert(key).second)
        refuse_safetensors(path, "whose header has " + quoted_name(key) + " twice");
      if (depth == 1) {
        entry = key;
        values = 0;
      }
    }
    if (event == json::parse_event_t::value && ++values > kMostValues)
      refuse_safetensors(path, "whose header has too many values under " + quoted_name(entry));
    const bool closes = event == json::parse_event_t::object_end ||
                        event == json::parse_event_t::array_end ||
                        event == json::parse_event_t::value;
    // Inside an array a value has no key of its own.
    if (!closes || depth != 1) return true;
    take(entry, value);
    return false;
  };
  try {
    [[maybe_unused]] const auto what_is_left = json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception&) {
    refuse_safetensors(path, "whose header is not JSON");
  }
}

}  // namespace sag

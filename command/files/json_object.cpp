#include "files/json_object.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "errors.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

using nlohmann::json;

// Copying and writing JSON recurses into arrays and objects.
constexpr int kDeepest = 100;

std::string shown(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return fmt::format("an array of {}", value.size());
  const auto text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

Value value_of(const json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX) {
    return value.get<double>();
  }
  if (value.is_number_integer()) return value.get<std::int64_t>();
  if (value.is_number()) return value.get<double>();
  return {};
}

Given given_of(const json& value, std::string where) {
  return {.where = std::move(where), .value = value_of(value), .shown = shown(value)};
}

}  // namespace

JsonObject::JsonObject(const json& json, std::string where)
    : json_(json), where_(std::move(where)) {
  if (!json_.is_object()) throw UsageError(fmt::format("{} must be an object.", where_));
}

bool JsonObject::has(const std::string& key) {
  known_.insert(key);
  return json_.contains(key);
}

Given JsonObject::given(const std::string& key) {
  return given_of(value(key), name(key));
}

JsonObject JsonObject::object(const std::string& key) {
  return {value(key), name(key)};
}

std::vector<Given> JsonObject::array(const std::string& key, std::size_t size, const char* what) {
  const json& found = value(key);
  if (!found.is_array() || found.size() != size) {
    throw UsageError(fmt::format("{} must be {}, got {}.", name(key), what, shown(found)));
  }
  std::vector<Given> values;
  for (const auto& entry : found) values.push_back(given_of(entry, name(key)));
  return values;
}

Given JsonObject::texts(const std::string& key) {
  const json& found = value(key);
  auto given = given_of(found, name(key));
  const auto is_text = [](const json& entry) { return entry.is_string(); };
  if (!found.is_array() || found.empty() || !std::all_of(found.begin(), found.end(), is_text)) {
    throw UsageError(
        fmt::format("{} must be an array of one text or more, got {}.", name(key), given.shown));
  }
  for (const auto& entry : found) given.words.push_back(entry.get<std::string>());
  return given;
}

void JsonObject::refuse_unknown_keys() const {
  for (const auto& [key, ignored] : json_.items()) {
    if (known_.contains(key)) continue;
    throw UsageError(fmt::format("{} has the unknown key \"{}\"; known are {}{}", where_, key,
                                 fmt::join(known_, ", "),
                                 suggestion(key, {known_.begin(), known_.end()})));
  }
}

const json& JsonObject::value(const std::string& key) {
  if (!has(key)) throw UsageError(fmt::format("{} is missing.", name(key)));
  return json_.at(key);
}

std::string JsonObject::name(const std::string& key) const {
  return fmt::format("{}: \"{}\"", where_, key);
}

json read_json_file(const std::string& path, const std::string& missing) {
  std::ifstream stream(path, std::ios::binary);
  std::stringstream content;
  if (stream) content << stream.rdbuf();
  if (!stream || content.fail()) throw UsageError(missing);
  const auto check_depth = [&](int depth, json::parse_event_t, json&) {
    if (depth > kDeepest) {
      throw UsageError(fmt::format("{} has values nested deeper than {}.", path, kDeepest));
    }
    return true;
  };
  try {
    return json::parse(content.str(), check_depth);
  } catch (const json::parse_error& parse) {
    throw UsageError(fmt::format("{} is not JSON: the mistake is at byte {}.", path, parse.byte));
  } catch (const json::exception&) {
    // All that is left, in a text, is a number beyond doubles: 1e999.
    throw UsageError(fmt::format("{} holds a number that is too large.", path));
  }
}

}  // namespace sag_sample

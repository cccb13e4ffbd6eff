#pragma once

#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace sag {

/// Ends the reading of a file: throws ValueError "[Safetensors::open] path must name a readable
/// safetensors file, got "path", which …". `problem` is the end of that sentence.
[[noreturn]] void refuse_safetensors(const std::string& path, const std::string& problem);

/// Reads a JSON object whose values nest at most `deepest` deep (1: an object of plain values) and
/// whose keys are all different. `take(key, value)` gets each entry of the outer object as soon as
/// it is read, and what it got is forgotten: the memory stays small, however many there are. Throws
/// ValueError as `refuse_safetensors` does.
void read_json_entries(std::string_view text, int deepest, const std::string& path,
                       const std::function<void(const std::string&, const nlohmann::json&)>& take);

/// Returns a name from a file as it can stand in a message: short, on one line, in quotes.
std::string quoted_name(const std::string& name);

}  // namespace sag

#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "support/files.h"

namespace sag::test {

/// Returns the entries of tests/golden/toy.json that carry the id, each with "params", "value" and
/// "tolerance": what ComfyUI v0.3.64 gives on the CPU in fp32.
inline std::vector<nlohmann::json> toy_entries(const std::string& id) {
  static const nlohmann::json toy = nlohmann::json::parse(read_bytes(kGoldenDir + "toy.json"));
  std::vector<nlohmann::json> entries;
  for (const auto& entry : toy.at("entries")) {
    if (entry.at("id") == id) entries.push_back(entry);
  }
  if (entries.empty()) throw std::runtime_error("toy.json has no entry " + id);
  return entries;
}

}  // namespace sag::test

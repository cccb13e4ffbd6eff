#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "sag/safetensors.h"

namespace sag {

/// Where a tensor lies, counted from the end of the header.
struct SafetensorsEntry {
  Safetensors::Info info = {};
  std::uint64_t begin = 0, end = 0;
};

struct SafetensorsHeader {
  std::map<std::string, SafetensorsEntry> tensors = {};
  std::map<std::string, std::string> metadata = {};
  /// Where the tensors' bytes begin in the file.
  std::uint64_t data = 0;
};

/// Reads the header of a whole file and checks every number in it. Throws ValueError, naming
/// `path`.
SafetensorsHeader read_safetensors_header(std::string_view file, const std::string& path);

}  // namespace sag

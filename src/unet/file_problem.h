#pragma once

#include <exception>
#include <string>

// What keeps a file from being read, as the end of a sentence: "which does not exist."
namespace sag {

/// Returns what keeps a path from being read as a zip archive, or nothing.
std::string zip_problem(const std::string& path);

/// Returns what is wrong with a zip archive that LibTorch's reader refused with `error`.
std::string read_problem(const std::exception& error);

}  // namespace sag

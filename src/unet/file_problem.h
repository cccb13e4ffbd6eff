#pragma once

#include <exception>
#include <string>

// What keeps a file from being read, as the end of a sentence: "which does not exist."
namespace sag {

/// Returns what keeps a path from being read as a zip archive, or nothing. Names formats that
/// people have models in, and how to get a file that can be read.
std::string zip_problem(const std::string& path);

/// How to get a UNet's file out of a file with weights alone.
extern const char* const kWeightsAlone;

/// Returns, for a folder without packages, what kind of folder it is, or nothing.
std::string folder_problem(const std::string& path);

/// Returns what is wrong with a zip archive that LibTorch's reader refused with `error`.
std::string read_problem(const std::exception& error);

}  // namespace sag

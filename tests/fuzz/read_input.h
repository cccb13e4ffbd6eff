#pragma once

#include <string>

namespace sag::test {

/// Gives bytes to everything that reads a downloaded file: as a safetensors file to the reader, the
/// LoRAs and the textual inversions; as an index when they begin with '{'. Returns what the reader
/// refused them with, or "" when it took them. Ends the process when anything but a ValueError in
/// one line comes out, or a tensor that does not lie in the file.
std::string read_input(const std::string& bytes);

}  // namespace sag::test

#pragma once

#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "given.h"

namespace sag_sample {

/// Reads the arguments (without the program's name). Returns nothing if they asked for the help,
/// the version or a list of names, which then went to `out`. Throws UsageError.
std::optional<Choices> parse_command_line(const std::vector<std::string>& arguments,
                                          std::ostream& out);

}  // namespace sag_sample

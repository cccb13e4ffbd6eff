#pragma once

#include <iosfwd>

#include "given.h"

namespace sag_sample {

/// Does what the command line asks for; what the user asked to know goes to `out`. Throws
/// UsageError, RunError, or what the library throws, and then has written nothing.
void run_command(const Choices& command_line, std::ostream& out);

}  // namespace sag_sample

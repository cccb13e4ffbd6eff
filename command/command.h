#pragma once

#include <iosfwd>

#include "options.h"

namespace sag_sample {

/// Does what the options ask for; what the user asked to know goes to `out`. Throws UsageError,
/// RunError, or what the library throws, and then has written nothing.
void run_command(const Options& options, std::ostream& out);

}  // namespace sag_sample

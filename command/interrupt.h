#pragma once

namespace sag_sample {

/// From now on SIGINT and SIGTERM only ask the run to stop, and say so unless `quiet`. A second one
/// ends the process.
void catch_interrupts(bool quiet);

/// Returns whether the run was asked to stop.
bool interrupted();

}  // namespace sag_sample

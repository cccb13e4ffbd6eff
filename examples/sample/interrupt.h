#pragma once

namespace sag_sample {

/// From now on SIGINT and SIGTERM only ask the run to stop. A second one ends the process.
void catch_interrupts();

/// Returns whether the run was asked to stop.
bool interrupted();

}  // namespace sag_sample

#pragma once

#include <iosfwd>
#include <memory>
#include <string>

#include "model_directory.h"
#include "options.h"

namespace sag {
class Checkpoint;
}

namespace sag_sample {

/// Opens the checkpoint of --checkpoint, with all that was given beside it. Throws UsageError, in
/// one sentence that names the option, when something of it cannot be used.
std::shared_ptr<const sag::Checkpoint> open_checkpoint(const std::string& path,
                                                       const CheckpointFiles& files);

/// Returns the model that a checkpoint is: what its skeleton's model.json says, but for what the
/// file itself decides.
ModelDirectory model_of(std::shared_ptr<const sag::Checkpoint> checkpoint, const std::string& path);

/// Prints what a checkpoint is.
void describe_checkpoint(const sag::Checkpoint& checkpoint, const std::string& path,
                         std::ostream& out);

}  // namespace sag_sample

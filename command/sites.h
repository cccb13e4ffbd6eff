#pragma once

#include <iosfwd>

#include "options.h"
#include "sag/unet.h"
#include "settings.h"

namespace sag_sample {

/// Prints the UNet's self-attentions, one a line, with what they work on where the command line or
/// the model's text encoder tells how to run the UNet. Throws UsageError.
void list_sites(const Options& options, const Settings& settings, const sag::UNet& unet,
                std::ostream& out);

}  // namespace sag_sample

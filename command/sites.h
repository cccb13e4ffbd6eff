#pragma once

#include <iosfwd>

#include "options.h"
#include "sag/unet.h"
#include "settings.h"

namespace sag_sample {

/// Prints the UNet's self-attentions, one a line, and which of them "middle" chooses; with what
/// they work on where tensors or the model's text encoder tell how to run the UNet. Throws
/// UsageError.
void list_sites(const PictureOptions& pictures, const Network& network, const sag::UNet& unet,
                std::ostream& out);

}  // namespace sag_sample

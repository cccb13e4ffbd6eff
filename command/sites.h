#pragma once

#include <iosfwd>
#include <string>

#include "options.h"
#include "sag/unet.h"
#include "settings.h"

namespace sag_sample {

/// Throws UsageError, with the nearest name if there is one, when the UNet has no such
/// self-attention.
void check_site(const sag::UNet& unet, const std::string& site);

/// Prints the UNet's self-attentions, one a line, and which of them "middle" chooses; with what
/// they work on where tensors or the model's text encoder tell how to run the UNet. Throws
/// UsageError.
void list_sites(const PictureOptions& pictures, const Network& network, const sag::UNet& unet,
                std::ostream& out);

}  // namespace sag_sample

#pragma once

#include <iosfwd>
#include <string>

#include "options.h"
#include "sag/model_patcher.h"
#include "sag/unet.h"
#include "settings.h"

namespace sag_sample {

/// Throws UsageError, with the nearest name if there is one, when the model's UNet does not have
/// what the guidance looks into.
void check_sites(const sag::ModelPatcher& model, const Guidance& guidance);

/// Prints the UNet's self-attentions, one a line, and which of them "middle" chooses; then its
/// cross-attentions and transformer blocks where they are known; attentions with what they work on
/// where tensors or the model's text encoder tell how to run the UNet. Throws UsageError.
void list_sites(const PictureOptions& pictures, const Network& network, const sag::UNet& unet,
                std::ostream& out);

}  // namespace sag_sample

#pragma once

#include <memory>

#include "options.h"
#include "sag/unet.h"
#include "settings.h"

namespace sag_sample {

/// Loads the UNet that the settings name: a compiled package (*.pt2), a folder of packages, or else
/// a TorchScript archive. Compiled ones run where and how they were compiled for, whatever
/// `settings.device` says, unless the options ask for something. Throws UsageError when the options
/// ask for what a compiled UNet cannot do, and what the library throws.
std::shared_ptr<const sag::UNet> load_unet(const Options& options, const Settings& settings);

}  // namespace sag_sample

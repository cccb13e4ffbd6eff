#include "unet_file.h"

#include <optional>

#include <fmt/format.h>

#include "errors.h"
#include "sag/aoti_unet.h"
#include "sag/torchscript_unet.h"

namespace sag_sample {
namespace {

// Nothing: what the library chooses.
std::optional<bool> channels_last(const Options& options) {
  const auto choice = options.channels_last.value_or("auto");
  return choice == "auto" ? std::nullopt : std::optional(choice == "on");
}

std::shared_ptr<const sag::UNet> load_compiled(const Options& options, const Settings& settings) {
  if (channels_last(options)) {
    throw UsageError(fmt::format(
        "--channels-last: the layout of \"{}\" was chosen when it was compiled.", settings.unet));
  }
  sag::AotiUNetOptions wanted;
  if (options.device) wanted.device = settings.device;
  auto unet = sag::AotiUNet::load(settings.unet, wanted);
  if (settings.dtype && *settings.dtype != unet->dtype()) {
    throw UsageError(fmt::format("--dtype {}: \"{}\" was compiled for another precision, {}.",
                                 *options.dtype, settings.unet, c10::toString(unet->dtype())));
  }
  return unet;
}

}  // namespace

std::shared_ptr<const sag::UNet> load_unet(const Options& options, const Settings& settings) {
  if (sag::AotiUNet::is_package(settings.unet)) return load_compiled(options, settings);
  return sag::TorchScriptUNet::load(settings.unet, {.device = settings.device,
                                                    .dtype = settings.dtype,
                                                    .channels_last = channels_last(options)});
}

}  // namespace sag_sample

#pragma once

#include <memory>
#include <optional>

#include "files/unet_file.h"
#include "sag/picture_network.h"
#include "sag/text_encoder.h"
#include "settings.h"

namespace sag_sample {

/// These load a network of a model, from its checkpoint or else from its own file. They throw
/// UsageError or c10::ValueError when that cannot be used.
std::shared_ptr<const sag::UNet> load_unet(const Network& network, const UNetFileOptions& options);
/// Nothing: the model has none.
std::optional<sag::TextEncoder> load_text_encoder(const Network& network);
std::optional<sag::PictureNetwork> load_decoder(const Network& network, torch::Device device);
std::optional<sag::PictureNetwork> load_encoder(const Network& network, torch::Device device);

}  // namespace sag_sample

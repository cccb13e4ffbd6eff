#include "model_networks.h"

#include "sag/checkpoint.h"

namespace sag_sample {

std::shared_ptr<const sag::UNet> load_unet(const Network& network, const UNetFileOptions& options) {
  if (!network.checkpoint) return load_unet(network.files.unet, options);
  if (network.compiled.empty()) {
    return network.checkpoint->load_unet(torchscript_options(options));
  }
  return load_compiled(network.compiled, options, [&] {
    return network.checkpoint->load_compiled_unet(network.compiled, options.device);
  });
}

std::optional<sag::TextEncoder> load_text_encoder(const Network& network) {
  if (network.files.text_encoder.empty()) return std::nullopt;
  if (network.checkpoint) return network.checkpoint->load_text_encoder();
  return sag::TextEncoder::load(network.files.text_encoder);
}

std::optional<sag::PictureNetwork> load_decoder(const Network& network, torch::Device device) {
  if (network.files.decoder.empty()) return std::nullopt;
  if (network.checkpoint) return network.checkpoint->load_decoder(device);
  return sag::PictureNetwork::load(network.files.decoder, device);
}

std::optional<sag::PictureNetwork> load_encoder(const Network& network, torch::Device device) {
  if (network.files.encoder.empty()) return std::nullopt;
  if (network.checkpoint) return network.checkpoint->load_encoder(device);
  return sag::PictureNetwork::load(network.files.encoder, device);
}

}  // namespace sag_sample

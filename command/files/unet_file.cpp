#include "files/unet_file.h"

#include <fmt/format.h>
#include <torch/cuda.h>

#include "errors.h"
#include "sag/aoti_unet.h"
#include "sag/torchscript_unet.h"

namespace sag_sample {

std::string short_name(torch::ScalarType dtype) {
  if (dtype == torch::kFloat) return "fp32";
  if (dtype == torch::kHalf) return "fp16";
  return dtype == torch::kBFloat16 ? "bf16" : c10::toString(dtype);
}

std::shared_ptr<const sag::UNet> load_compiled(
    const std::string& path, const UNetFileOptions& options,
    const std::function<std::shared_ptr<const sag::UNet>()>& load) {
  if (options.channels_last) {
    throw UsageError(fmt::format(
        "--channels-last: the layout of \"{}\" was chosen when it was compiled.", path));
  }
  if (options.rows > 0) {
    throw UsageError(fmt::format(
        "--unet-rows: a compiled UNet says itself what it takes, as \"{}\" does.", path));
  }
  auto unet = load();
  if (options.dtype && *options.dtype != unet->dtype()) {
    throw UsageError(fmt::format("--dtype {}: \"{}\" was compiled for another precision, {}.",
                                 short_name(*options.dtype), path, c10::toString(unet->dtype())));
  }
  return unet;
}

sag::TorchScriptUNetOptions torchscript_options(const UNetFileOptions& options) {
  const auto fastest =
      torch::cuda::is_available() ? torch::Device(torch::kCUDA, 0) : torch::Device(torch::kCPU);
  return {.device = options.device.value_or(fastest),
          .dtype = options.dtype,
          .channels_last = options.channels_last,
          .rows = options.rows};
}

std::shared_ptr<const sag::UNet> load_unet(const std::string& path,
                                           const UNetFileOptions& options) {
  if (sag::AotiUNet::is_package(path)) {
    return load_compiled(path, options,
                         [&] { return sag::AotiUNet::load(path, {.device = options.device}); });
  }
  return sag::TorchScriptUNet::load(path, torchscript_options(options));
}

}  // namespace sag_sample

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include <torch/types.h>

#include "sag/torchscript_unet.h"
#include "sag/unet.h"

namespace sag_sample {

/// What the user asks of a UNet's file. Nothing: what the file or the library chooses.
struct UNetFileOptions {
  std::optional<torch::Device> device = {};
  std::optional<torch::ScalarType> dtype = {};
  std::optional<bool> channels_last = {};
  /// The only number of rows that an archive works with; 0: it is found out.
  std::int64_t rows = 0;
};

/// Loads a UNet: a compiled package (*.pt2), a folder of packages, or else a TorchScript archive.
/// A compiled UNet runs where and how it was compiled to run; an archive runs on the first CUDA
/// device if there is one. Throws UsageError when the options ask for what a compiled UNet cannot
/// do, and what the library throws.
std::shared_ptr<const sag::UNet> load_unet(const std::string& path, const UNetFileOptions& options);

/// Loads a compiled UNet with `load`. Throws UsageError for options that were decided when it was
/// compiled.
std::shared_ptr<const sag::UNet> load_compiled(
    const std::string& path, const UNetFileOptions& options,
    const std::function<std::shared_ptr<const sag::UNet>()>& load);

/// Returns what --dtype calls a dtype.
std::string short_name(torch::ScalarType dtype);

/// Returns the options of a TorchScript UNet: on the first CUDA device where there is one, unless
/// another was chosen.
sag::TorchScriptUNetOptions torchscript_options(const UNetFileOptions& options);

}  // namespace sag_sample

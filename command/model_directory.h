#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace sag_sample {

/// What `model.json` suggests for sampling; everything may be left out.
struct ModelDefaults {
  std::optional<std::string> sampler, schedule;
  std::optional<std::int64_t> steps;
  std::optional<double> cfg;
  std::optional<double> sag_scale, sag_blur, sag_threshold;
  std::optional<std::int64_t> sag_kernel;
  std::optional<double> sag_start, sag_end;
};

/// A model directory: what its `model.json` says.
///
///     {"format": 1, "name": "emoji",
///      "prediction": "edm", "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 60.0,
///      "sample": {"shape": [3, 64, 64], "multiple": 8},
///      "site": "middle.0.0",
///      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts", "decoder": "decoder.ts",
///                "encoder": "encoder.ts"},
///      "defaults": {"sampler": "euler", "schedule": "karras", "steps": 20, "cfg": 2.0,
///                   "sag": {"scale": 1.0, "blur_sigma": 2.0}}}
///
/// "unet" is a TorchScript archive, a compiled package (*.pt2) or a folder of packages. "format",
/// "prediction", "sample" and "files" with its "unet" must be there. "eps", "v" and "x0" models may
/// have "beta_start", "beta_end", "beta_schedule", "timesteps" and "zero_terminal_snr", "flow"
/// models "shift" and "timestep_multiplier". "sag" takes "scale", "blur_sigma", "threshold",
/// "kernel_size", "sigma_start" and "sigma_end".
struct ModelDirectory {
  std::string path, name;
  std::string prediction;
  std::optional<double> sigma_data, sigma_min, sigma_max;
  std::optional<double> beta_start, beta_end;
  std::optional<std::string> beta_schedule;
  std::optional<std::int64_t> timesteps;
  bool zero_terminal_snr = false;
  std::optional<double> shift, timestep_multiplier;
  std::array<std::int64_t, 3> shape = {};  ///< channels, height, width
  std::int64_t multiple = 1;               ///< that height and width must be multiples of
  std::optional<std::string> site;
  /// Paths of the files; empty: the model has no such file.
  std::string unet, text_encoder, decoder, encoder;
  ModelDefaults defaults;
};

/// Reads `model.json` in a directory and checks that the files it names are there. Throws
/// UsageError, in one sentence, also for keys that it does not know and names that lead out of the
/// directory.
ModelDirectory read_model_directory(const std::string& path);

}  // namespace sag_sample

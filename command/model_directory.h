#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "given.h"

namespace sag {
class Checkpoint;
}

namespace sag_sample {

/// Paths of a model's files; empty: the model has no such file.
struct ModelFiles {
  std::string unet = {}, text_encoder = {}, decoder = {}, encoder = {};
};

/// The channels of a network's input after those of the latent.
struct ConcatInput {
  std::int64_t channels = 0;
  /// "inpaint": the mask, and the latent of the picture without what is repainted. "edit": the
  /// latent of the picture. Empty: the user's own tensor.
  std::string kind = {};
  /// The picture's latents times this are the network's.
  double scale = 1.0;
};

/// What a network takes beside the latent, text and sizes.
struct NetworkInputs {
  std::optional<ConcatInput> concat = {};
  bool takes_class = false;
  /// How many there are; 0: any whole number is one.
  std::int64_t classes = 0;
  /// How many numbers the embedded scale of guidance has; 0: it takes none.
  std::int64_t guidance_size = 0;
};

/// A model directory: what its `model.json` says.
///
///     {"format": 1, "name": "emoji",
///      "prediction": "edm", "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 60.0,
///      "sample": {"shape": [3, 64, 64], "multiple": 8},
///      "site": "middle.0.0",
///      "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts", "decoder": "decoder.ts",
///                "encoder": "encoder.ts"},
///      "inputs": {"concat": {"channels": 5, "kind": "inpaint", "scale": 1.0},
///                 "class_labels": {"classes": 10}, "timestep_cond": {"size": 256}},
///      "defaults": {"sampler": "euler", "schedule": "karras", "steps": 20, "cfg": 2.0,
///                   "guidance": ["sag", "pag:scale=2"],
///                   "sag": {"scale": 1.0, "blur_sigma": 2.0}}}
///
/// "unet" is a TorchScript archive, a compiled package (*.pt2) or a folder of packages. "format",
/// "prediction", "sample" and "files" with its "unet" must be there. The other keys are the options
/// that options.cpp and guidances.cpp mark with `from_model`, under their keys: those of the
/// network and of its noise levels at the top, those of pictures and sampling in "defaults", and
/// those of each guidance in an object of its own there.
struct ModelDirectory {
  std::string path, name;
  ModelFiles files;
  /// Height and width of the latent must be multiples of it.
  std::int64_t multiple = 1;
  NetworkInputs inputs;
  Choices choices;
  /// The file that the weights are in; null: in the model's own files.
  std::shared_ptr<const sag::Checkpoint> checkpoint = {};
};

/// Reads `model.json` in a directory, after a JSON merge patch (RFC 7396), and checks that the
/// files it names are there. Throws UsageError, in one sentence, also for keys that it does not
/// know and names that lead out of the directory.
ModelDirectory read_model_directory(const std::string& path,
                                    const nlohmann::json& patch = nlohmann::json::object());

}  // namespace sag_sample

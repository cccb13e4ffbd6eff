#include "checkpoint.h"

#include <charconv>
#include <filesystem>
#include <ostream>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "errors.h"
#include "files/unet_file.h"
#include "messages.h"
#include "sag/checkpoint.h"
#include "sag/safetensors.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;

void check_is_file(const char* option, const std::string& path) {
  std::error_code error;
  if (path.empty() || fs::is_regular_file(path, error)) return;
  if (fs::is_directory(path, error)) {
    const bool is_pipeline = option == std::string("--checkpoint") &&
                             (fs::exists(fs::path(path) / "model_index.json", error) ||
                              fs::exists(fs::path(path) / "config.json", error));
    throw UsageError(
        fmt::format("{}: \"{}\" is a folder, not a file{}", option, path,
                    is_pipeline ? "; sag-export makes a --model of a folder of diffusers." : "."));
  }
  throw UsageError(
      fmt::format("{}: there is no file \"{}\"{}", option, path, suggestion_beside(path)));
}

// FILE or FILE:STRENGTH.
sag::LoraFile parse_lora(const std::string& given) {
  const auto colon = given.rfind(':');
  std::error_code error;
  if (colon == std::string::npos || fs::exists(given, error)) return {.path = given};
  double strength = 0;
  const char* end = given.data() + given.size();
  const auto [stop, problem] = std::from_chars(given.data() + colon + 1, end, strength);
  if (problem != std::errc() || stop != end) {
    if (!fs::exists(given.substr(0, colon), error)) return {.path = given};
    throw UsageError(
        fmt::format("--lora: the strength after the colon must be a number, got \"{}\".", given));
  }
  return {.path = given.substr(0, colon), .strength = strength};
}

// NAME=FILE.
sag::EmbeddingFile parse_embedding(const std::string& given) {
  const auto equals = given.find('=');
  if (equals == 0 || equals == std::string::npos) {
    throw UsageError(fmt::format(
        "--embedding must be NAME=FILE, with the word that prompts use for it, got \"{}\".",
        given));
  }
  const sag::EmbeddingFile file = {.name = given.substr(0, equals),
                                   .path = given.substr(equals + 1)};
  // Of a prompt, that would be weights.
  if (file.name.find_first_of("()\\") != std::string::npos) {
    throw UsageError(fmt::format(
        "--embedding: a name must have no parentheses and backslashes, got \"{}\".", file.name));
  }
  return file;
}

// Reads the header of a file, so that what is wrong with it is said of its option.
void check_can_be_read(const char* option, const std::string& path) {
  if (path.empty()) return;
  check_is_file(option, path);
  try {
    static_cast<void>(sag::Safetensors::open(path));
  } catch (const c10::ValueError& error) {
    throw UsageError(sentence_of(error, {{"Path", option}}));
  }
}

sag::CheckpointOptions options_for(const std::string& path, const CheckpointFiles& files) {
  sag::CheckpointOptions options = {.skeleton = files.skeleton, .vae = files.vae};
  for (const auto& lora : files.loras) options.loras.push_back(parse_lora(lora));
  for (const auto& text : files.embeddings) options.embeddings.push_back(parse_embedding(text));
  if (!files.prediction.empty()) options.prediction = sag::parse_prediction(files.prediction);
  check_is_file("--checkpoint", path);
  check_can_be_read("--vae", files.vae);
  for (const auto& lora : options.loras) check_can_be_read("--lora", lora.path);
  for (const auto& embedding : options.embeddings) check_can_be_read("--embedding", embedding.path);
  return options;
}

// The channels after the latent's. Instruct-pix2pix takes the VAE's own latents, without the scale
// that the skeleton's encoder has inside.
nlohmann::json concat_of(const sag::CheckpointInfo& info) {
  const double scale_of_vae = info.family == "sdxl" ? 0.13025 : 0.18215;
  if (info.in_channels == 9) return {{"channels", 5}, {"kind", "inpaint"}};
  if (info.in_channels == 8) {
    return {{"channels", 4}, {"kind", "edit"}, {"scale", 1 / scale_of_vae}};
  }
  return nullptr;
}

// What a file decides of its skeleton's model.json, as a merge patch.
nlohmann::json decided_by(const sag::CheckpointInfo& info, const std::string& path) {
  nlohmann::json patch = {{"name", fs::path(path).stem().string()},
                          {"prediction", std::string(sag::to_string(info.prediction))}};
  if (info.zero_terminal_snr) patch["zero_terminal_snr"] = true;
  if (const auto concat = concat_of(info); !concat.is_null()) {
    patch["inputs"]["concat"] = concat;
  }
  // Those of Stable Diffusion 2 that predict v draw 768 pixels.
  if (info.recognised && info.family == "sd2" && info.prediction == sag::Prediction::v) {
    patch["sample"]["shape"] = {4, 96, 96};
  }
  for (const auto& [file, has] : {std::pair("text_encoder", info.has_text_encoder),
                                  {"decoder", info.has_decoder},
                                  {"encoder", info.has_encoder}}) {
    if (!has) patch["files"][file] = nullptr;
  }
  return patch;
}

std::string title_of(const std::string& family) {
  if (family == "sd1") return "Stable Diffusion 1";
  if (family == "sd2") return "Stable Diffusion 2";
  return family == "sdxl" ? "Stable Diffusion XL" : family;
}

std::string count_text(std::int64_t parameters) {
  if (parameters == 0) return "none in the file";
  return parameters < 1'000'000 ? fmt::format("{} weights", parameters)
                                : fmt::format("{:.1f} million weights", parameters / 1e6);
}

const char* takes(std::int64_t in_channels) {
  return in_channels == 9   ? " and those of inpainting"
         : in_channels == 8 ? " and those of the picture to edit"
                            : "";
}

}  // namespace

std::shared_ptr<const sag::Checkpoint> open_checkpoint(const std::string& path,
                                                       const CheckpointFiles& files) {
  const auto options = options_for(path, files);
  try {
    return std::make_shared<const sag::Checkpoint>(sag::Checkpoint::open(path, options));
  } catch (const c10::ValueError& error) {
    throw UsageError(sentence_of(error, {{"Path", "--checkpoint"},
                                         {"Lora", "--lora"},
                                         {"Embedding", "--embedding"},
                                         {"Vae", "--vae"},
                                         {"Skeleton", "--skeleton"},
                                         {"Prediction", "--prediction"}}));
  }
}

ModelDirectory model_of(std::shared_ptr<const sag::Checkpoint> checkpoint,
                        const std::string& path) {
  auto model = read_model_directory(checkpoint->skeleton(), decided_by(checkpoint->info(), path));
  model.checkpoint = std::move(checkpoint);
  return model;
}

void describe_checkpoint(const sag::Checkpoint& checkpoint, const std::string& path,
                         std::ostream& out) {
  const auto& info = checkpoint.info();
  out << fmt::format("{}: {}\n", path, title_of(info.family));
  out << fmt::format("prediction    {}{} ({})\n", sag::to_string(info.prediction),
                     info.zero_terminal_snr ? ", noise up to zero signal (ztsnr)" : "",
                     info.prediction_reason);
  out << fmt::format("UNet          {}, {}; takes the latent's channels{}\n",
                     count_text(info.unet_parameters), short_name(info.dtype),
                     takes(info.in_channels));
  out << fmt::format("text encoder  {}\n", count_text(info.text_parameters));
  out << fmt::format("VAE           {}\n", count_text(info.vae_parameters));
  std::vector<std::string> skipped;
  for (const auto& [name, count] : info.skipped) {
    skipped.push_back(count == 1 ? name : fmt::format("{} ({})", name, count));
  }
  if (!skipped.empty()) out << fmt::format("not needed    {}\n", fmt::join(skipped, ", "));
  out << fmt::format("skeleton      {}\n", checkpoint.skeleton());
  for (const auto& note : info.notes) out << fmt::format("note          {}\n", note);
}

}  // namespace sag_sample

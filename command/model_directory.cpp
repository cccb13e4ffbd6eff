#include "model_directory.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "errors.h"
#include "files/json_object.h"
#include "guidances.h"
#include "options.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;

void choose(Choices& choices, const Option& option, const Given& given) {
  option.check(given);
  choices[option.id()] = given;
}

// The options of a group that model.json may have.
void read_options(JsonObject& object, const OptionGroup& group, Choices& choices) {
  for (const auto& option : group.options) {
    if (option.in_model && !option.key.empty() && object.has(option.key)) {
      choose(choices, option, option.repeats ? object.texts(option.key) : object.given(option.key));
    }
  }
}

void read_network(JsonObject& root, Choices& choices) {
  static_cast<void>(root.given("prediction"));
  read_options(root, network_options(), choices);
  read_options(root, noise_level_options(network_options().decide(choices).prediction), choices);
}

void read_sample(JsonObject sample, ModelDirectory& model) {
  constexpr Range<std::int64_t> kMultiple = whole(1, 65536);
  const auto& options = latent_size_options().options;
  const auto shape =
      sample.array("shape", options.size(), "three whole numbers: channels, height, width");
  for (std::size_t i = 0; i < options.size(); ++i) choose(model.choices, options[i], shape[i]);
  if (sample.has("multiple")) model.multiple = read_number(sample.given("multiple"), kMultiple);
  sample.refuse_unknown_keys();
  const auto size = latent_size_options().decide(model.choices);
  if (size.height % model.multiple != 0 || size.width % model.multiple != 0) {
    throw UsageError(
        fmt::format("{} must be a height and width that are multiples of {}, got {} x {}.",
                    shape.front().where, model.multiple, size.height, size.width));
  }
}

// The name of a file or folder of the model: it must stay inside the directory, and be there.
std::string read_file_name(JsonObject& files, const std::string& key,
                           const std::string& directory) {
  if (!files.has(key)) return {};
  const auto given = files.given(key);
  const fs::path name = read_text(given);
  const bool escapes =
      std::any_of(name.begin(), name.end(), [](const auto& part) { return part == ".."; });
  if (name.is_absolute() || escapes) {
    throw UsageError(
        fmt::format("{} must be the name of a file inside the model directory, got {}.",
                    given.where, given.shown));
  }
  const auto path = (fs::path(directory) / name).string();
  std::error_code error;
  const bool is_folder_of_packages = key == "unet" && fs::is_directory(path, error);
  if (!fs::is_regular_file(path, error) && !is_folder_of_packages) {
    throw UsageError(fmt::format(
        "The model has no file \"{}\", which its model.json names as \"{}\".", path, key));
  }
  return path;
}

ModelFiles read_files(JsonObject files, const std::string& directory) {
  static_cast<void>(files.given("unet"));
  const ModelFiles found = {.unet = read_file_name(files, "unet", directory),
                            .text_encoder = read_file_name(files, "text_encoder", directory),
                            .decoder = read_file_name(files, "decoder", directory),
                            .encoder = read_file_name(files, "encoder", directory)};
  files.refuse_unknown_keys();
  return found;
}

ConcatInput read_concat(JsonObject object, std::int64_t latent) {
  static constexpr std::array<std::string_view, 2> kKinds = {"inpaint", "edit"};
  ConcatInput concat;
  const auto channels = object.given("channels");
  concat.channels = read_number(channels, whole(1, 65536));
  if (object.has("kind")) concat.kind = read_choice(object.given("kind"), kKinds);
  if (object.has("scale")) concat.scale = read_number(object.given("scale"), kPositive);
  object.refuse_unknown_keys();
  if (object.has("scale") && concat.kind.empty()) {
    throw UsageError(fmt::format(
        "{} scales the picture's latent and needs a \"kind\" that has one, inpaint or edit.",
        object.given("scale").where));
  }
  const auto needed = concat.kind == "inpaint" ? latent + 1 : latent;
  if (!concat.kind.empty() && concat.channels != needed) {
    throw UsageError(fmt::format("{} must be {} for \"{}\" and latents with {} channels, got {}.",
                                 channels.where, needed, concat.kind, latent, concat.channels));
  }
  return concat;
}

NetworkInputs read_inputs(JsonObject object, std::int64_t latent) {
  constexpr Range<std::int64_t> kCount = whole(1, 1000000);
  NetworkInputs inputs;
  if (object.has("concat")) inputs.concat = read_concat(object.object("concat"), latent);
  if (object.has("class_labels")) {
    auto labels = object.object("class_labels");
    inputs.takes_class = true;
    if (labels.has("classes")) inputs.classes = read_number(labels.given("classes"), kCount);
    labels.refuse_unknown_keys();
  }
  if (object.has("timestep_cond")) {
    auto guidance = object.object("timestep_cond");
    inputs.guidance_size = read_number(guidance.given("size"), whole(4, 65536));
    guidance.refuse_unknown_keys();
  }
  object.refuse_unknown_keys();
  return inputs;
}

void read_defaults(JsonObject defaults, Choices& choices) {
  read_options(defaults, picture_options(), choices);
  read_options(defaults, sampling_options(), choices);
  read_options(defaults, guider_options(), choices);
  read_options(defaults, further_options(), choices);
  read_options(defaults, guidance_options(), choices);
  for (const auto& kind : guidance_kinds()) {
    if (!kind.off || !defaults.has(kind.key)) continue;
    auto object = defaults.object(kind.key);
    read_options(object, *kind.options, choices);
    object.refuse_unknown_keys();
  }
  defaults.refuse_unknown_keys();
}

nlohmann::json read_description(const std::string& path, const std::string& file) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) {
    const auto folder = fs::absolute(path, error).parent_path();
    const bool is_unet = path.ends_with(".ts") || path.ends_with(".pt2");
    throw UsageError(fmt::format(
        "--model takes a directory with a model.json, got the file \"{}\": {}.", path,
        fs::exists(folder / "model.json", error)
            ? fmt::format("give --model \"{}\"", folder.string())
        : is_unet
            ? "--unet takes the file of a UNet"
            : "--checkpoint takes a checkpoint in one .safetensors file, and sag-export makes "
              "such a directory of a diffusers folder"));
  }
  if (!fs::is_directory(path, error)) {
    throw UsageError(
        fmt::format("--model: there is no directory \"{}\"{}", path, suggestion_beside(path)));
  }
  const auto has = [&](const char* name) { return fs::exists(fs::path(path) / name, error); };
  if (!fs::exists(file, error) && (has("model_index.json") || has("config.json"))) {
    // With a slash at its end, whether the user wrote one or not.
    const auto folder = fs::absolute(fs::path(path) / "", error).lexically_normal();
    const auto whole = folder.parent_path().parent_path();
    const bool is_part = !has("model_index.json") && fs::exists(whole / "model_index.json", error);
    throw UsageError(fmt::format(
        "--model: \"{}\" is a {}; \"sag-export {}{} --out DIR\" makes a model directory of it.",
        path, is_part ? "part of a diffusers pipeline" : "diffusers folder",
        is_part ? whole.string() : path,
        is_part || has("model_index.json") ? "" : " --prediction eps"));
  }
  return read_json_file(file, fmt::format("--model: the directory \"{}\" has no model.json that "
                                          "can be read.",
                                          path));
}

}  // namespace

ModelDirectory read_model_directory(const std::string& path, const nlohmann::json& patch) {
  constexpr Range<std::int64_t> kFormat = whole(1, 65536);
  const std::string file = (fs::path(path) / "model.json").string();
  auto content = read_description(path, file);
  if (content.is_object()) content.merge_patch(patch);
  JsonObject root(content, file);
  if (const auto format = read_number(root.given("format"), kFormat); format != 1) {
    throw UsageError(fmt::format("{} has format {}, but only format 1 is known.", file, format));
  }
  ModelDirectory model;
  model.path = path;
  model.name =
      root.has("name") ? read_text(root.given("name")) : fs::path(path).filename().string();
  read_network(root, model.choices);
  read_sample(root.object("sample"), model);
  model.files = read_files(root.object("files"), path);
  if (root.has("inputs")) {
    const auto latent = latent_size_options().decide(model.choices).channels;
    model.inputs = read_inputs(root.object("inputs"), latent);
  }
  if (root.has("defaults")) read_defaults(root.object("defaults"), model.choices);
  root.refuse_unknown_keys();
  return model;
}

}  // namespace sag_sample

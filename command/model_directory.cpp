#include "model_directory.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "errors.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// One JSON object: hands out its values, checked, and in the end names the keys nobody asked for.
class Section {
 public:
  // `where` names the object in messages, `model.json: "sample"` say.
  Section(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object_.is_object()) throw UsageError(fmt::format("{} must be an object.", where_));
  }

  bool has(const std::string& key) {
    known_.insert(key);
    return object_.contains(key);
  }

  const json& value(const std::string& key) {
    if (!has(key)) throw UsageError(fmt::format("{} is missing.", name(key)));
    return object_.at(key);
  }

  std::string text(const std::string& key) {
    const json& found = value(key);
    if (!found.is_string() || found.get_ref<const std::string&>().empty()) {
      fail(key, "a text that is not empty");
    }
    return found.get<std::string>();
  }

  bool flag(const std::string& key) {
    const json& found = value(key);
    if (!found.is_boolean()) fail(key, "true or false");
    return found.get<bool>();
  }

  double number(const std::string& key, double low, const char* what) {
    const json& found = value(key);
    if (!found.is_number() || !std::isfinite(found.get<double>()) || found.get<double>() < low) {
      fail(key, what);
    }
    return found.get<double>();
  }

  std::int64_t whole_number(const std::string& key, std::int64_t low, std::int64_t high) {
    return checked_whole_number(key, value(key), low, high);
  }

  std::int64_t checked_whole_number(const std::string& key, const json& found, std::int64_t low,
                                    std::int64_t high) {
    if (!found.is_number_integer() || found.get<double>() < static_cast<double>(low) ||
        found.get<double>() > static_cast<double>(high)) {
      fail(key, fmt::format("a whole number between {} and {}", low, high), shown(found));
    }
    return found.get<std::int64_t>();
  }

  void read(const std::string& key, std::optional<std::string>& target) {
    if (has(key)) target = text(key);
  }
  void read(const std::string& key, std::optional<double>& target, double low, const char* what) {
    if (has(key)) target = number(key, low, what);
  }
  void read(const std::string& key, std::optional<std::int64_t>& target, std::int64_t low,
            std::int64_t high) {
    if (has(key)) target = whole_number(key, low, high);
  }

  Section section(const std::string& key) { return Section(value(key), name(key)); }

  void refuse_unknown_keys() const {
    for (const auto& [key, ignored] : object_.items()) {
      if (!known_.contains(key)) {
        throw UsageError(fmt::format("{} has the unknown key \"{}\"; known are {}.", where_, key,
                                     fmt::join(known_, ", ")));
      }
    }
  }

  [[noreturn]] void fail(const std::string& key, const std::string& what) const {
    fail(key, what, shown(object_.at(key)));
  }
  [[noreturn]] void fail(const std::string& key, const std::string& what,
                         const std::string& got) const {
    throw UsageError(fmt::format("{} must be {}, got {}.", name(key), what, got));
  }

 private:
  std::string name(const std::string& key) const { return fmt::format("{}: \"{}\"", where_, key); }

  static std::string shown(const json& value) {
    if (value.is_object()) return "an object";
    if (value.is_array()) return fmt::format("an array of {}", value.size());
    const auto text = value.dump(-1, ' ', true, json::error_handler_t::replace);
    return text.size() <= 60 ? text : text.substr(0, 57) + "...";
  }

  const json& object_;
  std::string where_;
  std::set<std::string> known_;
};

constexpr const char* kFinite = "a finite number";
constexpr const char* kNotNegative = "a number of at least 0";
constexpr const char* kPositive = "a number greater than 0";
constexpr double kLowest = std::numeric_limits<double>::lowest();
constexpr double kTiny = std::numeric_limits<double>::min();
constexpr std::int64_t kMost = 65536;

void read_prediction(Section& root, ModelDirectory& model) {
  constexpr std::string_view kKnown[] = {"eps", "v", "x0", "edm", "flow"};
  model.prediction = root.text("prediction");
  if (std::find(std::begin(kKnown), std::end(kKnown), model.prediction) == std::end(kKnown)) {
    root.fail("prediction", fmt::format("one of {}", fmt::join(kKnown, ", ")));
  }
  if (model.prediction == "edm") {
    root.read("sigma_data", model.sigma_data, kTiny, kPositive);
    root.read("sigma_min", model.sigma_min, kTiny, kPositive);
    root.read("sigma_max", model.sigma_max, kTiny, kPositive);
  } else if (model.prediction == "flow") {
    root.read("shift", model.shift, kTiny, kPositive);
    root.read("timestep_multiplier", model.timestep_multiplier, kTiny, kPositive);
  } else {
    root.read("beta_start", model.beta_start, kTiny, kPositive);
    root.read("beta_end", model.beta_end, kTiny, kPositive);
    root.read("beta_schedule", model.beta_schedule);
    root.read("timesteps", model.timesteps, 1, 1000000);
    if (root.has("zero_terminal_snr")) model.zero_terminal_snr = root.flag("zero_terminal_snr");
  }
}

void read_sample(Section sample, ModelDirectory& model) {
  const json& shape = sample.value("shape");
  if (!shape.is_array() || shape.size() != 3) {
    sample.fail("shape", "three whole numbers: channels, height, width");
  }
  for (std::size_t i = 0; i < 3; ++i) {
    model.shape[i] = sample.checked_whole_number("shape", shape[i], 1, kMost);
  }
  if (sample.has("multiple")) model.multiple = sample.whole_number("multiple", 1, kMost);
  sample.refuse_unknown_keys();
  if (model.shape[1] % model.multiple != 0 || model.shape[2] % model.multiple != 0) {
    sample.fail("shape", fmt::format("a height and width that are multiples of {}", model.multiple),
                fmt::format("{} x {}", model.shape[1], model.shape[2]));
  }
}

// A file name of the model: it must stay inside the directory, and the file must be there.
std::string read_file_name(Section& files, const std::string& key, const std::string& directory) {
  if (!files.has(key)) return {};
  const fs::path name = files.text(key);
  const bool escapes =
      std::any_of(name.begin(), name.end(), [](const auto& part) { return part == ".."; });
  if (name.is_absolute() || escapes) {
    files.fail(key, "the name of a file inside the model directory");
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

void read_files(Section files, ModelDirectory& model) {
  files.value("unet");
  model.unet = read_file_name(files, "unet", model.path);
  model.text_encoder = read_file_name(files, "text_encoder", model.path);
  model.decoder = read_file_name(files, "decoder", model.path);
  model.encoder = read_file_name(files, "encoder", model.path);
  files.refuse_unknown_keys();
}

void read_guidance(Section sag, ModelDefaults& defaults) {
  sag.read("scale", defaults.sag_scale, kLowest, kFinite);
  sag.read("blur_sigma", defaults.sag_blur, 0.0, kNotNegative);
  sag.read("threshold", defaults.sag_threshold, kLowest, kFinite);
  sag.read("kernel_size", defaults.sag_kernel, 0, kMost);
  if (defaults.sag_kernel && *defaults.sag_kernel != 0 && *defaults.sag_kernel % 2 == 0) {
    sag.fail("kernel_size", "an odd whole number, or 0");
  }
  sag.read("sigma_start", defaults.sag_start, 0.0, kNotNegative);
  sag.read("sigma_end", defaults.sag_end, 0.0, kNotNegative);
  sag.refuse_unknown_keys();
}

void read_defaults(Section section, ModelDefaults& defaults) {
  section.read("sampler", defaults.sampler);
  section.read("schedule", defaults.schedule);
  section.read("steps", defaults.steps, 1, 10000);
  section.read("cfg", defaults.cfg, kLowest, kFinite);
  if (section.has("sag")) read_guidance(section.section("sag"), defaults);
  section.refuse_unknown_keys();
}

// Arrays and objects are no deeper than this: copying and writing JSON goes into each.
constexpr int kDeepest = 100;

json parse_json(const std::string& file, const std::string& content) {
  const auto check_depth = [&](int depth, json::parse_event_t, json&) {
    if (depth > kDeepest) {
      throw UsageError(fmt::format("{} has values nested deeper than {}.", file, kDeepest));
    }
    return true;
  };
  try {
    return json::parse(content, check_depth);
  } catch (const json::parse_error& parse) {
    throw UsageError(fmt::format("{} is no JSON: the mistake is at byte {}.", file, parse.byte));
  } catch (const json::exception&) {
    // All that is left, in a text, is a number beyond doubles: 1e999.
    throw UsageError(fmt::format("{} holds a number that is too large.", file));
  }
}

json read_json(const std::string& path, const std::string& file) {
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    throw UsageError(fmt::format("--model: there is no directory \"{}\".", path));
  }
  std::ifstream stream(file, std::ios::binary);
  std::stringstream content;
  if (stream) content << stream.rdbuf();
  if (!stream || content.fail()) {
    throw UsageError(
        fmt::format("--model: the directory \"{}\" has no model.json that can be read.", path));
  }
  return parse_json(file, content.str());
}

}  // namespace

ModelDirectory read_model_directory(const std::string& path) {
  const std::string file = (fs::path(path) / "model.json").string();
  const json content = read_json(path, file);
  Section root(content, file);
  if (const auto format = root.whole_number("format", 1, kMost); format != 1) {
    throw UsageError(fmt::format("{} has format {}, but only format 1 is known.", file, format));
  }
  ModelDirectory model;
  model.path = path;
  model.name = root.has("name") ? root.text("name") : fs::path(path).filename().string();
  read_prediction(root, model);
  read_sample(root.section("sample"), model);
  root.read("site", model.site);
  read_files(root.section("files"), model);
  if (root.has("defaults")) read_defaults(root.section("defaults"), model.defaults);
  root.refuse_unknown_keys();
  return model;
}

}  // namespace sag_sample

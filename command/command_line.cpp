#include "command_line.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>
#include <ostream>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "errors.h"
#include "guidance_rows.h"
#include "guidances.h"
#include "options.h"
#include "sag/version.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFooter = R"(
Examples:
  sag-sample --checkpoint v1-5-pruned-emaonly.safetensors --prompt "a red fox" --out fox.png
  sag-sample --model models/emoji --prompt "red heart" --out heart.png
  sag-sample --model models/emoji --prompt pizza --unconditional 3 --compare --out sheet.png
  sag-sample --model sd15 --prompt "a red fox" --image photo.png --denoise 0.6 --out fox.png
  sag-sample --unet unet.ts --cond text.pt:cond --uncond text.pt:uncond --save-latent latent.pt

Exit codes: 0 done, 1 a mistake in the arguments or files, 2 the run failed.)";

std::string version() {
  return fmt::format("sag-sample {}.{}.{}", SAG_VERSION_MAJOR, SAG_VERSION_MINOR,
                     SAG_VERSION_PATCH);
}

// The text of an option in the help, in lines that fit next to the options' column.
std::string help_text(const Option& option) {
  constexpr std::size_t kWidth = 70;
  std::string text = option.help, wrapped;
  if (!option.shown_default.empty()) text += fmt::format(" [{}]", option.shown_default);
  while (text.size() > kWidth) {
    const auto space = text.rfind(' ', kWidth);
    if (space == std::string::npos) break;
    wrapped += text.substr(0, space) + '\n';
    text.erase(0, space + 1);
  }
  return wrapped + text;
}

void choose(Choices& choices, const Option& option, Given given) {
  if (const auto before = choices.find(option.name); option.repeats && before != choices.end()) {
    given.words.insert(given.words.begin(), before->second.words.begin(),
                       before->second.words.end());
  }
  option.check(given);
  choices[option.name] = std::move(given);
}

// Later values replace earlier ones, so that a script's options can be overridden after them.
void add_option(CLI::App& app, const std::string& title, const Option& option, Choices& choices) {
  const auto& name = option.name;
  CLI::Option* added = nullptr;
  if (option.type.empty()) {
    added = app.add_flag_callback(
        name,
        [&choices, &option] { choose(choices, option, {.where = option.name, .value = true}); },
        help_text(option));
  } else {
    const auto take = [&choices, &option](const std::vector<std::string>& words) {
      for (const auto& word : words) {
        choose(choices, option, {.where = option.name, .words = {word}});
      }
      return true;
    };
    added = app.add_option(name, take, help_text(option))
                ->type_name(option.type)
                ->expected(1)
                ->allow_extra_args(false)
                ->multi_option_policy(option.repeats ? CLI::MultiOptionPolicy::TakeAll
                                                     : CLI::MultiOptionPolicy::TakeLast);
  }
  added->group(option.hidden ? "" : title);
}

// One name a line, for "--sampler help" and the like.
bool list_names(const std::vector<std::string>& arguments, std::ostream& out) {
  const auto asks_for = [&](const std::string& option) {
    const auto named = std::find(arguments.begin(), arguments.end(), option);
    return std::count(arguments.begin(), arguments.end(), option + "=help") > 0 ||
           (named != arguments.end() && named + 1 != arguments.end() && named[1] == "help");
  };
  bool listed = false;
  for (const auto* group : all_options()) {
    for (const auto& option : group->options) {
      if (option.listed.empty() || !asks_for(option.name)) continue;
      out << fmt::format("{}\n", fmt::join(option.listed, "\n"));
      listed = true;
    }
  }
  return listed;
}

// CLI11 takes arguments from the back, and takes the next one for the value of "--prompt=".
std::vector<std::string> for_cli11(const std::vector<std::string>& arguments) {
  std::vector<std::string> reversed;
  for (auto argument = arguments.rbegin(); argument != arguments.rend(); ++argument) {
    const bool empty_value =
        argument->starts_with("--") && argument->find('=') == argument->size() - 1;
    if (empty_value) reversed.emplace_back();
    reversed.push_back(empty_value ? argument->substr(0, argument->size() - 1) : *argument);
  }
  return reversed;
}

// An ending that promises another form than PNG.
bool is_other_format(const std::string& path) {
  auto extension = fs::path(path).extension().string();
  for (auto& c : extension) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  constexpr std::array<std::string_view, 17> kOthers = {
      ".jpg", ".jpeg", ".webp", ".gif", ".bmp",         ".tif",  ".tiff", ".json", ".txt",
      ".pt",  ".pt2",  ".pth",  ".ts",  ".safetensors", ".ckpt", ".bin",  ".gguf"};
  return std::find(kOthers.begin(), kOthers.end(), extension) != kOthers.end();
}

bool is_same_file(const fs::path& a, const fs::path& b) {
  std::error_code error;
  if (fs::exists(a, error) && !fs::is_regular_file(a, error)) return false;
  if (fs::exists(a, error) && fs::exists(b, error)) return fs::equivalent(a, b, error);
  return fs::weakly_canonical(fs::absolute(a, error), error) ==
         fs::weakly_canonical(fs::absolute(b, error), error);
}

// The file of FILE, FILE:WHAT or NAME=FILE.
fs::path file_in(const std::string& option, const std::string& word) {
  if (option == "--embedding") return word.substr(word.find('=') + 1);
  std::error_code error;
  return fs::exists(word, error) ? word : word.substr(0, word.rfind(':'));
}

// Others in a model's folder may be outputs of earlier runs.
bool is_of_a_model(const fs::path& path) {
  return path.extension() == ".ts" || path.extension() == ".pt2" ||
         path.filename() == "model.json" || path.filename() == "weights.pt";
}

struct NamedFile {
  const char* option;
  fs::path path;
};

std::vector<NamedFile> files_in(const char* option, const std::string& folder) {
  std::vector<NamedFile> files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (is_of_a_model(entry.path())) files.push_back({option, entry.path()});
  }
  return files;
}

// An output takes the place of whatever has its name.
void check_overwrites_nothing(const Choices& choices) {
  const auto words = [&](const char* option) {
    const auto given = choices.find(option);
    return given == choices.end() ? std::vector<std::string>() : given->second.words;
  };
  std::vector<NamedFile> taken;
  for (const char* option :
       {"--checkpoint", "--unet", "--vae", "--lora", "--embedding", "--image", "--mask", "--latent",
        "--noise", "--inpaint-noise", "--cond", "--cond-y", "--uncond", "--uncond-y", "--concat"}) {
    for (const auto& word : words(option)) taken.push_back({option, file_in(option, word)});
  }
  for (const char* option : {"--model", "--skeleton", "--compiled"}) {
    for (const auto& folder : words(option)) {
      const auto files = files_in(option, folder);
      taken.insert(taken.end(), files.begin(), files.end());
    }
  }
  for (const char* output : {"--out", "--save-latent", "--json"}) {
    for (const auto& path : words(output)) {
      for (const auto& other : taken) {
        if (!is_same_file(path, other.path)) continue;
        throw UsageError(fmt::format("{} must not take the place of {}'s file \"{}\".", output,
                                     other.option, path));
      }
      taken.push_back({output, path});
    }
  }
}

void never_both(bool a, bool b, const std::string& sentence) {
  if (a && b) throw UsageError(sentence);
}

void check_tensors(const Choices& choices) {
  const auto given = [&](const char* option) { return choices.contains(option); };
  const bool start = given("--latent") || given("--image");
  never_both(given("--cond-y"), !given("--cond"), "--cond-y needs --cond.");
  never_both(given("--uncond-y"), !given("--uncond"), "--uncond-y needs --uncond.");
  never_both(given("--sigmas"), given("--schedule") || given("--steps") || given("--denoise"),
             "--sigmas is used as it is: --schedule, --steps and --denoise cannot be given with "
             "it.");
  never_both(given("--latent"), given("--image"), "--latent and --image cannot be given together.");
  never_both(sampling_options().decide(choices).denoise < 1, !start,
             "--denoise needs the --latent or --image that it starts from.");
  never_both(given("--mask"), !start, "--mask needs the --latent or --image that it repaints.");
  never_both(given("--uncond-class"), !given("--class"), "--uncond-class needs --class.");
  never_both(given("--uncond-class"), given("--cond") && !given("--uncond"),
             "--uncond-class needs --uncond beside --cond.");
  never_both(given("--inpaint-noise"), !given("--mask"), "--inpaint-noise needs a --mask.");
  const bool sized = given("--channels") || given("--height") || given("--width");
  for (const char* option : {"--noise", "--latent", "--image"}) {
    if (sized && given(option)) {
      throw UsageError(fmt::format(
          "--channels, --height and --width cannot be given together with {}.", option));
    }
  }
}

// Guidance is between a conditional and an unconditional prediction. Without both a scale does
// nothing, and is refused; that of model.json is left alone.
void check_scales(const Choices& choices, bool texts) {
  const auto given = [&](const char* option) { return choices.contains(option); };
  const bool two_classes = given("--class") && given("--uncond-class");
  if (given("--prompt") || (given("--cond") ? given("--uncond") : two_classes)) return;
  const bool class_alone = given("--class") && !texts && !given("--uncond");
  const char* missing = given("--cond") ? "--uncond"
                        : class_alone   ? "--uncond-class"
                                        : "a --prompt, or --cond and --uncond";
  for (const auto& [option, scale] :
       {std::pair("--cfg", guider_options().decide(choices).cond_scale),
        std::pair("--image-cfg", further_options().decide(choices).image_cfg)}) {
    if (given(option) && scale != 1) {
      throw UsageError(fmt::format("{} {} needs {}.", option, scale, missing));
    }
  }
}

void check_cfg_window(const Choices& choices) {
  const auto given = [&](const char* option) { return choices.contains(option); };
  never_both(given("--cfg-start"), given("--cfg-start-percent"),
             "--cfg-start and --cfg-start-percent cannot be given together.");
  never_both(given("--cfg-end"), given("--cfg-end-percent"),
             "--cfg-end and --cfg-end-percent cannot be given together.");
  const auto window = guider_options().decide(choices).cfg_window;
  if (window.sigma_start < window.sigma_end) {
    throw UsageError(fmt::format("--cfg-start must be at least --cfg-end ({}), got {}.",
                                 window.sigma_end, window.sigma_start));
  }
  if (window.start_percent.value_or(0.0) > window.end_percent.value_or(1.0)) {
    throw UsageError(
        fmt::format("--cfg-start-percent must be at most --cfg-end-percent ({}), got {}.",
                    window.end_percent.value_or(1.0), *window.start_percent));
  }
  never_both(!is_everywhere(window), further_options().decide(choices).image_cfg != 1,
             "--cfg-start and --cfg-end cannot be given together with --image-cfg.");
}

void check_outputs(const Choices& choices) {
  const auto outputs = output_options().decide(choices);
  if (outputs.out.empty() && outputs.save_latent.empty() && outputs.json.empty()) {
    throw UsageError("Nothing to write: give --out, --save-latent or --json.");
  }
  never_both(outputs.compare, outputs.out.empty(), "--compare needs --out.");
  if (is_other_format(outputs.out)) {
    throw UsageError(
        fmt::format("--out writes PNG: let its name end in .png, got \"{}\".", outputs.out));
  }
  check_overwrites_nothing(choices);
}

void check_guidances(const Choices& choices) {
  const auto guidances = decide_guidances(choices, "middle");
  const bool listed = choices.contains("--guidance");
  std::vector<std::string_view> off;
  for (const auto& kind : guidance_kinds()) {
    if (kind.check) kind.check(choices);
    if (!kind.off) continue;
    if (choices.contains(kind.off)) off.push_back(kind.off);
    never_both(listed, choices.contains(kind.off),
               fmt::format("{} and --guidance, which says what guides, cannot be given together.",
                           kind.off));
  }
  never_both(choices.contains("--compare"), guidances.empty(),
             fmt::format("--compare and {} cannot be given together.", fmt::join(off, " and ")));
}

void check_source(const Choices& choices) {
  std::vector<std::string_view> sources;
  for (const char* option : {"--checkpoint", "--model", "--unet"}) {
    if (choices.contains(option)) sources.emplace_back(option);
  }
  if (sources.empty()) throw UsageError("One of --checkpoint, --model and --unet is needed.");
  if (sources.size() > 1) {
    throw UsageError(fmt::format("{} cannot be given together.", fmt::join(sources, " and ")));
  }
  if (choices.contains("--checkpoint")) return;
  never_both(choices.contains("--describe"), true, "--describe needs a --checkpoint.");
  for (const auto& option : checkpoint_options().options) {
    never_both(choices.contains(option.id()), true,
               fmt::format("{} needs a --checkpoint.", option.name));
  }
}

void check_combinations(const Choices& choices) {
  const auto given = [&](const char* option) { return choices.contains(option); };
  check_source(choices);
  for (const char* option : {"--list-sites", "--out", "--save-latent", "--json", "--compiled"}) {
    never_both(given("--describe"), given(option),
               fmt::format("--describe only prints: it cannot be given together with {}.", option));
  }
  if (given("--list-sites") || given("--describe")) return;
  check_outputs(choices);
  const bool texts = given("--prompt") || picture_options().decide(choices).unconditional > 0;
  never_both(texts, given("--cond") || given("--uncond"),
             "--prompt and --unconditional cannot be given together with --cond and --uncond.");
  never_both(given("--negative"), !given("--prompt"), "--negative needs a --prompt.");
  for (const char* option : {"--prompt-weights", "--clip-skip"}) {
    never_both(given(option), !texts,
               fmt::format("{} needs a --prompt or --unconditional.", option));
  }
  check_tensors(choices);
  check_scales(choices, texts);
  check_cfg_window(choices);
  check_guidances(choices);
}

std::string unknown_option(const std::string& name) {
  std::vector<std::string> known = {"--help", "--version"};
  for (const auto* group : all_options()) {
    for (const auto& option : group->options) {
      if (!option.name.empty() && !option.hidden) known.push_back(option.name);
    }
  }
  const auto bare = name.substr(0, name.find('='));
  const auto hint = suggestion(bare, known);
  return fmt::format("There is no option {}{}", bare, hint == "." ? "; --help lists them." : hint);
}

void parse(CLI::App& app, const std::vector<std::string>& arguments) {
  try {
    app.parse(for_cli11(arguments));
  } catch (const CLI::ExtrasError&) {
    const std::string extra = app.remaining().front();
    throw UsageError(extra.starts_with('-') ? unknown_option(extra)
                                            : fmt::format("\"{}\" belongs to no option.", extra));
  } catch (const CLI::ArgumentMismatch&) {
    throw UsageError(fmt::format("{} needs a value.", arguments.back()));
  }
}

}  // namespace

std::optional<Choices> parse_command_line(const std::vector<std::string>& arguments,
                                          std::ostream& out) {
  if (list_names(arguments, out)) return std::nullopt;
  Choices choices;
  CLI::App app("Draws pictures with a diffusion model, steered by Self-Attention Guidance.",
               "sag-sample");
  app.footer(kFooter);
  app.set_help_flag();
  app.get_formatter()->column_width(30);
  for (const auto* group : all_options()) {
    for (const auto& option : group->options) {
      if (!option.name.empty()) add_option(app, group->title, option, choices);
    }
  }
  app.set_help_flag("-h,--help", "Print this help and exit")->group("Help");
  app.set_version_flag("--version", version(), "Print the version and exit")->group("Help");
  try {
    parse(app, arguments);
  } catch (const CLI::CallForHelp&) {
    out << app.help();
    return std::nullopt;
  } catch (const CLI::CallForVersion&) {
    out << version() << '\n';
    return std::nullopt;
  } catch (const CLI::ParseError& error) {
    throw UsageError(fmt::format("{}; --help lists the options.", error.what()));
  }
  check_combinations(choices);
  return choices;
}

}  // namespace sag_sample

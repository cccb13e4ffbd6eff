#include "options.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <ostream>
#include <span>
#include <string_view>
#include <type_traits>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "errors.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/version.h"

namespace sag_sample {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The numbers that an option takes, and how to say it.
template <typename T>
struct Range {
  T low, high;
  const char* what;
  bool open_low = false;  // low itself is too little
};

template <typename T>
T parse_number(const std::string& option, const std::string& text, const Range<T>& range) {
  T value = {};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  bool good = error == std::errc() && stop == end && value >= range.low && value <= range.high;
  if (range.open_low && value == range.low) good = false;
  if (!good) throw UsageError(fmt::format("{} must be {}, got {}.", option, range.what, text));
  return value;
}

constexpr Range<double> kFinite = {std::numeric_limits<double>::lowest(),
                                   std::numeric_limits<double>::max(), "a finite number"};
constexpr Range<double> kPositive = {0.0, std::numeric_limits<double>::max(),
                                     "a number greater than 0", true};
constexpr Range<double> kNotNegative = {0.0, std::numeric_limits<double>::max(),
                                        "a number of at least 0"};
constexpr Range<double> kSigma = {0.0, kInfinity, "a number of at least 0, or inf"};
constexpr Range<double> kShare = {0.0, 1.0, "a number between 0 and 1"};

template <typename T>
void assign(T& target, T value) {
  target = std::move(value);
}
template <typename T>
void assign(std::optional<T>& target, T value) {
  target = std::move(value);
}

// The text of an option in the help, in lines that fit beside the options' column.
std::string describe(const std::string& description, const std::string& shown_default) {
  constexpr std::size_t kWidth = 70;
  std::string text = description, wrapped;
  if (!shown_default.empty()) text += fmt::format(" [{}]", shown_default);
  while (text.size() > kWidth) {
    const auto space = text.rfind(' ', kWidth);
    if (space == std::string::npos) break;
    wrapped += text.substr(0, space) + '\n';
    text.erase(0, space + 1);
  }
  return wrapped + text;
}

// One group of options in the help. Later values of an option replace earlier ones, so that a
// script's options can be overridden behind them.
class Group {
 public:
  Group(CLI::App& app, std::string name) : app_(app), name_(std::move(name)) {}

  template <typename T, typename Target>
  CLI::Option* number(const std::string& option, Target& target, const Range<T>& range,
                      const char* type, const char* description, const char* shown_default = "") {
    return finish(app_.add_option_function<std::string>(
                      option,
                      [option, &target, range](const std::string& text) {
                        assign(target, parse_number<T>(option, text, range));
                      },
                      describe(description, shown_default)),
                  type);
  }

  template <typename Target>
  CLI::Option* text(const std::string& option, Target& target, const char* type,
                    const char* description, const char* shown_default = "") {
    return finish(app_.add_option_function<std::string>(
                      option,
                      [option, &target](const std::string& value) {
                        if (value.empty() && option != "--negative") {
                          throw UsageError(fmt::format("{} must not be empty.", option));
                        }
                        assign(target, value);
                      },
                      describe(description, shown_default)),
                  type);
  }

  template <typename Target>
  CLI::Option* choice(const std::string& option, Target& target,
                      std::vector<std::string_view> choices, const char* description,
                      const char* shown_default = "") {
    auto* added = app_.add_option_function<std::string>(
        option,
        [option, choices, &target](const std::string& value) {
          if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
            throw UsageError(fmt::format("{} must be one of {}, got \"{}\".", option,
                                         fmt::join(choices, ", "), value));
          }
          assign(target, value);
        },
        describe(description, shown_default));
    return finish(added, fmt::format("{}", fmt::join(choices, "|")));
  }

  // A choice among so many that "help" lists them.
  CLI::Option* listed_choice(const std::string& option, std::optional<std::string>& target,
                             std::span<const std::string_view> choices, const char* description,
                             const char* shown_default) {
    auto* added =
        choice(option, target, {choices.begin(), choices.end()}, description, shown_default);
    return added->type_name("NAME");
  }

  CLI::Option* flag(const std::string& option, bool& target, const char* description) {
    return app_.add_flag(option, target, describe(description, ""))->group(name_);
  }

  CLI::Option* prompts(const std::string& option, std::vector<std::string>& target,
                       const char* description) {
    return app_.add_option(option, target, describe(description, ""))
        ->type_name("TEXT")
        ->expected(1)
        ->allow_extra_args(false)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
        ->group(name_);
  }

 private:
  CLI::Option* finish(CLI::Option* option, const std::string& type) {
    return option->type_name(type)->group(name_)->multi_option_policy(
        CLI::MultiOptionPolicy::TakeLast);
  }

  CLI::App& app_;
  std::string name_;
};

void add_model_options(CLI::App& app, Options& o) {
  Group group(app, "Model (one of --model and --unet)");
  group.text("--model", o.model, "DIR", "Directory with model.json and the files that it names");
  group.text(
      "--unet", o.unet, "FILE",
      "TorchScript UNet, compiled package (*.pt2) or folder of packages, to be used with tensors");
  group.choice("--prediction", o.prediction, {"eps", "v", "x0", "edm", "flow"},
               "What the UNet predicts. eps, v and x0 use Stable Diffusion's noise table",
               "the model's, else eps");
  group.number("--sigma-data", o.sigma_data, kPositive, "X", "edm: spread of the data",
               "the model's, else 0.5");
  group.number("--sigma-min", o.sigma_min, kPositive, "X", "edm: lowest noise level of schedules",
               "the model's, else 0.002");
  group.number("--sigma-max", o.sigma_max, kPositive, "X", "edm: highest noise level of schedules",
               "the model's, else 80");
  group.flag("--zero-terminal-snr", o.zero_terminal_snr,
             "eps, v and x0: rescale the noise table so that it ends in pure noise");
  group.number("--shift", o.shift, kPositive, "X", "flow: shift of the noise levels",
               "the model's, else 1");
  group.number("--timestep-multiplier", o.timestep_multiplier, kPositive, "X",
               "flow: timestep of noise level 1", "the model's, else 1000");
  group.number("--latent-scale", o.latent_scale, kPositive, "X",
               "Latents are multiplied by it on entry and divided by it in the end", "1");
  group.text("--site", o.site, "SITE",
             "Self-attention to watch: middle.0.0, a dotted path, or #ordinal",
             "the model's, else middle.0.0");
  group.flag(
      "--list-sites", o.list_sites,
      "Print the self-attentions of the UNet, and exit; with their sizes where the text encoder or "
      "--cond tells how to run it");
}

void add_picture_options(CLI::App& app, Options& o) {
  constexpr Range<std::int64_t> kCount = {1, 4096, "a whole number between 1 and 4096"};
  constexpr Range<std::int64_t> kSide = {1, 65536, "a whole number between 1 and 65536"};
  Group group(app, "Pictures (T is FILE or FILE:KEY, written by torch.save)");
  group.prompts(
      "--prompt", o.prompts,
      "Draw this; may be given several times. An empty text draws an unconditional picture");
  group.text("--negative", o.negative, "TEXT", "What the prompts are guided away from",
             "an empty text");
  group.number("--unconditional", o.unconditional,
               Range<std::int64_t>{0, 4096, "a whole number between 0 and 4096"}, "N",
               "Draw N pictures of no prompt, with the seeds from --seed on", "0");
  group.number("--batch", o.batch, kCount, "N",
               "Pictures per prompt, each with the next seed; all depend on their own seed only",
               "1");
  group.number("--seed", o.seed,
               Range<std::uint64_t>{0, std::numeric_limits<std::uint64_t>::max(),
                                    "a whole number between 0 and 18446744073709551615"},
               "N", "Seed of the first picture; the same noise on every device", "0");
  group.text("--cond", o.cond, "T", "Conditional context, [1 or images, tokens, width]");
  group.text("--uncond", o.uncond, "T", "Unconditional context");
  group.text("--cond-y", o.cond_y, "T", "Conditional vector (SDXL), [1 or images, features]");
  group.text("--uncond-y", o.uncond_y, "T", "Unconditional vector");
  group.text("--noise", o.noise, "T",
             "Start noise, unit Gaussian, [images, channels, height, width]", "from --seed");
  group.text("--latent", o.latent, "T", "Start image, a clean latent");
  group.text("--image", o.image, "FILE.png", "Start image, for models with an encoder");
  group.text("--mask", o.mask, "T",
             "Where to repaint --latent or --image: 1 = repaint, 0 = keep, per latent cell");
  group.text("--inpaint-noise", o.inpaint_noise, "T", "Noise for what is kept",
             "the start noise; ddim: of the next seed");
  group.number("--channels", o.channels, kSide, "N", "Channels of the latent",
               "the model's, else 4");
  group.number("--height", o.height, kSide, "N",
               "Height of the latent, in its cells (Stable Diffusion: pixels / 8)",
               "the model's, else 64");
  group.number("--width", o.width, kSide, "N", "Width, likewise", "the model's, else 64");
}

void add_sampling_options(CLI::App& app, Options& o) {
  Group group(app, "Sampling");
  group.listed_choice("--sampler", o.sampler, sag::sampler_names(),
                      "Sampler; --sampler help lists them", "the model's, else euler");
  group.listed_choice("--schedule", o.schedule, sag::schedule_names(),
                      "Schedule of the noise levels; --schedule help lists them",
                      "the model's, else normal");
  group.number("--steps", o.steps,
               Range<std::int64_t>{1, 10000, "a whole number between 1 and 10000"}, "N", "Steps",
               "the model's, else 20");
  group.number("--denoise", o.denoise,
               Range<double>{0.0, 1.0, "a number greater than 0 and at most 1", true}, "X",
               "How much of --latent or --image to noise over, 1: all; --steps run from there",
               "1");
  group.text("--sigmas", o.sigmas, "T",
             "Noise levels, used as they are, the last 0 included, in place of a schedule");
  group.number("--eta", o.eta, kShare, "X",
               "Share of fresh noise in ancestral and SDE samplers, 0 ... 1", "1");
  group.number("--s-noise", o.s_noise, kNotNegative, "X", "Factor on fresh noise", "1");
  group.number("--cfg", o.cfg, kFinite, "X", "Scale of classifier-free guidance",
               "the model's, else 7.5; 1 without an unconditional prediction");
}

void add_sag_options(CLI::App& app, Options& o) {
  Group group(app, "Self-attention guidance");
  group.number("--sag-scale", o.sag_scale, kFinite, "X", "How strongly to steer; 0 is off",
               "the model's, else 0.5");
  group.number("--sag-blur", o.sag_blur, kNotNegative, "X", "Sigma of the blur, in latent cells",
               "the model's, else 2");
  group.number("--sag-threshold", o.sag_threshold, kFinite, "X",
               "Blur what receives more attention than this; 1 is the average",
               "the model's, else 1");
  group.number("--sag-kernel", o.sag_kernel,
               Range<std::int64_t>{0, 65535, "an odd whole number, or 0"}, "N",
               "Taps of the blur, odd; 0: as many as --sag-blur needs", "the model's, else 9");
  group.number("--sag-start", o.sag_start, kSigma, "SIGMA", "Guide from this noise level on");
  group.number("--sag-end", o.sag_end, kSigma, "SIGMA", "Guide down to this noise level");
  group.number("--sag-start-percent", o.sag_start_percent, kShare, "X",
               "The same as a share of the model's timesteps, 0 ... 1");
  group.number("--sag-end-percent", o.sag_end_percent, kShare, "X",
               "The same as a share of the model's timesteps, 0 ... 1");
  group.number("--sag-interval", o.sag_interval,
               Range<std::int64_t>{1, 10000, "a whole number between 1 and 10000"}, "N",
               "Guide every Nth step: 1/N of the extra rows, and less of the effect", "1");
  group.flag("--sag-one-pass", o.sag_one_pass,
             "Perturb with what the step before blurred, in one call of the UNet");
  group.flag("--sag-shuffle", o.sag_shuffle,
             "Control: blur as much, but at random places instead of what receives attention");
  group.flag("--no-sag", o.no_sag, "Sample without self-attention guidance");
}

void add_device_options(CLI::App& app, Options& o) {
  Group group(app, "Device");
  group.text("--device", o.device, "cpu|cuda[:N]", "Where to compute",
             "cuda if there is one; a compiled UNet's own");
  group.choice("--dtype", o.dtype, {"fp32", "fp16", "bf16"}, "Precision of the UNet",
               "fp32 on the CPU, the file's on CUDA; a compiled UNet's own");
  group.number(
      "--max-rows", o.max_rows, Range<std::int64_t>{0, 65536, "a whole number between 0 and 65536"},
      "N",
      "At most N rows (a picture takes two with cfg) go through the UNet at a time; 0: no limit",
      "16");
  group.number("--threads", o.threads,
               Range<std::int64_t>{1, 4096, "a whole number between 1 and 4096"}, "N",
               "CPU threads", "LibTorch's");
  group.choice("--channels-last", o.channels_last, {"auto", "on", "off"},
               "Layout of the UNet's convolutions", "auto");
  group.flag("--no-cuda-graph", o.no_cuda_graph,
             "Launch every kernel of the UNet instead of replaying CUDA graphs");
  group.flag("--tf32", o.tf32, "Let CUDA round fp32 to TF32: faster, less exact");
}

void add_output_options(CLI::App& app, Options& o) {
  constexpr Range<std::int64_t> kSmall = {1, 64, "a whole number between 1 and 64"};
  Group group(app, "Output (at least one file)");
  group.text("--out", o.out, "FILE.png", "The picture, or a sheet of the pictures");
  group.flag("--compare", o.compare,
             "Sample without guidance too and show unguided | guided | attention mask");
  group.number("--columns", o.columns, kSmall, "N", "Columns of the sheet", "as it looks right");
  group.number("--zoom", o.zoom, kSmall, "N", "Factor by which small pictures are enlarged",
               "to 128 pixels or more; 1 for a single picture");
  group.text("--save-latent", o.save_latent, "FILE",
             "The final latents, one fp32 tensor for torch.load");
  group.text("--json", o.json, "FILE", "Report of the run");
  group.flag("--quiet", o.quiet, "Print nothing but errors");
}

std::string version() {
  return fmt::format("sag-sample {}.{}.{}", SAG_VERSION_MAJOR, SAG_VERSION_MINOR,
                     SAG_VERSION_PATCH);
}

constexpr const char* kFooter = R"(
Examples:
  sag-sample --model models/emoji --prompt "red heart" --out heart.png
  sag-sample --model models/emoji --prompt pizza --unconditional 3 --compare --out sheet.png
  sag-sample --model sd15 --prompt "a red fox" --image photo.png --denoise 0.6 --out fox.png
  sag-sample --unet unet.ts --cond text.pt:cond --uncond text.pt:uncond --save-latent latent.pt

Exit codes: 0 done, 1 a mistake in the arguments or files, 2 the run failed.)";

bool is_other_format(const std::string& path) {
  auto extension = std::filesystem::path(path).extension().string();
  for (auto& c : extension) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  constexpr std::array<std::string_view, 7> kOthers = {".jpg", ".jpeg", ".webp", ".gif",
                                                       ".bmp", ".tif",  ".tiff"};
  return std::find(kOthers.begin(), kOthers.end(), extension) != kOthers.end();
}

void check_combinations(const Options& o) {
  const auto never_both = [](bool a, bool b, const char* text) {
    if (a && b) throw UsageError(text);
  };
  if (o.model.empty() == o.unet.empty()) {
    throw UsageError(o.model.empty() ? "One of --model and --unet is needed."
                                     : "--model and --unet cannot be given together.");
  }
  if (o.list_sites) return;
  if (o.out.empty() && o.save_latent.empty() && o.json.empty()) {
    throw UsageError("Nothing to write: give --out, --save-latent or --json.");
  }
  const bool texts = !o.prompts.empty() || o.unconditional > 0;
  const bool tensors =
      !o.cond.empty() || !o.uncond.empty() || !o.cond_y.empty() || !o.uncond_y.empty();
  never_both(texts, tensors,
             "--prompt and --unconditional cannot be given together with --cond and --uncond.");
  never_both(o.negative.has_value(), o.prompts.empty(), "--negative needs a --prompt.");
  never_both(!o.cond_y.empty(), o.cond.empty(), "--cond-y needs --cond.");
  never_both(!o.uncond_y.empty(), o.uncond.empty(), "--uncond-y needs --uncond.");
  never_both(
      !o.sigmas.empty(), o.schedule || o.steps || o.denoise,
      "--sigmas is used as it is: --schedule, --steps and --denoise cannot be given with it.");
  never_both(!o.latent.empty(), !o.image.empty(), "--latent and --image cannot be given together.");
  never_both(o.denoise.value_or(1) < 1, o.latent.empty() && o.image.empty(),
             "--denoise needs the --latent or --image that it starts from.");
  never_both(!o.mask.empty(), o.latent.empty() && o.image.empty(),
             "--mask needs the --latent or --image that it repaints.");
  never_both(!o.inpaint_noise.empty(), o.mask.empty(), "--inpaint-noise needs a --mask.");
  never_both(o.no_sag, o.compare, "--compare and --no-sag cannot be given together.");
  never_both(o.no_sag, o.sag_shuffle, "--sag-shuffle and --no-sag cannot be given together.");
  never_both(o.no_sag, o.sag_one_pass || o.sag_interval > 1,
             "--sag-one-pass and --sag-interval cannot be given together with --no-sag.");
  never_both(o.compare, o.out.empty(), "--compare needs --out.");
  if (is_other_format(o.out)) {
    throw UsageError(fmt::format("--out writes PNG: let its name end in .png, got \"{}\".", o.out));
  }
  never_both(o.sag_start.has_value(), o.sag_start_percent.has_value(),
             "--sag-start and --sag-start-percent cannot be given together.");
  never_both(o.sag_end.has_value(), o.sag_end_percent.has_value(),
             "--sag-end and --sag-end-percent cannot be given together.");
  if (o.sag_kernel && *o.sag_kernel != 0 && *o.sag_kernel % 2 == 0) {
    throw UsageError(
        fmt::format("--sag-kernel must be an odd whole number, or 0, got {}.", *o.sag_kernel));
  }
}

// One name a line, for "--sampler help" and "--schedule help".
bool list_names(const std::vector<std::string>& arguments, std::ostream& out) {
  const auto asks_for = [&](const std::string& option) {
    const auto named = std::find(arguments.begin(), arguments.end(), option);
    return std::count(arguments.begin(), arguments.end(), option + "=help") > 0 ||
           (named != arguments.end() && named + 1 != arguments.end() && named[1] == "help");
  };
  const bool samplers = asks_for("--sampler"), schedules = asks_for("--schedule");
  if (samplers) out << fmt::format("{}\n", fmt::join(sag::sampler_names(), "\n"));
  if (schedules) out << fmt::format("{}\n", fmt::join(sag::schedule_names(), "\n"));
  return samplers || schedules;
}

// CLI11 takes arguments from the back, and takes the next one for the value of "--prompt=".
std::vector<std::string> for_cli11(const std::vector<std::string>& arguments) {
  std::vector<std::string> reversed;
  for (auto argument = arguments.rbegin(); argument != arguments.rend(); ++argument) {
    const bool empty_value = argument->starts_with("--") && argument->ends_with('=');
    if (empty_value) reversed.emplace_back();
    reversed.push_back(empty_value ? argument->substr(0, argument->size() - 1) : *argument);
  }
  return reversed;
}

}  // namespace

std::optional<Options> parse_options(const std::vector<std::string>& arguments, std::ostream& out) {
  if (list_names(arguments, out)) return std::nullopt;
  Options options;
  CLI::App app("Draws pictures with a diffusion model, steered by Self-Attention Guidance.",
               "sag-sample");
  app.footer(kFooter);
  app.set_help_flag();
  app.get_formatter()->column_width(30);
  add_model_options(app, options);
  add_picture_options(app, options);
  add_sampling_options(app, options);
  add_sag_options(app, options);
  add_device_options(app, options);
  add_output_options(app, options);
  app.set_help_flag("-h,--help", "Print this help and exit")->group("Help");
  app.set_version_flag("--version", version(), "Print the version and exit")->group("Help");
  try {
    app.parse(for_cli11(arguments));
  } catch (const CLI::CallForHelp&) {
    out << app.help();
    return std::nullopt;
  } catch (const CLI::CallForVersion&) {
    out << version() << '\n';
    return std::nullopt;
  } catch (const CLI::ExtrasError&) {
    const std::string extra = app.remaining().front();
    throw UsageError(extra.starts_with('-')
                         ? fmt::format("There is no option {}; --help lists them.", extra)
                         : fmt::format("\"{}\" belongs to no option.", extra));
  } catch (const CLI::ArgumentMismatch&) {
    throw UsageError(fmt::format("{} needs a value.", arguments.back()));
  } catch (const CLI::ParseError& error) {
    throw UsageError(fmt::format("{}; --help lists the options.", error.what()));
  }
  check_combinations(options);
  return options;
}

}  // namespace sag_sample

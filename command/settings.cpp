#include "settings.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <span>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/cuda.h>

#include "errors.h"
#include "sag/samplers.h"
#include "sag/schedules.h"

namespace sag_sample {
namespace {

// The first that says something: the command line, the model directory, the default.
template <typename T>
T first_of(const std::optional<T>& option, const std::optional<T>& model, T fallback) {
  return option ? *option : model.value_or(fallback);
}

void refuse_foreign_constants(const Options& options, const std::string& prediction) {
  const auto only_for = [&](const char* option, bool given, const char* kind) {
    if (given && prediction != kind) {
      throw UsageError(fmt::format("{} is for {} models, but this one's prediction is {}.", option,
                                   kind, prediction));
    }
  };
  only_for("--sigma-data", options.sigma_data.has_value(), "edm");
  only_for("--sigma-min", options.sigma_min.has_value(), "edm");
  only_for("--sigma-max", options.sigma_max.has_value(), "edm");
  only_for("--shift", options.shift.has_value(), "flow");
  only_for("--timestep-multiplier", options.timestep_multiplier.has_value(), "flow");
  if (options.zero_terminal_snr && (prediction == "edm" || prediction == "flow")) {
    throw UsageError(fmt::format(
        "--zero-terminal-snr is for eps, v and x0 models, but this one's prediction is {}.",
        prediction));
  }
}

sag::ModelSampling edm_sampling(const Options& options, const ModelDirectory& model) {
  const sag::EdmSamplingOptions constants = {
      .sigma_data = first_of(options.sigma_data, model.sigma_data, 0.5),
      .sigma_min = first_of(options.sigma_min, model.sigma_min, 0.002),
      .sigma_max = first_of(options.sigma_max, model.sigma_max, 80.0)};
  if (constants.sigma_min >= constants.sigma_max) {
    throw UsageError(
        fmt::format("The lowest noise level of the model must be below its highest, got {} and {}.",
                    constants.sigma_min, constants.sigma_max));
  }
  return sag::ModelSampling::edm(constants);
}

sag::ModelSampling make_sampling(const Options& options, const ModelDirectory& model,
                                 const std::string& prediction) {
  if (prediction == "edm") return edm_sampling(options, model);
  if (prediction == "flow") {
    return sag::ModelSampling::flow(
        {.shift = first_of(options.shift, model.shift, 1.0),
         .multiplier = first_of(options.timestep_multiplier, model.timestep_multiplier, 1000.0)});
  }
  return sag::ModelSampling::discrete(
      sag::parse_prediction(prediction),
      {.beta_start = model.beta_start.value_or(0.00085),
       .beta_end = model.beta_end.value_or(0.012),
       .timesteps = model.timesteps.value_or(1000),
       .beta_schedule = sag::parse_beta_schedule(model.beta_schedule.value_or("scaled_linear")),
       .zero_terminal_snr = options.zero_terminal_snr || model.zero_terminal_snr});
}

sag::SelfAttentionGuidanceOptions make_guidance(const Options& options,
                                                const ModelDirectory& model) {
  const auto& defaults = model.defaults;
  sag::SelfAttentionGuidanceOptions guidance;
  guidance.scale = first_of(options.sag_scale, defaults.sag_scale, guidance.scale);
  guidance.blur_sigma = first_of(options.sag_blur, defaults.sag_blur, guidance.blur_sigma);
  guidance.threshold = first_of(options.sag_threshold, defaults.sag_threshold, guidance.threshold);
  guidance.kernel_size = first_of(options.sag_kernel, defaults.sag_kernel, guidance.kernel_size);
  guidance.sigma_start = first_of(options.sag_start, defaults.sag_start, guidance.sigma_start);
  guidance.sigma_end = first_of(options.sag_end, defaults.sag_end, guidance.sigma_end);
  guidance.interval = options.sag_interval;
  guidance.one_pass = options.sag_one_pass;
  guidance.start_percent = options.sag_start_percent;
  guidance.end_percent = options.sag_end_percent;
  guidance.site = sag::AttentionSite(first_of(options.site, model.site, std::string("middle")));
  if (guidance.sigma_start < guidance.sigma_end) {
    throw UsageError(fmt::format("--sag-start must be at least --sag-end ({}), got {}.",
                                 guidance.sigma_end, guidance.sigma_start));
  }
  if (guidance.start_percent.value_or(0.0) > guidance.end_percent.value_or(1.0)) {
    throw UsageError(
        fmt::format("--sag-start-percent must be at most --sag-end-percent ({}), got {}.",
                    guidance.end_percent.value_or(1.0), *guidance.start_percent));
  }
  return guidance;
}

torch::Device parse_device(const std::string& name) {
  const bool cuda = name == "cuda" || name.starts_with("cuda:");
  if (!cuda && name != "cpu") {
    throw UsageError(fmt::format("--device must be cpu, cuda or cuda:N, got {}.", name));
  }
  if (!cuda) return torch::kCPU;
  int index = 0;
  if (name != "cuda") {
    const auto [end, error] = std::from_chars(name.data() + 5, name.data() + name.size(), index);
    if (error != std::errc() || end != name.data() + name.size() || index < 0) {
      throw UsageError(fmt::format("--device must be cpu, cuda or cuda:N, got {}.", name));
    }
  }
  const auto devices = static_cast<int>(torch::cuda::device_count());
  if (index >= devices) {
    throw UsageError(devices == 0 ? fmt::format("--device {}: there is no CUDA device.", name)
                                  : fmt::format("--device {}: the last CUDA device is cuda:{}.",
                                                name, devices - 1));
  }
  return {torch::kCUDA, static_cast<torch::DeviceIndex>(index)};
}

std::optional<torch::ScalarType> parse_dtype(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return *name == "fp16" ? torch::kHalf : *name == "bf16" ? torch::kBFloat16 : torch::kFloat;
}

void check_known(const char* key, const std::string& name,
                 std::span<const std::string_view> known) {
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    throw UsageError(
        fmt::format("The {} \"{}\" of the model's defaults is not known; known are {}.", key, name,
                    fmt::join(known, ", ")));
  }
}

// A folder holds compiled packages.
void check_unet(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error) &&
      !std::filesystem::is_directory(path, error)) {
    throw UsageError(fmt::format("--unet: there is no file \"{}\".", path));
  }
}

}  // namespace

Settings decide_settings(const Options& options, const ModelDirectory* directory) {
  const ModelDirectory nothing;
  const ModelDirectory& model = directory ? *directory : nothing;
  if (!directory) check_unet(options.unet);
  const std::string prediction = options.prediction.value_or(directory ? model.prediction : "eps");
  refuse_foreign_constants(options, prediction);
  Settings settings = {.prediction = prediction,
                       .sampling = make_sampling(options, model, prediction)};
  settings.unet = directory ? model.unet : options.unet;
  settings.text_encoder = model.text_encoder;
  settings.decoder = model.decoder;
  settings.encoder = model.encoder;
  settings.sampler = first_of(options.sampler, model.defaults.sampler, std::string("euler"));
  settings.schedule = first_of(options.schedule, model.defaults.schedule, std::string("normal"));
  check_known("sampler", settings.sampler, sag::sampler_names());
  check_known("schedule", settings.schedule, sag::schedule_names());
  settings.steps = first_of<std::int64_t>(options.steps, model.defaults.steps, 20);
  settings.denoise = options.denoise.value_or(1.0);
  settings.cfg = first_of(options.cfg, model.defaults.cfg, 7.5);
  settings.guided = !options.no_sag;
  settings.guidance = make_guidance(options, model);
  if (directory) {
    settings.shape = model.shape;
    settings.channels = model.shape[0];
    settings.multiple = model.multiple;
  }
  settings.shape = {options.channels.value_or(settings.shape[0]),
                    options.height.value_or(settings.shape[1]),
                    options.width.value_or(settings.shape[2])};
  if (options.device) settings.unet_file.device = parse_device(*options.device);
  settings.unet_file.dtype = parse_dtype(options.dtype);
  const auto layout = options.channels_last.value_or("auto");
  if (layout != "auto") settings.unet_file.channels_last = layout == "on";
  return settings;
}

void check_latent_size(const Settings& settings, const std::string& what, std::int64_t channels,
                       std::int64_t height, std::int64_t width) {
  if (settings.channels && channels != *settings.channels) {
    throw UsageError(fmt::format("{} must have {} channels for this model, got {}.", what,
                                 *settings.channels, channels));
  }
  if (height % settings.multiple != 0 || width % settings.multiple != 0) {
    throw UsageError(fmt::format(
        "{} must have a height and width that are multiples of {} for this model, got {} x {}.",
        what, settings.multiple, height, width));
  }
}

}  // namespace sag_sample

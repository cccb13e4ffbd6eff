#include "inputs.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <torch/torch.h>

#include "errors.h"
#include "files/networks.h"
#include "files/tensor_file.h"
#include "picture/pictures.h"
#include "picture/png_file.h"
#include "sag/samplers.h"
#include "sag/schedules.h"

namespace sag_sample {
namespace {

bool asks_for_texts(const Options& options) {
  return !options.prompts.empty() || options.unconditional > 0;
}

// The tensors of the command line, fp32 on the CPU; undefined where none is given.
struct Tensors {
  torch::Tensor cond, uncond, cond_y, uncond_y, noise, latent, mask, inpaint_noise;
};

torch::Tensor read_floating(const char* option, const std::string& where) {
  if (where.empty()) return {};
  const auto tensor = read_tensor(option, where);
  if (!tensor.is_floating_point()) {
    throw UsageError(fmt::format("{} must hold floating point numbers, got {}.", option,
                                 toString(tensor.scalar_type())));
  }
  if (tensor.numel() == 0) throw UsageError(fmt::format("{} must not be empty.", option));
  return tensor.to(torch::kFloat);
}

std::string shape_text(const torch::Tensor& tensor) {
  return c10::str(tensor.sizes());
}

torch::Tensor read_dims(const char* option, const std::string& where, std::int64_t dims,
                        const char* shape) {
  const auto tensor = read_floating(option, where);
  if (tensor.defined() && tensor.dim() != dims) {
    throw UsageError(
        fmt::format("{} must have shape {}, got {}.", option, shape, shape_text(tensor)));
  }
  return tensor;
}

// [height, width], [images, height, width] or [images, 1, height, width] → the last.
torch::Tensor read_mask(const std::string& where) {
  auto mask = read_floating("--mask", where);
  if (!mask.defined()) return mask;
  if (mask.dim() == 2) mask = mask.unsqueeze(0);
  if (mask.dim() == 3) mask = mask.unsqueeze(1);
  if (mask.dim() != 4 || mask.size(1) != 1) {
    throw UsageError(
        fmt::format("--mask must have shape [height, width] or [images, 1, height, width], got {}.",
                    shape_text(mask)));
  }
  return mask;
}

Tensors read_tensors(const Options& options) {
  constexpr const char* kContext = "[images, tokens, width]";
  constexpr const char* kVector = "[images, features]";
  constexpr const char* kLatent = "[images, channels, height, width]";
  return {.cond = read_dims("--cond", options.cond, 3, kContext),
          .uncond = read_dims("--uncond", options.uncond, 3, kContext),
          .cond_y = read_dims("--cond-y", options.cond_y, 2, kVector),
          .uncond_y = read_dims("--uncond-y", options.uncond_y, 2, kVector),
          .noise = read_dims("--noise", options.noise, 4, kLatent),
          .latent = read_dims("--latent", options.latent, 4, kLatent),
          .mask = read_mask(options.mask),
          .inpaint_noise = read_dims("--inpaint-noise", options.inpaint_noise, 4, kLatent)};
}

// The picture as a clean latent, [1, channels, height, width].
torch::Tensor encode_picture(const Options& options, const Settings& settings) {
  const auto picture = from_image(read_png("--image", options.image));
  if (settings.encoder.empty() && settings.channels == picture.size(1)) return picture;
  if (settings.encoder.empty()) {
    throw UsageError("--image needs a model with an encoder; --latent takes a latent.");
  }
  const auto latent = Encoder(settings.encoder, settings.device).run(picture);
  const auto pixels = picture.sizes(), cells = latent.sizes();
  if (pixels[2] % cells[2] != 0 || pixels[2] / cells[2] * cells[3] != pixels[3]) {
    throw UsageError(
        fmt::format("--image must have a height and width that the model's encoder divides without "
                    "a remainder, but it made a latent of {} x {} out of {} x {} pixels.",
                    cells[2], cells[3], pixels[2], pixels[3]));
  }
  return latent;
}

// How many pictures tensors stand for: the noise says it, or else whatever comes in rows.
std::int64_t count_images(const Options& options, const Tensors& tensors) {
  if (tensors.noise.defined()) {
    const std::int64_t images = tensors.noise.size(0);
    if (options.batch.value_or(images) != images) {
      throw UsageError(fmt::format("--batch must be {}, the number of images in --noise, got {}.",
                                   images, *options.batch));
    }
    return images;
  }
  std::int64_t images = options.batch.value_or(1);
  for (const auto* tensor : {&tensors.latent, &tensors.cond, &tensors.uncond}) {
    if (tensor->defined()) images = std::max(images, tensor->size(0));
  }
  return images;
}

// Every latent that is given has one size; without any, the settings' counts.
std::array<std::int64_t, 3> latent_shape(const Options& options, const Settings& settings,
                                         const Tensors& tensors) {
  const auto& first = tensors.noise.defined() ? tensors.noise : tensors.latent;
  const char* const name = tensors.noise.defined() ? "--noise"
                           : options.image.empty() ? "--latent"
                                                   : "--image";
  auto shape = settings.shape;
  if (first.defined()) {
    if (options.channels || options.height || options.width) {
      throw UsageError(
          fmt::format("--channels, --height and --width cannot be given together with {}.", name));
    }
    shape = {first.size(1), first.size(2), first.size(3)};
  }
  const char* const what = !first.defined() ? "The latent"
                           : tensors.noise.defined() || options.image.empty()
                               ? name
                               : "The latent of --image";
  check_latent_size(settings, what, shape[0], shape[1], shape[2]);
  return shape;
}

void check_sizes(const char* option, const torch::Tensor& tensor, std::int64_t images,
                 std::initializer_list<std::int64_t> sizes) {
  if (!tensor.defined()) return;
  bool fits = tensor.size(0) == 1 || tensor.size(0) == images;
  std::int64_t dim = 1;
  std::string shape = images == 1 ? "1" : fmt::format("1 or {}", images);
  for (const auto size : sizes) {
    fits = fits && (size < 0 || tensor.size(dim) == size);
    shape += size < 0 ? ", any" : fmt::format(", {}", size);
    ++dim;
  }
  if (!fits)
    throw UsageError(
        fmt::format("{} must have shape [{}], got {}.", option, shape, shape_text(tensor)));
}

void check_tensors(const Options& options, const Tensors& tensors,
                   const std::array<std::int64_t, 3>& shape, std::int64_t images) {
  const auto [channels, height, width] = shape;
  check_sizes("--noise", tensors.noise, images, {channels, height, width});
  check_sizes(options.image.empty() ? "--latent" : "The latent of --image", tensors.latent, images,
              {channels, height, width});
  check_sizes("--inpaint-noise", tensors.inpaint_noise, images, {channels, height, width});
  check_sizes("--mask", tensors.mask, images, {1, height, width});
  check_sizes("--cond", tensors.cond, images, {-1, -1});
  check_sizes("--uncond", tensors.uncond, images, {-1, -1});
  check_sizes("--cond-y", tensors.cond_y, images, {-1});
  check_sizes("--uncond-y", tensors.uncond_y, images, {-1});
}

std::vector<double> decide_sigmas(const Options& options, const Settings& settings) {
  if (options.sigmas.empty()) {
    return sag::get_sigmas(settings.schedule, settings.sampling, settings.steps,
                           {.denoise = settings.denoise,
                            .discard_penultimate_sigma =
                                sag::sampler_info(settings.sampler).discards_penultimate_sigma});
  }
  const auto tensor = read_floating("--sigmas", options.sigmas).to(torch::kDouble);
  if (tensor.dim() != 1 || tensor.numel() < 2) {
    throw UsageError(
        fmt::format("--sigmas must have shape [steps + 1], got {}.", shape_text(tensor)));
  }
  const auto* first = tensor.const_data_ptr<double>();
  return {first, first + tensor.numel()};
}

// The rows of these pictures; what counts for all stays one row.
torch::Tensor rows_of(const torch::Tensor& tensor, const std::vector<std::size_t>& pictures,
                      torch::Device device) {
  if (!tensor.defined()) return {};
  if (tensor.size(0) == 1) return tensor.to(device);
  std::vector<std::int64_t> rows(pictures.begin(), pictures.end());
  return tensor.index_select(0, torch::tensor(rows)).to(device);
}

void add_latents(Batch& batch, const Tensors& tensors, const Settings& settings) {
  const auto images = static_cast<std::int64_t>(batch.pictures.size());
  const auto rows = [&](const torch::Tensor& tensor) {
    const auto found = rows_of(tensor, batch.pictures, settings.device);
    return found.defined() ? found.expand({images, -1, -1, -1}) : found;
  };
  batch.noise = rows(tensors.noise);
  batch.latent = rows(tensors.latent);
  batch.mask = rows(tensors.mask);
  batch.inpaint_noise = rows(tensors.inpaint_noise);
}

// With tensors there is one batch.
Batch tensor_batch(const Options& options, const Settings& settings, const Tensors& tensors,
                   std::size_t images) {
  Batch batch;
  for (std::size_t i = 0; i < images; ++i) batch.pictures.push_back(i);
  const auto conds = [&](const torch::Tensor& context, const torch::Tensor& y) {
    sag::Conditioning cond;
    cond.context = rows_of(context, batch.pictures, settings.device);
    cond.y = rows_of(y, batch.pictures, settings.device);
    return std::vector<sag::Conditioning>{cond};
  };
  if (tensors.cond.defined()) batch.positive = conds(tensors.cond, tensors.cond_y);
  // A UNet without text is sampled unconditionally.
  if (tensors.uncond.defined() || !tensors.cond.defined())
    batch.negative = conds(tensors.uncond, tensors.uncond_y);
  batch.cfg = settings.cfg;
  if (batch.negative.empty() && sag::sampler_info(settings.sampler).needs_uncond)
    throw UsageError(fmt::format("--sampler {} needs --uncond.", settings.sampler));
  if (batch.negative.empty()) {
    if (options.cfg && *options.cfg != 1.0)
      throw UsageError(fmt::format("--cfg {} needs --uncond.", *options.cfg));
    batch.cfg = 1.0;
  }
  return batch;
}

// Encodes every text once, for latents of a height and width.
class Texts {
 public:
  Texts(const Settings& settings, const std::array<std::int64_t, 3>& shape)
      : device_(settings.device), shape_(shape) {
    if (!settings.text_encoder.empty()) encoder_.emplace(settings.text_encoder);
  }

  bool can_encode() const { return encoder_.has_value(); }

  // Without tensors for a model without text.
  const sag::Conditioning& cond(const std::string& text) {
    auto& cond = conds_[text];
    if (!encoder_ || cond.context.defined()) return cond;
    const auto encoded = encoder_->encode(text, shape_[1], shape_[2]);
    cond.context = encoded.context.to(device_);
    if (encoded.y.defined()) cond.y = encoded.y.to(device_);
    if (!encoded.cut.empty()) {
      notes_.push_back(fmt::format(
          "the prompt \"{}\" is longer than the text encoder reads ({} tokens); left out: {}", text,
          encoded.context.size(1), encoded.cut));
    }
    return cond;
  }

  const std::vector<std::string>& notes() const { return notes_; }

 private:
  torch::Device device_;
  std::array<std::int64_t, 3> shape_;
  std::optional<TextEncoder> encoder_;
  std::map<std::string, sag::Conditioning> conds_;
  std::vector<std::string> notes_;
};

// One text a row.
sag::Conditioning join(const std::vector<sag::Conditioning>& conds) {
  std::vector<torch::Tensor> contexts, ys;
  for (const auto& cond : conds) {
    contexts.push_back(cond.context);
    if (cond.y.defined()) ys.push_back(cond.y);
  }
  sag::Conditioning joined;
  joined.context = torch::cat(contexts);
  if (!ys.empty()) joined.y = torch::cat(ys);
  return joined;
}

// Prompts with as many tokens go together, and all pictures without a prompt.
std::vector<Batch> text_batches(const Options& options, const Settings& settings, Inputs& inputs) {
  const auto& pictures = inputs.pictures;
  Texts texts(settings, inputs.shape);
  if (!texts.can_encode() && !options.prompts.empty()) {
    throw UsageError(
        options.model.empty()
            ? "--prompt needs a --model with a text encoder; --unet takes --cond and --uncond."
            : "--prompt needs a text encoder, which this model does not have; give --cond and "
              "--uncond.");
  }
  constexpr std::int64_t kUnconditional = -1;
  std::map<std::int64_t, Batch> by_form;
  std::map<std::int64_t, std::vector<sag::Conditioning>> conds;
  for (std::size_t i = 0; i < pictures.size(); ++i) {
    const bool conditional = !pictures[i].unconditional;
    const auto form = conditional ? texts.cond(pictures[i].prompt).context.size(1) : kUnconditional;
    by_form[form].pictures.push_back(i);
    if (conditional) conds[form].push_back(texts.cond(pictures[i].prompt));
  }
  std::vector<Batch> batches;
  for (auto& [form, batch] : by_form) {
    const bool conditional = form != kUnconditional;
    batch.negative = {texts.cond(conditional ? options.negative.value_or("") : "")};
    if (conditional) {
      batch.positive = {join(conds[form])};
      batch.cfg = settings.cfg;
    }
    batches.push_back(std::move(batch));
  }
  inputs.notes = texts.notes();
  return batches;
}

// What a run does that its user may not have meant.
void add_notes(const Options& options, const Settings& settings, Inputs& inputs) {
  const bool starts_from_picture = !options.image.empty() || !options.latent.empty();
  if (starts_from_picture && options.mask.empty() && options.sigmas.empty() &&
      options.denoise.value_or(1) == 1)
    inputs.notes.push_back(
        "nothing is left of the start picture; --denoise 0.6, say, keeps some of it");
  if (settings.guided && !options.cond.empty() && options.uncond.empty())
    inputs.notes.push_back(
        "self-attention guidance needs an unconditional prediction: give --uncond");
}

std::string label(const Picture& picture, bool has_siblings, bool seeded) {
  const std::string seed = seeded ? fmt::format("seed {}", picture.seed) : "";
  if (picture.prompt.empty()) return seed;
  return has_siblings && seeded ? fmt::format("{}, {}", picture.prompt, seed) : picture.prompt;
}

}  // namespace

std::vector<Picture> list_pictures(const Options& options, std::int64_t images) {
  std::vector<Picture> pictures;
  if (asks_for_texts(options)) {
    const bool no_negative = options.negative.value_or("").empty();
    for (const auto& prompt : options.prompts) {
      for (std::int64_t i = 0; i < options.batch.value_or(1); ++i) {
        pictures.push_back({.prompt = prompt, .unconditional = prompt.empty() && no_negative});
      }
    }
    for (std::int64_t i = 0; i < options.unconditional; ++i)
      pictures.push_back({.unconditional = true});
  } else {
    pictures.resize(static_cast<std::size_t>(images));
  }
  std::map<std::pair<std::string, bool>, std::uint64_t> drawn;
  for (auto& picture : pictures) {
    picture.seed = options.seed + drawn[{picture.prompt, picture.unconditional}]++;
  }
  for (auto& picture : pictures) {
    picture.label =
        label(picture, drawn[{picture.prompt, picture.unconditional}] > 1, options.noise.empty());
  }
  return pictures;
}

Inputs read_inputs(const Options& options, const Settings& settings) {
  if (!settings.text_encoder.empty() && !options.list_sites && !asks_for_texts(options) &&
      options.cond.empty() && options.uncond.empty())
    throw UsageError("Nothing to draw: give --prompt, --unconditional N, or --cond.");
  Tensors tensors = read_tensors(options);
  if (!options.image.empty()) tensors.latent = encode_picture(options, settings);
  Inputs inputs;
  inputs.sigmas = decide_sigmas(options, settings);
  inputs.shape = latent_shape(options, settings, tensors);
  inputs.pictures =
      list_pictures(options, asks_for_texts(options) ? 0 : count_images(options, tensors));
  check_tensors(options, tensors, inputs.shape, static_cast<std::int64_t>(inputs.pictures.size()));
  if (asks_for_texts(options)) {
    inputs.batches = text_batches(options, settings, inputs);
  } else {
    inputs.batches = {tensor_batch(options, settings, tensors, inputs.pictures.size())};
  }
  for (auto& batch : inputs.batches) {
    for (const auto picture : batch.pictures) batch.seeds.push_back(inputs.pictures[picture].seed);
    add_latents(batch, tensors, settings);
  }
  add_notes(options, settings, inputs);
  return inputs;
}

}  // namespace sag_sample

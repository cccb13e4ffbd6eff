#include "inputs.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <torch/torch.h>

#include "errors.h"
#include "further_inputs.h"
#include "input_tensors.h"
#include "model_networks.h"
#include "prompt.h"
#include "sag/noise.h"

namespace sag_sample {
namespace {

bool asks_for_texts(const PictureOptions& options) {
  return !options.prompts.empty() || options.unconditional > 0;
}

// The rows of these pictures; what counts for all stays one row.
torch::Tensor rows_of(const torch::Tensor& tensor, const std::vector<std::size_t>& pictures,
                      torch::Device device) {
  if (!tensor.defined()) return {};
  if (tensor.size(0) == 1) return tensor.to(device);
  const std::vector<std::int64_t> rows(pictures.begin(), pictures.end());
  return tensor.index_select(0, torch::tensor(rows)).to(device);
}

void add_latents(Batch& batch, const InputTensors& tensors, const LatentSize& size,
                 torch::Device device) {
  const auto images = static_cast<std::int64_t>(batch.pictures.size());
  const auto rows = [&](const torch::Tensor& tensor) {
    const auto found = rows_of(tensor, batch.pictures, device);
    return found.defined() ? found.expand({images, -1, -1, -1}) : found;
  };
  batch.noise = rows(tensors.noise);
  if (!batch.noise.defined()) {
    batch.noise =
        sag::SeededNoise(batch.seeds).draw({size.channels, size.height, size.width}, device);
  }
  batch.latent = rows(tensors.latent);
  batch.mask = rows(tensors.mask);
  batch.inpaint_noise = rows(tensors.inpaint_noise);
}

// With tensors there is one batch.
Batch tensor_batch(const InputTensors& tensors, std::size_t images, const Settings& settings,
                   torch::Device device) {
  Batch batch;
  for (std::size_t i = 0; i < images; ++i) batch.pictures.push_back(i);
  const auto conds = [&](const torch::Tensor& context, const torch::Tensor& y) {
    sag::Conditioning cond;
    cond.context = rows_of(context, batch.pictures, device);
    cond.y = rows_of(y, batch.pictures, device);
    return std::vector<sag::Conditioning>{cond};
  };
  // A UNet without text is sampled unconditionally. So is a class that nothing is guided away from,
  // for guidances that need an unconditional prediction.
  const bool two_classes = settings.further.uncond_label && !tensors.uncond.defined();
  if (tensors.cond.defined() || two_classes) {
    batch.positive = conds(tensors.cond, tensors.cond_y);
  }
  if (tensors.uncond.defined() || !tensors.cond.defined()) {
    batch.negative = conds(tensors.uncond, tensors.uncond_y);
  }
  const bool guided = !batch.positive.empty() && !batch.negative.empty();
  batch.cfg = guided ? settings.guider.cond_scale : 1.0;
  return batch;
}

// What the text encoder cannot do, in the words of the options that ask for it.
void check_gives(const sag::TextEncoder& encoder, const std::vector<sag::PromptPiece>& prompt,
                 std::optional<std::int64_t> clip_skip) {
  constexpr const char* kAgain =
      "; sag-export writes text encoders that do, so export the model again";
  if (const auto range = encoder.clip_skip_range()) {
    if (!clip_skip || (*clip_skip >= range->first && *clip_skip <= range->second)) return;
    throw UsageError(fmt::format("--clip-skip must be between {} and {} for this model, got {}.",
                                 range->first, range->second, *clip_skip));
  }
  for (const auto& piece : prompt) {
    if (piece.weight == 1.0) continue;
    throw UsageError(fmt::format(
        "The model's text encoder cannot weigh parts of a prompt, as the parentheses around "
        "\"{}\" ask for{}, or write \\( and \\) for parentheses of the text.",
        piece.text, kAgain));
  }
  if (clip_skip) {
    throw UsageError(fmt::format(
        "The model's text encoder gives no other layer, as --clip-skip asks for{}.", kAgain));
  }
}

// Encodes every text once, for latents of one size.
class Texts {
 public:
  Texts(std::optional<sag::TextEncoder> encoder, const PictureOptions& options,
        const LatentSize& size, torch::Device device)
      : weights_(options.prompt_weights),
        clip_skip_(options.clip_skip),
        size_(size),
        device_(device),
        encoder_(std::move(encoder)) {}

  bool can_encode() const { return encoder_.has_value(); }

  // Without tensors for a model without text.
  const sag::Conditioning& cond(const std::string& text) {
    auto& cond = conds_[text];
    if (!encoder_ || cond.context.defined()) return cond;
    const auto pieces =
        weights_ ? parse_prompt(text) : std::vector<sag::PromptPiece>{{.text = text}};
    check_gives(*encoder_, pieces, clip_skip_);
    const auto encoded = encoder_->encode(pieces, size_.height, size_.width, clip_skip_);
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
  bool weights_;
  std::optional<std::int64_t> clip_skip_;
  LatentSize size_;
  torch::Device device_;
  std::optional<sag::TextEncoder> encoder_;
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
std::vector<Batch> text_batches(const std::vector<Picture>& pictures, const std::string& negative,
                                double cfg, Texts& texts) {
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
    batch.negative = {texts.cond(conditional ? negative : "")};
    if (conditional) {
      batch.positive = {join(conds[form])};
      batch.cfg = cfg;
    }
    batches.push_back(std::move(batch));
  }
  return batches;
}

void add_text_batches(Inputs& inputs, const Settings& settings,
                      std::optional<sag::TextEncoder> encoder, torch::Device device) {
  const auto& options = settings.pictures;
  Texts texts(std::move(encoder), options, inputs.size, device);
  if (!texts.can_encode() && !options.prompts.empty()) {
    throw UsageError(
        settings.network.has_directory
            ? "--prompt needs a text encoder, which this model does not have; give --cond and "
              "--uncond."
            : "--prompt needs a --checkpoint or --model with a text encoder; --unet takes --cond "
              "and --uncond.");
  }
  inputs.batches =
      text_batches(inputs.pictures, options.negative, settings.guider.cond_scale, texts);
  inputs.notes = texts.notes();
}

bool any_guided(const std::vector<Batch>& batches) {
  return std::any_of(batches.begin(), batches.end(),
                     [](const Batch& batch) { return !batch.positive.empty(); });
}

std::string label(const Picture& picture, bool has_siblings, bool seeded) {
  const std::string seed = seeded ? fmt::format("seed {}", picture.seed) : "";
  if (picture.prompt.empty()) return seed;
  return has_siblings && seeded ? fmt::format("{}, {}", picture.prompt, seed) : picture.prompt;
}

}  // namespace

std::vector<Picture> list_pictures(const PictureOptions& options, std::int64_t images) {
  std::vector<Picture> pictures;
  if (asks_for_texts(options)) {
    for (const auto& prompt : options.prompts) {
      for (std::int64_t i = 0; i < options.batch.value_or(1); ++i) {
        pictures.push_back(
            {.prompt = prompt, .unconditional = prompt.empty() && options.negative.empty()});
      }
    }
    for (std::int64_t i = 0; i < options.unconditional; ++i) {
      pictures.push_back({.unconditional = true});
    }
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

ComingTextEncoder start_text_encoder(const Settings& settings) {
  const auto when = asks_for_texts(settings.pictures) ? std::launch::async : std::launch::deferred;
  return std::async(when, [&settings] { return load_text_encoder(settings.network); });
}

void check_is_asked_for_pictures(const Settings& settings) {
  const auto& options = settings.pictures;
  if (settings.network.files.text_encoder.empty() || asks_for_texts(options) ||
      !options.cond.empty() || !options.uncond.empty()) {
    return;
  }
  throw UsageError("Nothing to draw: give --prompt, --unconditional N, or --cond.");
}

Inputs read_inputs(const Settings& settings, ComingTextEncoder encoder, torch::Device device) {
  const auto& options = settings.pictures;
  const auto& network = settings.network;
  const bool texts = asks_for_texts(options);
  auto tensors = read_input_tensors(options, settings.further, network, device);
  Inputs inputs;
  inputs.size = latent_size(tensors, options, network);
  inputs.pictures = list_pictures(options, texts ? 0 : count_images(tensors, options));
  check_sizes(tensors, options, inputs.size, static_cast<std::int64_t>(inputs.pictures.size()));
  const auto channels = further_channels(tensors, settings, inputs.size, device);
  if (!starts_from_picture(settings)) tensors.latent = torch::Tensor();
  if (!blends_mask(settings)) tensors.mask = torch::Tensor();
  if (texts) {
    add_text_batches(inputs, settings, encoder.get(), device);
  } else {
    inputs.batches = {tensor_batch(tensors, inputs.pictures.size(), settings, device)};
  }
  if (settings.further.uncond_label && !any_guided(inputs.batches)) {
    throw UsageError(
        "--uncond-class is what pictures of --class are guided away from, but here all are "
        "unconditional: give a --prompt, or --cond, or --class alone.");
  }
  for (auto& batch : inputs.batches) {
    for (const auto picture : batch.pictures) batch.seeds.push_back(inputs.pictures[picture].seed);
    add_latents(batch, tensors, inputs.size, device);
    add_further_inputs(batch, rows_of(channels, batch.pictures, device), settings);
  }
  return inputs;
}

}  // namespace sag_sample

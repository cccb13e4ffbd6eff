#include "input_tensors.h"

#include <algorithm>
#include <initializer_list>

#include <fmt/format.h>
#include <torch/torch.h>

#include "errors.h"
#include "files/tensor_file.h"
#include "model_networks.h"
#include "picture/pictures.h"
#include "picture/png_file.h"

namespace sag_sample {
namespace {

std::string shape_text(const torch::Tensor& tensor) {
  return c10::str(tensor.sizes());
}

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
  refuse_other_pictures("--mask", where);
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

// White is 1. The grey of a colour is PIL's, and so diffusers'.
torch::Tensor read_mask_picture(const std::string& file) {
  const auto picture = (from_image(read_png("--mask", file, Transparent::refused)) + 1) / 2;
  const auto grey = torch::tensor({0.299, 0.587, 0.114}).view({1, 3, 1, 1});
  return (picture * grey).sum(1, true).clamp(0, 1);
}

// The mask's picture with a pixel per latent cell. ComfyUI: `prepare_mask`.
torch::Tensor shrink_mask(const InputTensors& tensors) {
  namespace F = torch::nn::functional;
  const auto& mask = tensors.mask_picture;
  const auto& large = tensors.picture.defined() ? tensors.picture : tensors.latent;
  const auto height = large.size(2), width = large.size(3);
  const auto times = mask.size(2) / height;
  const bool fits = times > 0 && mask.size(2) == times * height && mask.size(3) == times * width;
  if (!fits || (tensors.picture.defined() && times != 1)) {
    throw UsageError(fmt::format("--mask must have {}, {} x {}, got {} x {} pixels.",
                                 tensors.picture.defined()
                                     ? "the height and width of --image"
                                     : "a whole multiple of the latent's height and width",
                                 height, width, mask.size(2), mask.size(3)));
  }
  const std::vector<std::int64_t> cells = {tensors.latent.size(2), tensors.latent.size(3)};
  return F::interpolate(
      mask, F::InterpolateFuncOptions().size(cells).mode(torch::kBilinear).align_corners(false));
}

const char* name_of_latent(const PictureOptions& options) {
  return options.image.empty() ? "--latent" : "The latent of --image";
}

// A size of −1 is any.
void check_size(const char* option, const torch::Tensor& tensor, std::int64_t images,
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
  if (!fits) {
    throw UsageError(
        fmt::format("{} must have shape [{}], got {}.", option, shape, shape_text(tensor)));
  }
}

}  // namespace

torch::Tensor encode_picture(const torch::Tensor& picture, const Network& network,
                             torch::Device device) {
  const auto encoder = load_encoder(network, device);
  if (!encoder && network.channels == picture.size(1)) return picture;
  if (!encoder) {
    throw UsageError("--image needs a model with an encoder; --latent takes a latent.");
  }
  const auto latent = encoder->run(picture);
  const auto pixels = picture.sizes(), cells = latent.sizes();
  if (pixels[2] % cells[2] != 0 || pixels[2] / cells[2] * cells[3] != pixels[3]) {
    throw UsageError(
        fmt::format("--image must have a height and width that the model's encoder divides without "
                    "a remainder, but it made a latent of {} x {} out of {} x {} pixels.",
                    cells[2], cells[3], pixels[2], pixels[3]));
  }
  return latent;
}

InputTensors read_input_tensors(const PictureOptions& options, const FurtherOptions& further,
                                const Network& network, torch::Device device) {
  constexpr const char* kContext = "[images, tokens, width]";
  constexpr const char* kVector = "[images, features]";
  constexpr const char* kLatent = "[images, channels, height, width]";
  InputTensors tensors = {
      .cond = read_dims("--cond", options.cond, 3, kContext),
      .uncond = read_dims("--uncond", options.uncond, 3, kContext),
      .cond_y = read_dims("--cond-y", options.cond_y, 2, kVector),
      .uncond_y = read_dims("--uncond-y", options.uncond_y, 2, kVector),
      .noise = read_dims("--noise", options.noise, 4, kLatent),
      .latent = read_dims("--latent", options.latent, 4, kLatent),
      .inpaint_noise = read_dims("--inpaint-noise", options.inpaint_noise, 4, kLatent),
      .concat = read_dims("--concat", further.concat, 4, kLatent)};
  if (!options.image.empty()) {
    tensors.picture = from_image(read_png("--image", options.image));
    tensors.latent = encode_picture(tensors.picture, network, device);
  }
  if (is_png(options.mask)) {
    tensors.mask_picture = read_mask_picture(options.mask);
    tensors.mask = shrink_mask(tensors);
  } else {
    tensors.mask = read_mask(options.mask);
  }
  return tensors;
}

LatentSize latent_size(const InputTensors& tensors, const PictureOptions& options,
                       const Network& network) {
  const auto& first = tensors.noise.defined() ? tensors.noise : tensors.latent;
  if (!first.defined()) {
    check_size_is_in_cells(network);
    check_latent_size(network, "The latent", network.size);
    return network.size;
  }
  const LatentSize size = {first.size(1), first.size(2), first.size(3)};
  check_latent_size(network, tensors.noise.defined() ? "--noise" : name_of_latent(options), size);
  return size;
}

std::int64_t count_images(const InputTensors& tensors, const PictureOptions& options) {
  if (tensors.noise.defined()) {
    const std::int64_t images = tensors.noise.size(0);
    if (options.batch.value_or(images) != images) {
      throw UsageError(fmt::format("--batch must be {}, the number of images in --noise, got {}.",
                                   images, *options.batch));
    }
    return images;
  }
  std::int64_t images = options.batch.value_or(1);
  for (const auto* tensor : {&tensors.latent, &tensors.cond, &tensors.uncond, &tensors.concat}) {
    if (tensor->defined()) images = std::max(images, tensor->size(0));
  }
  return images;
}

void check_sizes(const InputTensors& tensors, const PictureOptions& options, const LatentSize& size,
                 std::int64_t images) {
  const auto [channels, height, width] = size;
  check_size("--noise", tensors.noise, images, {channels, height, width});
  check_size(name_of_latent(options), tensors.latent, images, {channels, height, width});
  check_size("--inpaint-noise", tensors.inpaint_noise, images, {channels, height, width});
  check_size("--concat", tensors.concat, images, {-1, height, width});
  check_size("--mask", tensors.mask, images, {1, height, width});
  check_size("--cond", tensors.cond, images, {-1, -1});
  check_size("--uncond", tensors.uncond, images, {-1, -1});
  check_size("--cond-y", tensors.cond_y, images, {-1});
  check_size("--uncond-y", tensors.uncond_y, images, {-1});
}

std::vector<double> read_sigmas(const std::string& where) {
  const auto tensor = read_floating("--sigmas", where).to(torch::kDouble);
  if (tensor.dim() != 1 || tensor.numel() < 2) {
    throw UsageError(
        fmt::format("--sigmas must have shape [steps + 1], got {}.", shape_text(tensor)));
  }
  const auto* first = tensor.const_data_ptr<double>();
  return {first, first + tensor.numel()};
}

}  // namespace sag_sample

#include "picture/pictures.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "errors.h"

namespace sag_sample {

bool is_picture(std::int64_t channels) {
  return channels == 1 || channels == 3;
}

std::vector<Image> to_images(const torch::Tensor& tensors) {
  if (tensors.dim() != 4 || !is_picture(tensors.size(1))) {
    throw RunError("A picture must have 1 or 3 channels.");
  }
  const auto bytes = ((tensors.to(torch::kCPU, torch::kFloat) + 1) * 127.5)
                         .round()
                         .clamp(0, 255)
                         .to(torch::kByte)
                         .expand({-1, 3, -1, -1})
                         .permute({0, 2, 3, 1})
                         .contiguous();
  std::vector<Image> images;
  const auto* byte = bytes.const_data_ptr<std::uint8_t>();
  for (std::int64_t i = 0; i < bytes.size(0); ++i) {
    Image image(static_cast<int>(bytes.size(2)), static_cast<int>(bytes.size(1)));
    for (auto& pixel : image.pixels) {
      pixel = {byte[0], byte[1], byte[2]};
      byte += 3;
    }
    images.push_back(std::move(image));
  }
  return images;
}

torch::Tensor from_image(const Image& image) {
  static_assert(sizeof(Rgb) == 3);
  const auto bytes = torch::from_blob(const_cast<Rgb*>(image.pixels.data()),
                                      {1, image.height, image.width, 3}, torch::kByte);
  return (bytes.to(torch::kFloat) / 127.5 - 1).permute({0, 3, 1, 2}).contiguous();
}

std::vector<std::vector<float>> to_heat(const torch::Tensor& heat, int width, int height) {
  namespace F = torch::nn::functional;
  const auto resized = F::interpolate(heat.to(torch::kCPU, torch::kFloat),
                                      F::InterpolateFuncOptions()
                                          .size(std::vector<std::int64_t>{height, width})
                                          .mode(torch::kNearest))
                           .contiguous();
  std::vector<std::vector<float>> maps;
  const auto* value = resized.const_data_ptr<float>();
  const auto count = static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
  for (std::int64_t i = 0; i < resized.size(0); ++i, value += count) {
    maps.emplace_back(value, value + count);
  }
  return maps;
}

}  // namespace sag_sample

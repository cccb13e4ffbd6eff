#include "picture/png_file.h"

#include <array>
#include <cstdint>
#include <fstream>
#include <iterator>

#include <fmt/format.h>
#include <png.h>

#include "errors.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

constexpr std::uint64_t kMostPixels = 1 << 26;

// libpng's simplified interface: no setjmp in our code.
struct PngImage {
  PngImage() { image.version = PNG_IMAGE_VERSION; }
  ~PngImage() { png_image_free(&image); }
  PngImage(const PngImage&) = delete;
  PngImage& operator=(const PngImage&) = delete;

  [[noreturn]] void fail(const char* what) const {
    throw RunError(fmt::format("{} the PNG failed: {}.", what, image.message));
  }

  png_image image = {};
};

}  // namespace

std::string encode_png(const Image& image) {
  PngImage png;
  png.image.width = static_cast<png_uint_32>(image.width);
  png.image.height = static_cast<png_uint_32>(image.height);
  png.image.format = PNG_FORMAT_RGB;
  png_alloc_size_t size = 0;
  const auto* pixels = image.pixels.data();
  if (!png_image_write_to_memory(&png.image, nullptr, &size, 0, pixels, 0, nullptr)) {
    png.fail("Writing");
  }
  std::string bytes(size, '\0');
  if (!png_image_write_to_memory(&png.image, bytes.data(), &size, 0, pixels, 0, nullptr)) {
    png.fail("Writing");
  }
  bytes.resize(size);
  return bytes;
}

Image decode_png(const std::string& bytes) {
  PngImage png;
  if (!png_image_begin_read_from_memory(&png.image, bytes.data(), bytes.size())) {
    png.fail("Reading");
  }
  // Without it libpng takes 16 bits without a gAMA or sRGB chunk for linear light.
  png.image.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;
  // Before memory is taken: a few bytes may promise gigabytes.
  if (std::uint64_t{png.image.width} * png.image.height > kMostPixels) {
    throw RunError(fmt::format("Reading the PNG failed: {} x {} pixels are too many.",
                               png.image.width, png.image.height));
  }
  png.image.format = PNG_FORMAT_RGB;
  Image image(static_cast<int>(png.image.width), static_cast<int>(png.image.height));
  if (!png_image_finish_read(&png.image, nullptr, image.pixels.data(), 0, nullptr)) {
    png.fail("Reading");
  }
  return image;
}

bool is_png(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::array<png_byte, 8> begin = {};
  file.read(reinterpret_cast<char*>(begin.data()), begin.size());
  return file && png_sig_cmp(begin.data(), 0, begin.size()) == 0;
}

Image read_png(const std::string& option, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file) {
    throw UsageError(fmt::format("{}: there is no file \"{}\" that can be read{}", option, path,
                                 suggestion_beside(path)));
  }
  if (bytes.empty()) throw UsageError(fmt::format("{}: \"{}\" is empty.", option, path));
  try {
    return decode_png(bytes);
  } catch (const RunError& error) {
    throw UsageError(fmt::format("{}: \"{}\" is not a picture that can be used: {}", option, path,
                                 error.what()));
  }
}

}  // namespace sag_sample

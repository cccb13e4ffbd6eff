#include "picture/png_file.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string_view>
#include <utility>
#include <vector>

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

namespace {

bool has_transparency(const std::string& bytes) {
  PngImage png;
  if (!png_image_begin_read_from_memory(&png.image, bytes.data(), bytes.size())) {
    png.fail("Reading");
  }
  if ((png.image.format & PNG_FORMAT_FLAG_ALPHA) == 0) return false;
  png.image.format = PNG_FORMAT_RGBA;
  std::vector<png_byte> pixels(PNG_IMAGE_SIZE(png.image));
  if (!png_image_finish_read(&png.image, nullptr, pixels.data(), 0, nullptr)) png.fail("Reading");
  for (std::size_t i = 3; i < pixels.size(); i += 4) {
    if (pixels[i] != 255) return true;
  }
  return false;
}

// How files of pictures begin that are no PNG. A dot is any byte.
std::string other_format(const std::string& bytes) {
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 5> kFormats = {
      {{"\xFF\xD8\xFF", "JPEG"},
       {"RIFF....WEBP", "WebP"},
       {"GIF8", "GIF"},
       {"....ftypavif", "AVIF"},
       {"....ftyphei", "HEIC"}}};
  for (const auto& [begin, name] : kFormats) {
    const bool fits = bytes.size() >= begin.size() &&
                      std::equal(begin.begin(), begin.end(), bytes.begin(),
                                 [](char a, char b) { return a == '.' || a == b; });
    if (fits) return std::string(name);
  }
  return {};
}

std::string first_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string begin(16, '\0');
  file.read(begin.data(), static_cast<std::streamsize>(begin.size()));
  begin.resize(static_cast<std::size_t>(file.gcount()));
  return begin;
}

std::string read_bytes(const std::string& option, const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    throw UsageError(fmt::format("{}: \"{}\" is a folder, not a file.", option, path));
  }
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file) {
    throw UsageError(fmt::format("{}: there is no file \"{}\" that can be read{}", option, path,
                                 suggestion_beside(path)));
  }
  return bytes;
}

}  // namespace

bool is_png(const std::string& path) {
  const auto begin = first_bytes(path);
  const auto* bytes = reinterpret_cast<const png_byte*>(begin.data());
  return begin.size() >= 8 && png_sig_cmp(bytes, 0, 8) == 0;
}

void refuse_other_pictures(const std::string& option, const std::string& path) {
  const auto format = other_format(first_bytes(path));
  if (format.empty()) return;
  throw UsageError(
      fmt::format("{}: \"{}\" is a picture in the form {}: save it as PNG.", option, path, format));
}

Image read_png(const std::string& option, const std::string& path, Transparent transparent) {
  const auto bytes = read_bytes(option, path);
  if (bytes.empty()) throw UsageError(fmt::format("{}: \"{}\" is empty.", option, path));
  refuse_other_pictures(option, path);
  try {
    auto image = decode_png(bytes);
    if (transparent == Transparent::refused && has_transparency(bytes)) {
      throw UsageError(fmt::format(
          "{}: \"{}\" has transparent pixels: paint them white or black, and save it without an "
          "alpha channel.",
          option, path));
    }
    return image;
  } catch (const RunError& error) {
    throw UsageError(fmt::format("{}: \"{}\" is not a picture that can be used: {}", option, path,
                                 error.what()));
  }
}

}  // namespace sag_sample

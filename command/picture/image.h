#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sag_sample {

/// A colour, or the place for one.
struct Rgb {
  std::uint8_t r = 0, g = 0, b = 0;
  bool operator==(const Rgb&) const = default;
};

/// A picture in memory, rows from the top.
struct Image {
  Image() = default;
  Image(int width, int height, Rgb fill = {255, 255, 255})
      : width(width),
        height(height),
        pixels(static_cast<std::size_t>(width) * static_cast<std::size_t>(height), fill) {}

  Rgb& at(int x, int y) { return pixels[index(x, y)]; }
  const Rgb& at(int x, int y) const { return pixels[index(x, y)]; }
  bool contains(int x, int y) const { return x >= 0 && y >= 0 && x < width && y < height; }

  int width = 0, height = 0;
  std::vector<Rgb> pixels;

 private:
  std::size_t index(int x, int y) const {
    return static_cast<std::size_t>(y) * static_cast<std::size_t>(width) +
           static_cast<std::size_t>(x);
  }
};

/// Mixes two colours: `share` of 0 is `a`, of 1 is `b`.
inline Rgb mix(Rgb a, Rgb b, double share) {
  const auto channel = [share](std::uint8_t from, std::uint8_t to) {
    return static_cast<std::uint8_t>(from + (to - from) * share + 0.5);
  };
  return {channel(a.r, b.r), channel(a.g, b.g), channel(a.b, b.b)};
}

}  // namespace sag_sample

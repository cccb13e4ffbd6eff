#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

namespace sag_sample {

/// The numbers that an option takes, and how messages say it.
template <typename Number>
struct Range {
  Number low, high;
  /// "a number of at least 0"; empty: "a whole number between low and high".
  const char* what = "";
  /// Whether `low` itself is too little.
  bool above_low = false;
  /// Whether it must be odd, or 0.
  bool odd_or_zero = false;

  bool contains(Number value) const {
    if constexpr (std::is_integral_v<Number>) {
      if (odd_or_zero && value != 0 && value % 2 == 0) return false;
    }
    return value >= low && value <= high && !(above_low && value == low);
  }
};

using Limits = std::numeric_limits<double>;

inline constexpr Range<double> kFinite = {Limits::lowest(), Limits::max(), "a finite number"};
inline constexpr Range<double> kPositive = {0.0, Limits::max(), "a number greater than 0", true};
inline constexpr Range<double> kNotNegative = {0.0, Limits::max(), "a number of at least 0"};
/// Messages of the command line add ", or inf": JSON has no infinity.
inline constexpr Range<double> kSigma = {0.0, Limits::infinity(), "a number of at least 0"};
inline constexpr Range<std::uint64_t> kSeed = {0, std::numeric_limits<std::uint64_t>::max()};
inline constexpr Range<double> kShare = {0.0, 1.0, "a number between 0 and 1"};

constexpr Range<std::int64_t> whole(std::int64_t low, std::int64_t high) {
  return {low, high};
}

}  // namespace sag_sample

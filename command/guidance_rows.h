#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include <fmt/format.h>

#include "errors.h"
#include "guidances.h"
#include "sag/guidance_window.h"
#include "sag/token_grid.h"

namespace sag_sample {

// Rows that the tables of several guidances have.

/// How many tokens there may be beside the picture's.
inline constexpr Range<std::int64_t> kOtherTokens = whole(sag::PictureTokens::kRest, 1'000'000);

/// A number of `tokens`, where the picture's tokens are.
template <typename T>
Row<T> tokens_number(const char* name, const char* key, std::int64_t sag::PictureTokens::*field,
                     Range<std::int64_t> range, const char* help) {
  return {{name, key, "N", help},
          [=](T& t, const Given& given) { t.tokens.*field = read_number(given, range); },
          [=](const T& t) { return Value(t.tokens.*field); }};
}

/// A bound of a window.
template <typename T, typename Field>
Row<T> bound(const char* name, const char* key, sag::GuidanceWindow T::*window,
             Field sag::GuidanceWindow::*field, Range<double> range, const char* type,
             const char* help) {
  return {{name, key, type, help},
          [=](T& t, const Given& given) { t.*window.*field = read_number(given, range); },
          [=](const T& t) { return value_of(t.*window.*field); }};
}

/// The four bounds of `window`.
template <typename T>
void add_window(std::vector<Row<T>>& rows) {
  using W = sag::GuidanceWindow;
  const auto add = [&rows](const char* key, auto field, Range<double> range, const char* type,
                           const char* help) {
    rows.push_back(bound("", key, &T::window, field, range, type, help));
  };
  add("sigma_start", &W::sigma_start, kSigma, "SIGMA", "Guide from this noise level on");
  add("sigma_end", &W::sigma_end, kSigma, "SIGMA", "Guide down to this noise level");
  add("start_percent", &W::start_percent, kShare, "X",
      "The same as a share of the model's timesteps, 0 ... 1");
  add("end_percent", &W::end_percent, kShare, "X",
      "The same as a share of the model's timesteps, 0 ... 1");
}

/// Returns whether the window holds all noise levels.
inline bool is_everywhere(const sag::GuidanceWindow& window) {
  return std::isinf(window.sigma_start) && window.sigma_end <= 0 && !window.start_percent &&
         !window.end_percent;
}

/// Returns the options of a guidance that has a window. A noise level that was chosen takes the
/// place of a share that is the default. Throws UsageError where both were chosen, and
/// on a window that ends before it begins.
template <typename T>
T decide_windowed(const OptionTable<T>& table, const Choices& choices) {
  auto options = table.decide(choices);
  const auto prefer_level = [&](const char* level, const char* share,
                                std::optional<double> sag::GuidanceWindow::*field) {
    const auto given = choices.find(level);
    if (given == choices.end()) return;
    if (choices.contains(share)) {
      throw UsageError(
          fmt::format("{} and {} cannot be given together.", given->second.where, share));
    }
    options.window.*field = std::nullopt;
  };
  using W = sag::GuidanceWindow;
  prefer_level("sigma_start", "start_percent", &W::start_percent);
  prefer_level("sigma_end", "end_percent", &W::end_percent);
  const auto& window = options.window;
  const auto refuse = [&](const char* start, const char* end, double from, double to) {
    const auto given = choices.contains(start) ? choices.find(start) : choices.find(end);
    throw UsageError(fmt::format("{}: {} and {} must enclose a noise level, got {} and {}.",
                                 given->second.where, start, end, from, to));
  };
  if (window.sigma_start < window.sigma_end) {
    refuse("sigma_start", "sigma_end", window.sigma_start, window.sigma_end);
  }
  if (window.start_percent.value_or(0.0) > window.end_percent.value_or(1.0)) {
    refuse("start_percent", "end_percent", window.start_percent.value_or(0.0),
           window.end_percent.value_or(1.0));
  }
  return options;
}

}  // namespace sag_sample

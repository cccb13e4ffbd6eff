#pragma once

#include <vector>

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

}  // namespace sag_sample

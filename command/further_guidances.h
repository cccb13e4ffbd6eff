#pragma once

#include "guidances.h"
#include "sag/token_grid.h"

namespace sag_sample {

/// The guidances that are given with --guidance alone.
GuidanceKind pag_kind();
GuidanceKind seg_kind();
GuidanceKind apg_kind();
GuidanceKind cfg_zero_kind();
GuidanceKind rescale_kind();

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

}  // namespace sag_sample

#pragma once

#include <limits>
#include <optional>

namespace sag {

/// The noise levels at which a guidance works: sigma_end <= sigma <= sigma_start.
struct GuidanceWindow {
  /// The highest.
  double sigma_start = std::numeric_limits<double>::infinity();
  /// The lowest.
  double sigma_end = 0.0;
  /// The same as a share of the model's timesteps, 0 = start, 1 = end, converted by
  /// `ModelSampling::percent_to_sigma`. If set, it replaces sigma_start.
  std::optional<double> start_percent = {};
  /// Likewise for sigma_end.
  std::optional<double> end_percent = {};
};

}  // namespace sag

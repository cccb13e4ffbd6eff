#include "window.h"

#include <c10/util/Exception.h>

#include "model/conditioning_checks.h"

namespace sag {

GuidanceWindow in_sigmas(GuidanceWindow window, const ModelSampling& sampling, const char* caller) {
  for (const auto& percent : {window.start_percent, window.end_percent})
    TORCH_CHECK_VALUE(!percent || (*percent >= 0 && *percent <= 1), "[", caller,
                      "] start_percent and end_percent must be in [0, 1], got ",
                      percent.value_or(0), ".");
  if (window.start_percent) window.sigma_start = sampling.percent_to_sigma(*window.start_percent);
  if (window.end_percent) window.sigma_end = sampling.percent_to_sigma(*window.end_percent);
  TORCH_CHECK_VALUE(window.sigma_end <= window.sigma_start, "[", caller,
                    "] sigma_end must be at most sigma_start, got ", window.sigma_end, " and ",
                    window.sigma_start, ".");
  return window;
}

bool contains(const GuidanceWindow& window, double sigma) {
  return is_in_window(sigma, window.sigma_start, window.sigma_end);
}

}  // namespace sag

#include "report.h"

#include <fmt/format.h>

namespace sag_sample {

Totals total(const std::vector<RunReport>& runs) {
  Totals totals;
  for (const auto& run : runs) {
    totals.seconds += run.seconds;
    for (const auto& step : run.steps) {
      totals.evaluations += step.evaluations;
      totals.rows += step.rows;
      if (!run.guided) continue;
      ++totals.steps;
      totals.guided += step.guided ? 1 : 0;
      totals.masked += step.masked.value_or(0.0);
      if (!step.guided) ++totals.skipped[step.reason.empty() ? "no reason given" : step.reason];
    }
  }
  if (totals.guided > 0) totals.masked /= static_cast<double>(totals.guided);
  return totals;
}

std::string guidance_summary(const Totals& totals) {
  if (totals.steps == 0) return "not asked for self-attention guidance";
  std::string text = fmt::format("{} of {} evaluations guided", totals.guided, totals.steps);
  if (totals.guided > 0)
    text += fmt::format(", {:.0f} % of the picture masked", 100 * totals.masked);
  for (const auto& [reason, count] : totals.skipped)
    text += fmt::format("; {} not guided: {}", count, reason);
  return text;
}

}  // namespace sag_sample

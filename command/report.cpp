#include "report.h"

#include <algorithm>

#include <fmt/format.h>

namespace sag_sample {
namespace {

bool is_in(const RunReport& run, const std::string& guidance) {
  return guidance.empty() ? !run.guidances.empty()
                          : std::find(run.guidances.begin(), run.guidances.end(), guidance) !=
                                run.guidances.end();
}

}  // namespace

Totals total(const std::vector<RunReport>& runs) {
  Totals totals;
  for (const auto& run : runs) {
    totals.seconds += run.seconds;
    for (const auto& step : run.steps) {
      totals.evaluations += step.evaluations;
      totals.rows += step.rows;
      totals.filler_rows += step.filler_rows;
    }
  }
  return totals;
}

NoteReport summary_of(const StepReport& step, const std::string& guidance) {
  NoteReport summary = {.guidance = guidance};
  double masked = 0;
  int masks = 0;
  for (const auto& note : step.notes) {
    if (!guidance.empty() && note.guidance != guidance) continue;
    summary.guided |= note.guided;
    if (summary.reason.empty()) summary.reason = note.reason;
    masked += note.masked.value_or(0.0);
    masks += note.masked ? 1 : 0;
  }
  if (masks > 0) summary.masked = masked / masks;
  return summary;
}

GuidanceTotals guidance_total(const std::vector<RunReport>& runs, const std::string& guidance) {
  GuidanceTotals totals;
  double masked = 0;
  std::int64_t masks = 0;
  for (const auto& run : runs) {
    if (!is_in(run, guidance)) continue;
    for (const auto& step : run.steps) {
      const auto summary = summary_of(step, guidance);
      ++totals.steps;
      totals.guided += summary.guided ? 1 : 0;
      if (!summary.guided) {
        ++totals.skipped[summary.reason.empty() ? "no reason given" : summary.reason];
      } else if (summary.masked) {
        masked += *summary.masked;
        ++masks;
      }
    }
  }
  if (masks > 0) totals.masked = masked / static_cast<double>(masks);
  return totals;
}

std::string guidance_summary(const GuidanceTotals& totals) {
  std::string text = fmt::format("{} of {} evaluations guided", totals.guided, totals.steps);
  if (totals.masked) text += fmt::format(", {:.0f} % of the picture masked", 100 * *totals.masked);
  for (const auto& [reason, count] : totals.skipped) {
    text += fmt::format("; {} not guided: {}", count, reason);
  }
  return text;
}

}  // namespace sag_sample

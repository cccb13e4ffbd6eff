#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sag/unet.h"

namespace sag_sample {

/// What one guidance did in one evaluation.
struct NoteReport {
  /// Its name in the library's reports.
  std::string guidance = {};
  bool guided = false;
  /// Why it did not guide; empty if it did.
  std::string reason = {};
  /// Share of the picture that it masked.
  std::optional<double> masked = {};
};

/// One evaluation of the guided model at a noise level. Most samplers evaluate once a step, Heun's
/// twice.
struct StepReport {
  std::int64_t step = 0;
  double sigma = 0;
  /// Calls of the UNet, and pictures that went through it.
  std::int64_t evaluations = 0, rows = 0;
  /// Rows of them that only filled calls up.
  std::int64_t filler_rows = 0;
  double seconds = 0;
  std::vector<NoteReport> notes = {};
};

/// One sampling of a batch of pictures.
struct RunReport {
  /// The guidances of the model, by their names in the library's reports; empty: unguided.
  std::vector<std::string> guidances = {};
  std::vector<std::size_t> pictures = {};
  double cfg = 1.0;
  std::vector<StepReport> steps = {};
  /// Which self-attention each hook was given, and why.
  std::vector<sag::SiteChoice> sites = {};
  double seconds = 0;
};

/// What several runs, or one, come to.
struct Totals {
  std::int64_t evaluations = 0, rows = 0, filler_rows = 0;
  double seconds = 0;
};
Totals total(const std::vector<RunReport>& runs);

/// What guidances did in several runs, or in one.
struct GuidanceTotals {
  /// Evaluations of the runs that were to be guided, and those of them that were.
  std::int64_t steps = 0, guided = 0;
  /// Mean share masked, of those that masked something.
  std::optional<double> masked = {};
  /// The evaluations that were not guided, by reason.
  std::map<std::string, std::int64_t> skipped = {};
};
/// Of one guidance, or of all together where `guidance` is empty: then an evaluation was guided if
/// any of them guided it.
GuidanceTotals guidance_total(const std::vector<RunReport>& runs, const std::string& guidance = "");

/// Returns what happened to a guidance, or to all together, in one evaluation of a run.
NoteReport summary_of(const StepReport& step, const std::string& guidance = "");

/// Returns one line on how much was guided, and why the rest was not.
std::string guidance_summary(const GuidanceTotals& totals);

}  // namespace sag_sample

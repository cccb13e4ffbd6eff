#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace sag_sample {

/// One evaluation of the guided model at a noise level. Most samplers evaluate once a step, Heun's
/// twice.
struct StepReport {
  std::int64_t step = 0;
  double sigma = 0;
  std::int64_t evaluations = 0;  ///< calls of the UNet
  std::int64_t rows = 0;         ///< pictures that went through it
  bool guided = false;
  std::string reason = {};  ///< why it was not guided; empty if it was, or was not to be
  std::optional<double> masked =
      {};  ///< share of the picture that the model attended to, if guided
  double seconds = 0;
};

/// One sampling of a batch of pictures.
struct RunReport {
  bool guided = false;  ///< with self-attention guidance
  std::vector<std::size_t> pictures = {};
  double cfg = 1.0;
  std::vector<StepReport> steps = {};
  double seconds = 0;
};

/// What several runs, or one, come to.
struct Totals {
  std::int64_t evaluations = 0, rows = 0;
  std::int64_t guided = 0;  ///< steps that were guided
  std::int64_t steps = 0;   ///< steps of the runs that were to be guided
  double masked = 0;        ///< mean share masked of the guided steps
  double seconds = 0;
  std::map<std::string, std::int64_t> skipped;  ///< steps not guided, by reason
};
Totals total(const std::vector<RunReport>& runs);

/// Returns one line on how much was guided, and why the rest was not.
std::string guidance_summary(const Totals& totals);

}  // namespace sag_sample

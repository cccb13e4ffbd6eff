#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace sag_sample {

/// Shows on stderr how far a run is: a bar on a terminal, elsewhere a plain line now and then.
class Progress {
 public:
  enum class Style { none, bar, lines };

  /// The style for this process: a bar if stderr is a terminal; nothing if `quiet`.
  static Style style_for(bool quiet);

  /// `work`: how much there is to do, in units of the caller's choice.
  Progress(Style style, double work);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Says that `work` more is done, with `evaluations` calls of the UNet, and where the run is.
  void advance(double work, std::int64_t evaluations, const std::string& where);
  /// Takes the bar away.
  void finish();

 private:
  double seconds() const;

  Style style_;
  double work_, done_ = 0;
  std::int64_t evaluations_ = 0;
  std::chrono::steady_clock::time_point start_;
  // When the next line is due, in seconds.
  double next_line_ = 5;
  bool shown_ = false;
};

/// Returns the text of a bar: how much of it is done, and what was said. Pure; for the tests.
std::string progress_text(double share, double seconds, std::int64_t evaluations,
                          const std::string& where);

}  // namespace sag_sample

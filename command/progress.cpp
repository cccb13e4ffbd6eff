#include "progress.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>

#include <fmt/format.h>

namespace sag_sample {
namespace {

std::string duration(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::ceil(seconds));
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

std::string rate(double seconds, std::int64_t evaluations) {
  return fmt::format("{:.1f} evaluations/s",
                     static_cast<double>(evaluations) / std::max(seconds, 1e-9));
}

}  // namespace

std::string progress_text(double share, double seconds, std::int64_t evaluations,
                          const std::string& where) {
  constexpr std::size_t kCells = 24;
  share = std::clamp(share, 0.0, 1.0);
  const auto full = static_cast<std::size_t>(share * kCells + 1e-9);
  const double left = share > 0 ? seconds * (1 - share) / share : 0;
  return fmt::format("[{}{}] {:3.0f} %  {}  {}  {} left", std::string(full, '#'),
                     std::string(kCells - full, '.'), 100 * share, where,
                     rate(seconds, evaluations), duration(left));
}

Progress::Style Progress::style_for(bool quiet) {
  if (quiet) return Style::none;
  return ::isatty(STDERR_FILENO) ? Style::bar : Style::lines;
}

Progress::Progress(Style style, double work)
    : style_(style), work_(work), start_(std::chrono::steady_clock::now()) {}

Progress::~Progress() {
  finish();
}

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Progress::advance(double work, std::int64_t evaluations, const std::string& where) {
  done_ += work;
  evaluations_ += evaluations;
  const double now = seconds(), share = work_ > 0 ? done_ / work_ : 1.0;
  if (style_ == Style::bar) {
    // Erases what is left of a longer line.
    fmt::print(stderr, "\r{}\x1b[K", progress_text(share, now, evaluations_, where));
    shown_ = true;
  } else if (style_ == Style::lines && now >= next_line_) {
    fmt::print(stderr, "sag-sample: {:.0f} %, {}, {}, {} left\n", 100 * share, where,
               rate(now, evaluations_), duration(now * (1 - share) / std::max(share, 1e-9)));
    next_line_ = now + 10;
  }
  std::fflush(stderr);
}

void Progress::finish() {
  if (!shown_) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  shown_ = false;
}

}  // namespace sag_sample

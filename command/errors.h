#pragma once

#include <stdexcept>

namespace sag_sample {

/// The user's mistake: one clear sentence, exit code 1.
class UsageError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The run failed: one clear sentence, exit code 2.
class RunError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace sag_sample

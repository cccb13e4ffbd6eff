#pragma once

#include <functional>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

namespace sag::test {

/// The message of the error that `act` must throw, of just this type.
template <typename Error = c10::Error>
std::string error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an error of another type: " << error.what();
    return "";
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// What people can read: no traceback, no line of C++.
inline auto one_sentence() {
  using ::testing::HasSubstr;
  using ::testing::Not;
  return ::testing::AllOf(Not(HasSubstr("\n")), Not(HasSubstr("Traceback")),
                          Not(HasSubstr("frame #")), Not(HasSubstr(".cpp")));
}

}  // namespace sag::test

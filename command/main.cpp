// The command sag-sample: draws pictures with a diffusion model, steered by Self-Attention
// Guidance.

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include "command.h"
#include "errors.h"
#include "interrupt.h"
#include "options.h"

namespace {

constexpr int kDone = 0, kMistake = 1, kFailed = 2;

int fail(int code, const std::string& sentence) {
  fmt::print(stderr, "sag-sample: {}\n", sentence);
  return code;
}

std::string_view trimmed(std::string_view text) {
  constexpr const char* kSpace = " \t\n\v\f\r";
  const auto begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

// The lines as one; what follows a colon belongs to it. A std::regex would recurse once for each
// character of what users gave.
std::string in_one_line(std::string_view text) {
  std::string joined;
  while (!text.empty()) {
    const auto length = std::min(text.find('\n'), text.size());
    const auto line = trimmed(text.substr(0, length));
    if (!joined.empty() && !line.empty()) joined += joined.ends_with(':') ? " " : "; ";
    joined += line;
    text.remove_prefix(std::min(length + 1, text.size()));
  }
  return joined;
}

// A message of the library in one line, without the name of the function.
std::string sentence_of(const std::string& text) {
  auto sentence = in_one_line(text);
  const auto end = sentence.find("] ");
  if (!sentence.starts_with('[') || end == std::string::npos) return sentence;
  sentence.erase(0, end + 2);
  sentence[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(sentence[0])));
  return sentence;
}

// An error of the interpreter ends with the line that says what went wrong.
std::string what_went_wrong(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.find("Traceback") == std::string::npos ? sentence_of(text.substr(0, text.find('\n')))
                                                     : text.substr(text.rfind('\n') + 1);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto options = sag_sample::parse_options({argv + 1, argv + argc}, std::cout);
    if (!options) return kDone;
    sag_sample::catch_interrupts(options->quiet);
    sag_sample::run_command(*options, std::cout);
    return kDone;
  } catch (const sag_sample::UsageError& error) {
    return fail(kMistake, error.what());
  } catch (const sag_sample::RunError& error) {
    return fail(kFailed, error.what());
  } catch (const c10::ValueError&
               error) {  // what the library says of its arguments, which are the user's
    return fail(kMistake, sentence_of(error.what_without_backtrace()));
  } catch (const c10::TypeError& error) {
    return fail(kMistake, sentence_of(error.what_without_backtrace()));
  } catch (const c10::IndexError& error) {
    return fail(kMistake, sentence_of(error.what_without_backtrace()));
  } catch (const c10::OutOfMemoryError&) {
    return fail(kFailed,
                "The device has not enough memory; a smaller --max-rows or --batch needs less.");
  } catch (const c10::Error& error) {
    return fail(kFailed, what_went_wrong(error.what_without_backtrace()));
  } catch (const std::bad_alloc&) {
    return fail(kFailed, "There is not enough memory.");
  } catch (const std::exception& error) {
    return fail(kFailed, what_went_wrong(error.what()));
  }
}

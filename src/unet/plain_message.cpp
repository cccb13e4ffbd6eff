#include "plain_message.h"

#include <algorithm>
#include <cctype>

#include <c10/util/Exception.h>

namespace sag {
namespace {

// "RuntimeError: " at the start of a line: what the interpreter puts in front of a message.
bool starts_message(const std::string& text, std::size_t line, std::size_t& begin) {
  begin = text.find(": ", line);
  if (begin == std::string::npos) return false;
  const auto name = text.substr(line, begin - line);
  begin += 2;
  const bool is_name = std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '.';
  });
  return is_name && (name.ends_with("Error") || name.ends_with("Exception"));
}

}  // namespace

std::string plain_message(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
  // Tracebacks nest where graphs fork; the last message is the innermost.
  std::size_t message = 0, begin = 0;
  for (std::size_t line = 0; line != std::string::npos && line < text.size();) {
    if (starts_message(text, line, begin)) message = begin;
    line = text.find('\n', line);
    if (line != std::string::npos) ++line;
  }
  text = text.substr(message);
  // What follows shows C++ frames, code of the archive, or how to debug CUDA.
  for (const char* appendix : {"\nException raised from", ":\n  File \"", "\n  File \"",
                               "\nSearch for `cuda", "\nCUDA kernel errors might"})
    text = text.substr(0, text.find(appendix));
  const auto is_space = [](unsigned char c) { return std::isspace(c) != 0; };
  text.erase(std::find_if_not(text.rbegin(), text.rend(), is_space).base(), text.end());
  text.erase(text.begin(), std::find_if_not(text.begin(), text.end(), is_space));
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text.ends_with('.') ? text : text + '.';
}

void throw_failure(const std::exception& error, const std::string& sentence) {
  const std::string text = error.what();
  const bool memory = text.find("out of memory") != std::string::npos ||
                      text.find("DefaultCPUAllocator") != std::string::npos;
  TORCH_CHECK_WITH(OutOfMemoryError, !memory, sentence);
  TORCH_CHECK(false, sentence);
}

}  // namespace sag

#include "messages.h"

#include <algorithm>
#include <cctype>
#include <string_view>

namespace sag_sample {
namespace {

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

std::string without_function(std::string sentence) {
  const auto end = sentence.find("] ");
  if (!sentence.starts_with('[') || end == std::string::npos) return sentence;
  sentence.erase(0, end + 2);
  sentence[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(sentence[0])));
  return sentence;
}

}  // namespace

std::string sentence_of(const c10::Error& error,
                        const std::map<std::string, std::string>& options) {
  const auto sentence = without_function(in_one_line(error.what_without_backtrace()));
  const auto end = std::min(sentence.find(' '), sentence.size());
  const auto option = options.find(sentence.substr(0, end));
  return option == options.end() ? sentence : option->second + sentence.substr(end);
}

std::string what_went_wrong(std::string message) {
  while (!message.empty() && message.back() == '\n') message.pop_back();
  if (message.find("Traceback") != std::string::npos) {
    return message.substr(message.rfind('\n') + 1);
  }
  return without_function(in_one_line(message.substr(0, message.find('\n'))));
}

}  // namespace sag_sample

#include "option.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "errors.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

[[noreturn]] void refuse(const Given& given, const std::string& what, const std::string& got,
                         const std::string& hint = ".") {
  throw UsageError(fmt::format("{} must be {}, got {}{}", given.where, what, got, hint));
}

[[noreturn]] void refuse(const Given& given, const std::string& what) {
  refuse(given, what, given.words.empty() ? given.shown : given.words.back());
}

template <typename Number>
std::optional<Number> parse_word(const std::string& word) {
  Number value = {};
  const char* end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, value);
  return error == std::errc() && stop == end ? std::optional(value) : std::nullopt;
}

template <typename Number>
std::optional<Number> number_of(const Value& value) {
  if (const auto* number = std::get_if<Number>(&value)) return *number;
  return std::nullopt;
}
template <>
std::optional<double> number_of(const Value& value) {
  if (const auto* whole = std::get_if<std::int64_t>(&value)) return static_cast<double>(*whole);
  if (const auto* number = std::get_if<double>(&value)) return *number;
  return std::nullopt;
}

template <typename Number>
std::string describe(const Range<Number>& range, bool word) {
  if (range.what[0] == '\0') {
    return fmt::format("a whole number between {} and {}", range.low, range.high);
  }
  const bool unbounded = static_cast<double>(range.high) == Limits::infinity();
  return std::string(range.what) + (word && unbounded ? ", or inf" : "");
}

template <typename Number>
Number read_in(const Given& given, const Range<Number>& range) {
  const auto number =
      given.words.empty() ? number_of<Number>(given.value) : parse_word<Number>(given.words.back());
  if (!number || !range.contains(*number)) refuse(given, describe(range, !given.words.empty()));
  return *number;
}

// The text of the command line or of model.json; nothing: it is something else.
std::optional<std::string> text_of(const Given& given) {
  if (!given.words.empty()) return given.words.back();
  if (const auto* text = std::get_if<std::string>(&given.value)) return *text;
  return std::nullopt;
}

}  // namespace

std::int64_t read_number(const Given& given, const Range<std::int64_t>& range) {
  return read_in(given, range);
}

std::uint64_t read_number(const Given& given, const Range<std::uint64_t>& range) {
  return read_in(given, range);
}

double read_number(const Given& given, const Range<double>& range) {
  return read_in(given, range);
}

std::string read_text(const Given& given) {
  const auto text = text_of(given);
  if (!given.words.empty() && text->empty()) {
    throw UsageError(fmt::format("{} must not be empty.", given.where));
  }
  if (!text || text->empty()) refuse(given, "a text that is not empty");
  return *text;
}

std::string read_choice(const Given& given, std::span<const std::string_view> choices) {
  const auto text = text_of(given);
  if (!text || std::find(choices.begin(), choices.end(), *text) == choices.end()) {
    refuse(given, fmt::format("one of {}", fmt::join(choices, ", ")),
           given.words.empty() ? given.shown : fmt::format("\"{}\"", *text),
           text ? suggestion(*text, {choices.begin(), choices.end()}) : ".");
  }
  return *text;
}

bool read_flag(const Given& given) {
  const auto* value = std::get_if<bool>(&given.value);
  if (!value) refuse(given, "true or false");
  return *value;
}

std::string shown(const Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  if (const auto* number = std::get_if<double>(&value)) return fmt::format("{:g}", *number);
  if (const auto* number = std::get_if<std::int64_t>(&value)) return fmt::format("{}", *number);
  if (const auto* number = std::get_if<std::uint64_t>(&value)) return fmt::format("{}", *number);
  return {};
}

std::string joined(std::span<const std::string_view> names) {
  return fmt::format("{}", fmt::join(names, "|"));
}

}  // namespace sag_sample

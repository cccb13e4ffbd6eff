#include "prompt.h"

#include <charconv>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>

#include <fmt/format.h>

#include "errors.h"

namespace sag_sample {
namespace {

constexpr double kOfParentheses = 1.1;
constexpr int kDeepest = 100;

// A text without its backslashes. `marks` has its parentheses that are no characters of the text,
// at their places.
struct Marked {
  std::string text, marks;
};

// From one place in the text to the one behind the last.
struct Span {
  std::size_t begin, end;
};

bool is_parenthesis(char character) {
  return character == '(' || character == ')';
}

Marked mark(std::string_view prompt) {
  Marked marked;
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    const bool escaped =
        prompt[i] == '\\' && i + 1 < prompt.size() && is_parenthesis(prompt[i + 1]);
    if (escaped) ++i;
    marked.text += prompt[i];
    marked.marks += !escaped && is_parenthesis(prompt[i]) ? prompt[i] : ' ';
  }
  return marked;
}

// Cuts before and behind every pair of parentheses that is in no other. Behind one that closes
// nothing, the next one that opens belongs to it.
std::vector<Span> split(const Marked& marked, Span span) {
  std::vector<Span> parts;
  std::size_t begin = span.begin;
  const auto cut = [&](std::size_t end) {
    if (end > begin) parts.push_back({begin, end});
    begin = end;
  };
  int depth = 0;
  for (std::size_t i = span.begin; i < span.end; ++i) {
    if (marked.marks[i] == '(' && depth++ == 0) cut(i);
    if (marked.marks[i] == ')' && --depth == 0) cut(i + 1);
  }
  cut(span.end);
  return parts;
}

bool in_parentheses(const Marked& marked, Span span) {
  return span.end - span.begin >= 2 && marked.marks[span.begin] == '(' &&
         marked.marks[span.end - 1] == ')';
}

std::optional<double> parse_weight(std::string_view word) {
  constexpr const char* kSpaces = " \t\n\v\f\r";
  const auto first = word.find_first_not_of(kSpaces);
  if (first == std::string_view::npos) return std::nullopt;
  word = word.substr(first, word.find_last_not_of(kSpaces) + 1 - first);
  if (word.starts_with('+') && !word.starts_with("+-")) word.remove_prefix(1);
  double weight = 0;
  const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), weight);
  const bool is_number = error == std::errc() && stop == word.data() + word.size();
  return is_number && std::isfinite(weight) ? std::optional(weight) : std::nullopt;
}

void add_pieces(const Marked& marked, Span span, double weight, int depth,
                std::vector<sag::PromptPiece>& pieces) {
  if (depth > kDeepest) {
    throw UsageError(fmt::format(
        "A prompt's parentheses must not nest deeper than {}; \\( is a parenthesis of the text.",
        kDeepest));
  }
  const std::string_view text = marked.text;
  for (const Span part : split(marked, span)) {
    if (!in_parentheses(marked, part)) {
      pieces.push_back({std::string(text.substr(part.begin, part.end - part.begin)), weight});
      continue;
    }
    Span inside = {part.begin + 1, part.end - 1};
    double inside_weight = weight * kOfParentheses;
    const auto colon = text.substr(0, inside.end).rfind(':');
    if (colon != std::string_view::npos && colon > inside.begin) {
      if (const auto number = parse_weight(text.substr(colon + 1, inside.end - colon - 1))) {
        inside_weight = *number;
        inside.end = colon;
      }
    }
    add_pieces(marked, inside, inside_weight, depth + 1, pieces);
  }
}

}  // namespace

std::vector<sag::PromptPiece> parse_prompt(std::string_view prompt) {
  const auto marked = mark(prompt);
  std::vector<sag::PromptPiece> pieces;
  add_pieces(marked, {0, marked.text.size()}, 1.0, 0, pieces);
  return pieces;
}

}  // namespace sag_sample

#include "words/nearest.h"

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <filesystem>

#include <fmt/format.h>

namespace sag_sample {
namespace {

namespace fs = std::filesystem;

bool same_letter(char a, char b) {
  const auto small = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  return small(a) == small(b);
}

// How many letters have to be put in, left out, changed or swapped with the next.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> steps(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        steps[i][j] = i + j;
        continue;
      }
      const std::size_t change = same_letter(a[i - 1], b[j - 1]) ? 0 : 1;
      steps[i][j] =
          std::min({steps[i - 1][j] + 1, steps[i][j - 1] + 1, steps[i - 1][j - 1] + change});
      const bool swapped =
          i > 1 && j > 1 && same_letter(a[i - 1], b[j - 2]) && same_letter(a[i - 2], b[j - 1]);
      if (swapped) steps[i][j] = std::min(steps[i][j], steps[i - 2][j - 2] + 1);
    }
  }
  return steps.back().back();
}

// The nearest name; empty: none is near.
std::string nearest(std::string_view word, const std::vector<std::string>& names) {
  // Longer words are no names that anybody mistypes, and take time.
  constexpr std::size_t kLongest = 200;
  std::string found;
  std::size_t fewest = std::max<std::size_t>(word.size(), 3) / 3 + 1;
  for (const auto& name : names) {
    if (name == word || word.size() > kLongest || name.size() > kLongest) continue;
    const auto letters = distance(word, name);
    if (letters >= fewest) continue;
    fewest = letters;
    found = name;
  }
  return found;
}

}  // namespace

std::string suggestion(std::string_view word, const std::vector<std::string>& names) {
  const auto found = nearest(word, names);
  return found.empty() ? "." : fmt::format("; do you mean {}?", found);
}

std::string suggestion_beside(const std::string& path) {
  const fs::path missing(path);
  const auto folder = missing.parent_path();
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder.empty() ? "." : folder, error)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  const auto found = nearest(missing.filename().string(), names);
  return found.empty() ? "." : fmt::format("; do you mean \"{}\"?", (folder / found).string());
}

}  // namespace sag_sample

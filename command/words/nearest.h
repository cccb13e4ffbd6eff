#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace sag_sample {

/// Returns the end of a sentence: "; do you mean NAME?" for the name that `word` is most likely a
/// typo of, or "." if none is near: at most a third of the letters differ, where two letters in the
/// wrong order count once and case does not count.
std::string suggestion(std::string_view word, const std::vector<std::string>& names);

/// The same for the name of a file or directory, among those beside it.
std::string suggestion_beside(const std::string& path);

}  // namespace sag_sample

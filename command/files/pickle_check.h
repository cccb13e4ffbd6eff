#pragma once

#include <string_view>

namespace sag_sample {

/// Throws RunError unless the bytes are a pickle of protocol 2 whose values nest at most 100 deep
/// and that takes from its stack only what it put there. It knows the opcodes that Python and
/// LibTorch save tensors with, and refuses all others, and lists and dicts that hold themselves.
///
/// LibTorch's own reader crashes on the others: a damaged file of a few bytes makes it take values
/// that are not there, and one of a few megabytes makes it recurse until the stack overflows.
void check_pickle(std::string_view pickle);

}  // namespace sag_sample

#pragma once

#include <string_view>

namespace sag_sample {

/// Throws RunError unless the bytes are a pickle of protocol 2 whose values nest at most 100 deep
/// and that takes from its stack only what it put there. It knows the opcodes that Python and
/// LibTorch save tensors with, and refuses all others, and lists and dicts that hold themselves.
///
/// LibTorch frees nested values, and reads the names of types, by recursion: a file of a few
/// megabytes could otherwise overflow our stack.
void check_pickle(std::string_view pickle);

}  // namespace sag_sample

#pragma once

#include <exception>
#include <string>

namespace sag {

/// Returns what an exception of LibTorch says, on one line that ends with a full stop: without
/// tracebacks, code, and advice on debugging.
std::string plain_message(const std::exception& error);

/// Throws what a network failed with, under this sentence: c10::OutOfMemoryError where memory was
/// short, although interpreters and compiled code make one type of all exceptions, else c10::Error.
[[noreturn]] void throw_failure(const std::exception& error, const std::string& sentence);

}  // namespace sag

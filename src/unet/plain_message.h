#pragma once

#include <exception>
#include <string>

namespace sag {

/// Returns what an exception of LibTorch says, on one line that ends with a full stop: without
/// tracebacks, code, and advice on debugging.
std::string plain_message(const std::exception& error);

}  // namespace sag

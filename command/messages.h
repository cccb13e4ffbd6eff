#pragma once

#include <string>

#include <c10/util/Exception.h>

namespace sag_sample {

/// Returns a message of the library in one line, without the name of the function.
std::string sentence_of(const c10::Error& error);

/// Returns what went wrong, in one line: the first line of a message, or the last line of the
/// traceback of TorchScript's interpreter.
std::string what_went_wrong(std::string message);

}  // namespace sag_sample

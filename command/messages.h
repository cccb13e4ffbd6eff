#pragma once

#include <map>
#include <string>

#include <c10/util/Exception.h>

namespace sag_sample {

/// Returns a message of the library in one line, without the name of the function. `options`: what
/// stands for the library's word for an argument, where that is the first one.
std::string sentence_of(const c10::Error& error,
                        const std::map<std::string, std::string>& options = {});

/// Returns what went wrong, in one line: the first line of a message, or the last line of the
/// traceback of TorchScript's interpreter.
std::string what_went_wrong(std::string message);

}  // namespace sag_sample

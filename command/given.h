#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace sag_sample {

/// Nothing, a truth value, a number or a text.
using Value = std::variant<std::monostate, bool, std::int64_t, std::uint64_t, double, std::string>;

/// What stands for an option on the command line or in model.json.
struct Given {
  /// What messages call the place: `--steps`, or `DIR/model.json: "steps"`.
  std::string where;
  /// The words of the command line; empty: it comes from model.json.
  std::vector<std::string> words = {};
  /// The value in model.json. Nothing: null, an array or an object.
  Value value = {};
  /// The value in model.json as messages show it.
  std::string shown = {};
};

/// What somebody chose, by the option. An option that is not here is left open: whoever comes next
/// decides it. The command line comes first, then model.json, then the defaults of the structs.
using Choices = std::map<std::string, Given, std::less<>>;

}  // namespace sag_sample

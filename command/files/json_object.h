#pragma once

#include <set>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "given.h"

namespace sag_sample {

/// One object of a JSON file: hands out its values, and in the end names the keys that nobody asked
/// for. The JSON must outlive it.
class JsonObject {
 public:
  /// `where` names the object in messages, `model.json: "sample"` for example. Throws UsageError
  /// when it is not an object.
  JsonObject(const nlohmann::json& json, std::string where);

  bool has(const std::string& key);
  /// These throw UsageError when there is no such key.
  Given given(const std::string& key);
  JsonObject object(const std::string& key);
  /// Throws UsageError, too, when it is not an array of `size` values; `what` says what it must be.
  std::vector<Given> array(const std::string& key, std::size_t size, const char* what);
  /// Throws UsageError, too, when it is not an array of texts; their words are those of an option
  /// that was given for each.
  Given texts(const std::string& key);
  /// Throws UsageError when there is a key that was not asked for.
  void refuse_unknown_keys() const;

 private:
  const nlohmann::json& value(const std::string& key);
  std::string name(const std::string& key) const;

  const nlohmann::json& json_;
  std::string where_;
  std::set<std::string> known_;
};

/// Reads a JSON file. Throws UsageError, in one sentence, when it is not JSON, nests deeper than
/// 100, or holds a number that is too large; `missing` when it cannot be read.
nlohmann::json read_json_file(const std::string& path, const std::string& missing);

}  // namespace sag_sample

#pragma once

#include <string>

namespace sag_sample {

/// A file that appears whole or not at all: its content goes to a temporary file next to it,
/// which takes the name in the end. What is not a regular file (/dev/stdout, a pipe) is written to
/// directly.
class OutputFile {
 public:
  /// Checks that the file can be made. `option` is what error messages call it, "--out" for
  /// example. Throws UsageError.
  OutputFile(std::string option, std::string path);
  ~OutputFile();
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;

  /// Writes the content next to the target. Throws RunError, and then nothing is left behind.
  void write(const std::string& bytes);
  /// Gives the written content its name. Throws RunError.
  void commit();

  const std::string& path() const { return path_; }

 private:
  std::string option_, path_, target_, temporary_, direct_;
  bool regular_ = true;
};

}  // namespace sag_sample

#pragma once

// The repository's files, and files that go away with a test.

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace sag::test {

/// The repository's root, the golden files and the shipped model; each ends with a slash.
inline const std::string kSourceDir = SAG_SOURCE_DIR "/";
inline const std::string kGoldenDir = kSourceDir + "tests/golden/";
inline const std::string kModelDir = kSourceDir + "models/emoji/";

/// Returns the bytes of a file; throws if it cannot be read.
inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream stream;
  stream.exceptions(std::ios::failbit);
  stream.open(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

inline void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream stream;
  stream.exceptions(std::ios::failbit);
  stream.open(path, std::ios::binary);
  stream << bytes;
}

/// Removes a file or a folder. Not std::filesystem::remove_all: LibTorch's wheel exports one of its
/// own, which crashes.
inline void remove_tree(const std::filesystem::path& path) {
  if (std::filesystem::is_directory(std::filesystem::symlink_status(path))) {
    const std::vector<std::filesystem::path> entries(std::filesystem::directory_iterator(path), {});
    for (const auto& entry : entries) remove_tree(entry);
  }
  std::filesystem::remove(path);
}

/// A folder of its own, which goes away with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    static std::atomic<int> count = 0;
    path_ = std::filesystem::path(testing::TempDir()) /
            ("sag_" + std::to_string(::getpid()) + "_" + std::to_string(++count));
    remove_tree(path_);
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { remove_tree(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string path() const { return path_.string(); }
  /// Returns the path of a file in the folder.
  std::string path(const std::string& name) const { return (path_ / name).string(); }
  /// Writes a file and returns its path.
  std::string write(const std::string& name, const std::string& bytes) const {
    write_bytes(path(name), bytes);
    return path(name);
  }

 private:
  std::filesystem::path path_;
};

/// The path of one file, which is deleted with the object; it does not exist at first.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& name) : path_(folder_.path(name)) {}
  const std::string& path() const { return path_; }
  void write(const std::string& bytes) const { write_bytes(path_, bytes); }

 private:
  TemporaryFolder folder_;
  std::string path_;
};

}  // namespace sag::test

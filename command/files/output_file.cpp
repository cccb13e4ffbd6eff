#include "files/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include <fmt/format.h>

#include "errors.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;

// Writes all of it to an open file, to the disk. Returns 0 or what went wrong.
int write_all(int file, const std::string& bytes) {
  for (std::size_t done = 0; done < bytes.size();) {
    const auto written = ::write(file, bytes.data() + done, bytes.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    done += static_cast<std::size_t>(written);
  }
  return 0;
}

// mkstemp makes files that only their owner may read; an output is an ordinary file.
void give_usual_permissions(int file) {
  const mode_t mask = ::umask(0);
  ::umask(mask);
  static_cast<void>(::fchmod(file, 0666 & ~mask));
}

}  // namespace

OutputFile::OutputFile(std::string option, std::string path)
    : option_(std::move(option)), path_(std::move(path)) {
  std::error_code error;
  const auto status = fs::status(path_, error);
  if (fs::is_directory(status)) {
    throw UsageError(fmt::format("{}: \"{}\" is a directory, not a file.", option_, path_));
  }
  regular_ = !fs::exists(status) || fs::is_regular_file(status);
  // A symbolic link stays: what it points to is replaced.
  target_ = fs::exists(status) ? fs::canonical(path_, error).string() : path_;
  if (error || target_.empty()) target_ = path_;
  const fs::path parent = fs::path(target_).parent_path();
  const std::string directory = parent.empty() ? "." : parent.string();
  if (!fs::is_directory(directory, error)) {
    throw UsageError(fmt::format("{}: there is no directory \"{}\" to write \"{}\" to.", option_,
                                 directory, path_));
  }
  const bool writable = regular_ ? ::access(directory.c_str(), W_OK | X_OK) == 0
                                 : ::access(target_.c_str(), W_OK) == 0;
  if (!writable) {
    throw UsageError(
        fmt::format("{}: \"{}\" cannot be written: {}.", option_, path_, std::strerror(errno)));
  }
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : option_(std::move(other.option_)),
      path_(std::move(other.path_)),
      target_(std::move(other.target_)),
      temporary_(std::exchange(other.temporary_, {})),
      direct_(std::move(other.direct_)),
      regular_(other.regular_) {}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void OutputFile::write(const std::string& bytes) {
  if (!regular_) {
    direct_ = bytes;
    return;
  }
  std::string name = target_ + ".XXXXXX";
  const int file = ::mkstemp(name.data());
  int error = file < 0 ? errno : 0;
  if (file >= 0) {
    temporary_ = name;
    give_usual_permissions(file);
    error = write_all(file, bytes);
    if (::close(file) != 0 && error == 0) error = errno;
  }
  if (error != 0) {
    throw RunError(
        fmt::format("{}: writing \"{}\" failed: {}.", option_, path_, std::strerror(error)));
  }
}

void OutputFile::commit() {
  int error = 0;
  if (regular_) {
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) error = errno;
    if (error == 0) temporary_.clear();
  } else {
    const int file = ::open(target_.c_str(), O_WRONLY);
    error = file < 0 ? errno : write_all(file, direct_);
    if (file >= 0) ::close(file);
  }
  if (error != 0) {
    throw RunError(
        fmt::format("{}: writing \"{}\" failed: {}.", option_, path_, std::strerror(error)));
  }
}

}  // namespace sag_sample

#include "file_problem.h"

#include <filesystem>
#include <fstream>

#include "plain_message.h"

namespace sag {

std::string zip_problem(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return "which does not exist.";
  if (std::filesystem::is_directory(status)) return "which is a directory.";
  std::ifstream file(path, std::ios::binary);
  if (!file) return "which cannot be opened.";
  char head[8] = {};
  file.read(head, sizeof head);
  if (file.gcount() == 0) return "which is empty.";
  // LibTorch could read one, but trusts its offsets: a damaged file can end the process.
  if (std::string(head + 4, 4) == "PTMF")
    return "which is a flatbuffer (.ff): save the module with torch.jit.save instead.";
  if (std::string(head, 4) != "PK\x03\x04") return "which is not a zip archive.";
  return "";
}

std::string read_problem(const std::exception& error) {
  const auto message = plain_message(error);
  return message.find("central directory") != std::string::npos
             ? "which is truncated or damaged."
             : "which cannot be read as one: " + message;
}

}  // namespace sag

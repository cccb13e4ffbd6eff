#pragma once

// Files in the safetensors format.

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include "support/files.h"

namespace sag::test {

/// The name that the format has for a dtype.
inline std::string safetensors_dtype(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kDouble:
      return "F64";
    case torch::kFloat:
      return "F32";
    case torch::kHalf:
      return "F16";
    case torch::kBFloat16:
      return "BF16";
    case torch::kLong:
      return "I64";
    case torch::kInt:
      return "I32";
    case torch::kChar:
      return "I8";
    case torch::kByte:
      return "U8";
    case torch::kFloat8_e4m3fn:
      return "F8_E4M3";
    default:
      throw std::runtime_error("no name for this dtype");
  }
}

/// A file: the length of the header, the header, the data.
inline std::string safetensors_file(const std::string& header, const std::string& data = "") {
  std::string bytes(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

/// The shapes and dtypes of a file's tensors.
using TensorShapes = std::map<std::string, std::pair<torch::ScalarType, std::vector<std::int64_t>>>;

/// The header of such tensors, one after the other, and how many bytes they have.
inline std::pair<std::string, std::uint64_t> safetensors_header(
    const TensorShapes& tensors, const std::map<std::string, std::string>& metadata = {}) {
  std::vector<std::string> entries;
  std::uint64_t end = 0;
  for (const auto& [name, tensor] : tensors) {
    const auto& [dtype, sizes] = tensor;
    const auto begin = end;
    end += static_cast<std::uint64_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
    const nlohmann::json entry = {
        {"dtype", safetensors_dtype(dtype)}, {"shape", sizes}, {"data_offsets", {begin, end}}};
    entries.push_back(nlohmann::json(name).dump() + ":" + entry.dump());
  }
  if (!metadata.empty()) entries.push_back("\"__metadata__\":" + nlohmann::json(metadata).dump());
  return {fmt::format("{{{}}}", fmt::join(entries, ",")), end};
}

/// A file with these tensors.
inline std::string safetensors_bytes(const std::map<std::string, torch::Tensor>& tensors,
                                     const std::map<std::string, std::string>& metadata = {}) {
  TensorShapes shapes;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    shapes[name] = {tensor.scalar_type(), tensor.sizes().vec()};
    const auto plain = tensor.contiguous();
    data.append(static_cast<const char*>(plain.const_data_ptr()), plain.nbytes());
  }
  return safetensors_file(safetensors_header(shapes, metadata).first, data);
}

/// Writes a file whose tensors are zeros that take no room on the disk.
inline void write_zeros(const std::string& path, const TensorShapes& tensors,
                        const std::map<std::string, std::string>& metadata = {}) {
  const auto [header, size] = safetensors_header(tensors, metadata);
  const auto bytes = safetensors_file(header);
  write_bytes(path, bytes);
  std::filesystem::resize_file(path, bytes.size() + size);
}

}  // namespace sag::test

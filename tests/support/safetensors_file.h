#pragma once

// Safetensors files, as bytes.

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

namespace sag::test {

inline const char* safetensors_dtype(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kDouble:
      return "F64";
    case torch::kFloat:
      return "F32";
    case torch::kHalf:
      return "F16";
    case torch::kBFloat16:
      return "BF16";
    case torch::kFloat8_e4m3fn:
      return "F8_E4M3";
    case torch::kLong:
      return "I64";
    case torch::kByte:
      return "U8";
    default:
      throw std::invalid_argument("no name for this dtype");
  }
}

inline std::string safetensors_bytes(const std::map<std::string, torch::Tensor>& tensors,
                                     const std::map<std::string, std::string>& metadata = {}) {
  auto header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::string data;
  for (const auto& [name, given] : tensors) {
    const auto tensor = given.contiguous();
    const auto begin = data.size();
    data.append(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    header[name] = {{"dtype", safetensors_dtype(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {begin, data.size()}}};
  }
  auto text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + text + data;
}

}  // namespace sag::test

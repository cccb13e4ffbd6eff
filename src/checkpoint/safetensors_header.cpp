#include "checkpoint/safetensors_header.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "checkpoint/json_text.h"

namespace sag {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

// Of the header's length, which comes first.
constexpr std::uint64_t kLengthBytes = 8;
// The format's own limit.
constexpr std::uint64_t kLongestHeader = 100'000'000;
// LibTorch's ops take no more.
constexpr std::size_t kMostDimensions = 64;

constexpr std::array<std::pair<std::string_view, torch::ScalarType>, 17> kDtypes = {{
    {"F64", torch::kDouble},
    {"F32", torch::kFloat},
    {"F16", torch::kHalf},
    {"BF16", torch::kBFloat16},
    {"F8_E4M3", torch::kFloat8_e4m3fn},
    {"F8_E5M2", torch::kFloat8_e5m2},
    {"F8_E8M0", torch::kFloat8_e8m0fnu},
    {"C64", torch::kComplexFloat},
    {"I64", torch::kLong},
    {"I32", torch::kInt},
    {"I16", torch::kShort},
    {"I8", torch::kChar},
    {"U64", torch::kUInt64},
    {"U32", torch::kUInt32},
    {"U16", torch::kUInt16},
    {"U8", torch::kByte},
    {"BOOL", torch::kBool},
}};

// Reads one entry of the header, or says what is wrong with it.
class EntryReader {
 public:
  EntryReader(const std::string& name, const json& entry, const std::string& path)
      : name_(name), entry_(entry), path_(path) {}

  SafetensorsEntry read() const {
    if (!entry_.is_object() || entry_.size() != 3 || !entry_.contains("dtype") ||
        !entry_.contains("shape") || !entry_.contains("data_offsets"))
      refuse("must have dtype, shape and data_offsets, and nothing else");
    SafetensorsEntry read{.info = {.dtype = dtype(), .sizes = sizes()}};
    const auto offsets = whole_numbers("data_offsets");
    if (offsets.size() != 2 || offsets[0] > offsets[1])
      refuse("must have two data_offsets, the first one not the larger");
    read.begin = offsets[0];
    read.end = offsets[1];
    if (bytes(read.info) != read.end - read.begin)
      refuse("must have as many bytes as its shape and dtype take");
    return read;
  }

 private:
  [[noreturn]] void refuse(const char* rule) const {
    refuse_safetensors(path_, c10::str("in which ", quoted_name(name_), " ", rule));
  }

  torch::ScalarType dtype() const {
    const auto& given = entry_["dtype"];
    if (!given.is_string()) refuse("must have the name of a dtype");
    const auto& text = given.get_ref<const std::string&>();
    const auto* found = std::find_if(kDtypes.begin(), kDtypes.end(),
                                     [&](const auto& dtype) { return dtype.first == text; });
    if (found == kDtypes.end())
      refuse_safetensors(path_, c10::str("in which ", quoted_name(name_), " has the dtype ",
                                         quoted_name(text), ", which is not read"));
    return found->second;
  }

  std::vector<std::uint64_t> whole_numbers(const char* key) const {
    const auto& given = entry_[key];
    const bool are = given.is_array() && given.size() <= kMostDimensions &&
                     std::all_of(given.begin(), given.end(),
                                 [](const json& value) { return value.is_number_unsigned(); });
    if (!are) refuse("must have a shape and data_offsets of whole numbers, at most 64");
    return given.get<std::vector<std::uint64_t>>();
  }

  std::vector<std::int64_t> sizes() const {
    const auto given = whole_numbers("shape");
    for (const auto size : given)
      if (size > INT64_MAX) refuse("must have a shape of 63-bit numbers");
    return {given.begin(), given.end()};
  }

  std::uint64_t bytes(const Safetensors::Info& info) const {
    // A 0 makes it empty, however large the rest is; the others still must be a size of LibTorch's.
    std::int64_t product = static_cast<std::int64_t>(c10::elementSize(info.dtype));
    bool is_empty = false;
    for (const auto size : info.sizes) {
      is_empty |= size == 0;
      if (__builtin_mul_overflow(product, std::max<std::int64_t>(size, 1), &product))
        refuse("must have a shape whose bytes can be counted");
    }
    return is_empty ? 0 : static_cast<std::uint64_t>(product);
  }

  const std::string& name_;
  const json& entry_;
  const std::string& path_;
};

std::map<std::string, std::string> read_metadata(const json& given, const std::string& path) {
  std::map<std::string, std::string> metadata;
  if (!given.is_object()) refuse_safetensors(path, "whose __metadata__ is not an object");
  for (const auto& [key, value] : given.items()) {
    if (!value.is_string())
      refuse_safetensors(path,
                         c10::str("in whose __metadata__ ", quoted_name(key), " is not a text"));
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

// Every byte after the header belongs to exactly one tensor.
void check_layout(const SafetensorsHeader& header, std::uint64_t data_bytes,
                  const std::string& path) {
  std::vector<const std::pair<const std::string, SafetensorsEntry>*> in_order;
  in_order.reserve(header.tensors.size());
  for (const auto& tensor : header.tensors) in_order.push_back(&tensor);
  std::sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::uint64_t end = 0;
  for (const auto* tensor : in_order) {
    const auto& [name, entry] = *tensor;
    if (entry.end > data_bytes)
      refuse_safetensors(
          path, c10::str("which is truncated: ", quoted_name(name), " ends at byte ", entry.end,
                         " of the data, of which there are ", data_bytes));
    if (entry.begin != end)
      refuse_safetensors(path, c10::str("in which ", quoted_name(name),
                                        entry.begin < end ? " shares bytes with another tensor"
                                                          : " comes after bytes of no tensor"));
    end = entry.end;
  }
  if (end != data_bytes) refuse_safetensors(path, "which has bytes of no tensor at its end");
}

constexpr const char* kPickle =
    "which is a pickle (.ckpt, .pt, .pth, .bin), and pickles are programs that run when they are "
    "read. In Python, safetensors.torch.save_file(tensors, \"new.safetensors\") makes a file that "
    "can be read of what torch.load(FILE, weights_only=True) returns; of a checkpoint's, the "
    "tensors are its [\"state_dict\"]";

// What a file that is none of this format is, if it can be told.
std::string what_it_is(std::string_view file) {
  if (file.starts_with("PK\x03\x04")) return kPickle;
  if (file.starts_with("GGUF"))
    return "which is a GGUF file: its quantized weights are not read here";
  if (file.starts_with("version https://git-lfs"))
    return "which is a pointer of Git LFS in place of the file: fetch it with git lfs pull";
  if (file.starts_with("\x80\x02") || file.starts_with("\x80\x03") || file.starts_with("\x80\x04"))
    return kPickle;
  return "which is not safetensors: it does not begin with a header";
}

}  // namespace

SafetensorsHeader read_safetensors_header(std::string_view file, const std::string& path) {
  if (file.empty()) refuse_safetensors(path, "which is empty");
  std::uint64_t length = 0;
  if (file.size() > kLengthBytes) std::memcpy(&length, file.data(), kLengthBytes);
  if (file.size() <= kLengthBytes || file[kLengthBytes] != '{')
    refuse_safetensors(path, what_it_is(file));
  if (length > kLongestHeader)
    refuse_safetensors(path, c10::str("whose header claims ", length, " bytes; at most ",
                                      kLongestHeader, " are read"));
  if (length > file.size() - kLengthBytes)
    refuse_safetensors(path, "which is truncated: it ends inside its header");

  SafetensorsHeader header{.data = kLengthBytes + length};
  const auto text = file.substr(kLengthBytes, length);
  read_json_entries(text, /*deepest=*/3, path, [&](const std::string& name, const json& value) {
    if (name == "__metadata__")
      header.metadata = read_metadata(value, path);
    else
      header.tensors.emplace(name, EntryReader(name, value, path).read());
  });
  check_layout(header, file.size() - header.data, path);
  return header;
}

}  // namespace sag

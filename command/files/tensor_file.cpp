#include "files/tensor_file.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include <caffe2/serialize/inline_container.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include "errors.h"
#include "files/pickle_check.h"
#include "sag/safetensors.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

namespace fs = std::filesystem;

struct Place {
  std::string file, key;
};

bool is_file(const std::string& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

// A name may hold colons itself: the whole text counts as a file if there is one.
Place parse_place(const std::string& option, const std::string& where) {
  if (is_file(where)) return {where, {}};
  for (auto colon = where.find(':'); colon != std::string::npos;
       colon = where.find(':', colon + 1)) {
    if (is_file(where.substr(0, colon))) return {where.substr(0, colon), where.substr(colon + 1)};
  }
  // What follows the last colon may be a key.
  const auto file = where.substr(0, where.rfind(':'));
  throw UsageError(
      fmt::format("{}: there is no file \"{}\"{}", option, file, suggestion_beside(file)));
}

std::string read_file(const std::string& option, const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    throw UsageError(fmt::format("{}: \"{}\" is a folder, not a file.", option, path));
  }
  std::ifstream stream(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  if (!stream.good() && !stream.eof()) {
    throw UsageError(fmt::format("{}: the file \"{}\" cannot be read.", option, path));
  }
  return bytes;
}

class Memory : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit Memory(const std::string& bytes) : bytes_(bytes) {}
  std::size_t size() const override { return bytes_.size(); }
  std::size_t read(std::uint64_t position, void* buffer, std::size_t count,
                   const char* /*what*/) const override {
    if (position >= bytes_.size()) return 0;
    return bytes_.copy(static_cast<char*>(buffer), count, position);
  }

 private:
  const std::string& bytes_;
};

// The command that brings a file into the form that is read: a tensor or a plain dict of tensors,
// in fp32, without what is neither tensor nor array. Python only runs what a file says if it must.
std::string how_to_save(const std::string& file, bool runs_code = false) {
  return fmt::format(
      "save its tensors again: python3 -c \"import sys, torch; d = torch.load(sys.argv[1], "
      "map_location='cpu'{1}); t = lambda v: torch.as_tensor(v).detach().float().clone(); "
      "torch.save({{k: t(v) for k, v in d.items() if hasattr(v, '__array__')}} if hasattr(d, "
      "'items') else t(d), sys.argv[2])\" \"{0}\" \"{0}.new\"{2}",
      file, runs_code ? ", weights_only=False" : "",
      runs_code ? ", if you trust it: this runs what the file says" : "");
}

// A safetensors file begins with the size of its header, which is JSON.
bool is_safetensors(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  char head[9] = {};
  stream.read(head, sizeof head);
  return stream.gcount() == sizeof head && head[8] == '{' &&
         std::string_view(head + 4, 4) == std::string_view("\0\0\0\0", 4);
}

// ComfyUI's files of latents hold the VAE's values, before the factor that the network's have.
[[noreturn]] void refuse_latent(const std::string& option, const std::string& file) {
  throw UsageError(fmt::format(
      "{0}: \"{1}\" is a latent that ComfyUI saved, without the network's factor; convert it: "
      "python3 -c \"import sys, torch; from safetensors.torch import load_file; d = "
      "load_file(sys.argv[1]); torch.save(d['latent_tensor'].float() * 0.18215, sys.argv[2])\" "
      "\"{1}\" \"{1}.pt\"; 0.18215 is Stable Diffusion 1's and 2's factor, SDXL's is 0.13025.",
      option, file));
}

// What a file is that is no zip archive.
[[noreturn]] void refuse_format(const std::string& option, const std::string& file,
                                std::string_view bytes) {
  if (bytes.empty()) throw UsageError(fmt::format("{}: \"{}\" is empty.", option, file));
  // What torch.save wrote before 1.6: a pickle of a magic number comes first.
  if (bytes.starts_with(
          std::string_view("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 14))) {
    throw UsageError(fmt::format("{}: \"{}\" has the format of torch before 1.6; {}.", option, file,
                                 how_to_save(file)));
  }
  throw UsageError(fmt::format(
      "{}: \"{}\" is neither a file of torch.save nor safetensors: give a tensor or a flat dict of "
      "tensors, saved by one of them.",
      option, file));
}

[[noreturn]] void refuse(const std::string& option, const std::string& file,
                         std::string_view bytes) {
  if (!bytes.starts_with("PK\x03\x04")) refuse_format(option, file, bytes);
  if (bytes.find("/constants.pkl") != std::string_view::npos) {
    throw UsageError(fmt::format("{}: \"{}\" is a TorchScript model, not tensors.", option, file));
  }
  std::string what =
      "is damaged, or holds something else than one tensor or a plain dict of tensors";
  bool runs_code = false;
  const auto holds = [bytes](std::string_view text) {
    return bytes.find(text) != std::string_view::npos;
  };
  if (holds("\x80\x02"
            "ccollections\nOrderedDict\n")) {
    what = "holds an OrderedDict, where only a plain dict is read";
  } else if (holds("numpy")) {
    what = "holds NumPy arrays, where only tensors are read";
    runs_code = true;
  } else if (holds("_rebuild_tensor_v3") || holds("Float8_")) {
    what = "holds tensors of a dtype that is not read, as 8-bit floating point numbers are";
  }
  throw UsageError(
      fmt::format("{}: \"{}\" {}; {}.", option, file, what, how_to_save(file, runs_code)));
}

// What a file holds, and how large the records are that its tensors' storages point to. A pickle
// says itself how large a tensor is; without looking at the records it could make us read any
// memory.
struct Archive {
  c10::IValue value;
  std::map<const void*, std::size_t> records;
};

Archive unpickle(const std::string& bytes) {
  Archive archive;
  caffe2::serialize::PyTorchStreamReader reader(std::make_shared<Memory>(bytes));
  const auto [pickle, pickle_size] = reader.getRecord("data.pkl");
  check_pickle({static_cast<const char*>(pickle.get()), pickle_size});
  std::size_t position = 0;
  const auto read = [&](char* buffer, std::size_t count) {
    const std::size_t given = std::min(count, pickle_size - position);
    std::copy_n(static_cast<const char*>(pickle.get()) + position, given, buffer);
    position += given;
    return given;
  };
  const auto read_record = [&](const std::string& name) {
    auto [data, size] = reader.getRecord("data/" + name);
    archive.records[data.get()] = size;
    return std::move(data);
  };
  // To the CPU, wherever the tensors were: torch::pickle_load would put them back there.
  torch::jit::Unpickler unpickler(read, nullptr, nullptr, read_record, torch::kCPU);
  archive.value = unpickler.parse_ivalue();
  return archive;
}

// Any mistake in a file surfaces as one of many exceptions, with a text that helps nobody.
std::optional<Archive> try_unpickle(const std::string& bytes) {
  try {
    return unpickle(bytes);
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// Whether every element lies inside the record that the tensor's storage was read from.
bool lies_in_its_record(const torch::Tensor& tensor, const Archive& archive) {
  if (tensor.numel() == 0) return true;
  const auto record = archive.records.find(tensor.storage().data());
  if (record == archive.records.end() || tensor.storage_offset() < 0) return false;
  const auto elements = static_cast<std::int64_t>(record->second / tensor.element_size());
  std::int64_t last = tensor.storage_offset();
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    std::int64_t reach = 0;
    if (tensor.size(d) < 1 || tensor.stride(d) < 0 ||
        __builtin_mul_overflow(tensor.size(d) - 1, tensor.stride(d), &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return false;
    }
  }
  return last < elements;
}

// `keys`: what the file has.
[[noreturn]] void refuse_key(const std::string& option, const Place& place,
                             std::vector<std::string> keys) {
  constexpr std::size_t kShown = 12;
  const std::string more = keys.size() > kShown ? " and others" : "";
  const auto hint = suggestion(place.key, keys);
  keys.resize(std::min(keys.size(), kShown));
  if (!place.key.empty()) {
    throw UsageError(fmt::format("{}: \"{}\" has no tensor \"{}\"; it has {}{}{}", option,
                                 place.file, place.key, fmt::join(keys, ", "), more, hint));
  }
  throw UsageError(
      fmt::format("{}: \"{}\" holds several; name one of its tensors as {}:KEY, KEY one of {}{}.",
                  option, place.file, place.file, fmt::join(keys, ", "), more));
}

torch::Tensor pick(const std::string& option, const Place& place, const c10::IValue& value) {
  if (value.isTensor()) {
    if (place.key.empty()) return value.toTensor();
    throw UsageError(fmt::format("{}: \"{}\" holds one tensor and no key \"{}\".", option,
                                 place.file, place.key));
  }
  if (!value.isGenericDict()) {
    throw UsageError(fmt::format("{}: \"{}\" must hold one tensor or a flat dict of tensors.",
                                 option, place.file));
  }
  std::vector<std::string> keys;
  for (const auto& entry : value.toGenericDict()) {
    if (!entry.key().isString() || !entry.value().isTensor()) continue;
    keys.push_back(entry.key().toStringRef());
    if (keys.back() == place.key) return entry.value().toTensor();
  }
  if (keys.empty()) {
    throw UsageError(fmt::format("{}: \"{}\" must hold one tensor or a flat dict of tensors.",
                                 option, place.file));
  }
  refuse_key(option, place, std::move(keys));
}

torch::Tensor read_safetensors(const std::string& option, const Place& place) {
  try {
    const auto file = sag::Safetensors::open(place.file);
    std::vector<std::string> keys;
    for (const auto& [name, info] : file.tensors()) keys.push_back(name);
    if (file.tensors().contains("latent_tensor")) refuse_latent(option, place.file);
    if (file.tensors().contains(place.key)) return file.tensor(place.key).clone();
    if (place.key.empty() && keys.size() == 1) return file.tensor(keys.front()).clone();
    refuse_key(option, place, std::move(keys));
  } catch (const c10::Error& error) {
    // Without the function's name in brackets.
    const std::string text = error.what_without_backtrace();
    throw UsageError(fmt::format("{}: {}", option, text.substr(text.find("] ") + 2)));
  }
}

}  // namespace

torch::Tensor read_tensor(const std::string& option, const std::string& where) {
  const Place place = parse_place(option, where);
  if (is_safetensors(place.file)) return read_safetensors(option, place);
  const std::string bytes = read_file(option, place.file);
  std::optional<Archive> archive;
  if (bytes.starts_with("PK\x03\x04")) archive = try_unpickle(bytes);
  if (!archive) refuse(option, place.file, bytes);
  const torch::Tensor tensor = pick(option, place, archive->value);
  if (!tensor.defined() || tensor.layout() != torch::kStrided || tensor.is_quantized()) {
    throw UsageError(fmt::format("{}: \"{}\" must hold a dense tensor.", option, where));
  }
  if (!lies_in_its_record(tensor, *archive)) refuse(option, place.file, bytes);
  return tensor.detach().contiguous();
}

std::string tensor_file_bytes(const torch::Tensor& tensor) {
  // A clone: the storage of a view would be saved whole.
  const auto bare = tensor.detach().to(torch::kCPU, torch::kFloat).contiguous().clone();
  const std::vector<char> bytes = torch::jit::pickle_save(bare);
  return {bytes.begin(), bytes.end()};
}

}  // namespace sag_sample

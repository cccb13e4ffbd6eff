#include "sag/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <string_view>
#include <utility>

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include "checkpoint/json_text.h"
#include "checkpoint/safetensors_header.h"

namespace sag {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// Pages of a file, as long as it lives.
struct Mapping {
  Mapping(void* begin, std::size_t size) : begin(begin), size(size) {}
  ~Mapping() { ::munmap(begin, size); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::string_view bytes() const { return {static_cast<const char*>(begin), size}; }

  void* begin;
  std::size_t size;
};

// A file in memory, and what its header says.
struct MappedFile {
  std::shared_ptr<const Mapping> pages = {};
  SafetensorsHeader header = {};

  std::string_view bytes_of(const SafetensorsEntry& entry) const {
    return pages->bytes().substr(header.data + entry.begin, entry.end - entry.begin);
  }
};

// What keeps an open file from being mapped, as the end of a sentence; null if nothing does.
const char* problem_with(int file, struct stat& status) {
  if (file < 0) return errno == ENOENT ? "which does not exist" : "which cannot be opened";
  if (::fstat(file, &status) != 0) return "which cannot be read";
  if (S_ISDIR(status.st_mode)) return "which is a directory";
  // A pipe or a device would be read for ever.
  if (!S_ISREG(status.st_mode)) return "which is not a file";
  return status.st_size == 0 ? "which is empty" : nullptr;
}

// The pages are private: writes to them do not reach the file. All questions go to one descriptor,
// so that no other file can take its place in between.
std::shared_ptr<const Mapping> map_file(const std::string& path) {
  // Without O_NONBLOCK a pipe would wait for its writer.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat status = {};
  if (const char* problem = problem_with(file, status)) {
    if (file >= 0) ::close(file);
    refuse_safetensors(path, problem);
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  void* bytes = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  ::close(file);
  if (bytes == MAP_FAILED) refuse_safetensors(path, "which cannot be mapped into memory");
  return std::make_shared<Mapping>(bytes, size);
}

MappedFile open_file(const std::string& path) {
  auto pages = map_file(path);
  auto header = read_safetensors_header(pages->bytes(), path);
  return {std::move(pages), std::move(header)};
}

}  // namespace

struct Safetensors::State {
  std::string path = {};
  std::vector<MappedFile> files = {};
  std::map<std::string, Info> tensors = {};
  std::map<std::string, std::string> metadata = {};
  // Name → which of the files.
  std::map<std::string, std::size_t> file_of = {};

  const MappedFile& file_with(const std::string& name) const {
    const auto found = file_of.find(name);
    TORCH_CHECK_VALUE(found != file_of.end(), "[Safetensors::tensor] \"", path,
                      "\" must hold the tensor that is asked for, got ", quoted_name(name), ".");
    return files[found->second];
  }

  // Throws ValueError when another file has a tensor of the same name.
  void add(MappedFile file) {
    for (const auto& [name, entry] : file.header.tensors) {
      const auto [place, is_new] = tensors.emplace(name, entry.info);
      if (!is_new) refuse_safetensors(path, "two of whose files have " + quoted_name(place->first));
      file_of[name] = files.size();
    }
    files.push_back(std::move(file));
  }
};

namespace {

// What an index says: tensor → the name of its file.
struct Index {
  std::map<std::string, std::string> file_of = {}, metadata = {};
};

Index read_index(const std::string& path) {
  const auto pages = map_file(path);
  Index index;
  bool has_map = false;
  read_json_entries(
      pages->bytes(), /*deepest=*/2, path, [&](const std::string& key, const json& value) {
        if (key == "metadata" && value.is_object()) {
          for (const auto& [name, note] : value.items())
            if (note.is_string() || note.is_number())
              index.metadata[name] = note.is_string() ? note.get<std::string>() : note.dump();
          return;
        }
        if (key != "weight_map" || !value.is_object())
          refuse_safetensors(path, "whose entry " + quoted_name(key) + " is unknown to an index");
        has_map = true;
        for (const auto& [name, file] : value.items()) {
          // A name with a folder in it could lead anywhere.
          if (!file.is_string() ||
              fs::path(file.get<std::string>()).filename() != file.get<std::string>())
            refuse_safetensors(path, "in which the file of " + quoted_name(name) +
                                         " is not the name of a file beside it");
          index.file_of[name] = file.get<std::string>();
        }
      });
  if (!has_map) refuse_safetensors(path, "which is an index without a weight_map");
  return index;
}

}  // namespace

Safetensors::Safetensors(std::shared_ptr<const State> state) : state_(std::move(state)) {}

Safetensors Safetensors::open(const std::string& path) {
  auto state = std::make_shared<State>();
  state->path = path;
  if (!path.ends_with(".json")) {
    auto file = open_file(path);
    state->metadata = file.header.metadata;
    state->add(std::move(file));
    return Safetensors(std::move(state));
  }

  auto index = read_index(path);
  state->metadata = std::move(index.metadata);
  std::map<std::string, std::size_t> files;
  for (const auto& [name, file] : index.file_of) files.emplace(file, 0);
  for (auto& [file, place] : files) {
    place = state->files.size();
    state->add(open_file((fs::path(path).parent_path() / file).string()));
  }
  for (const auto& [name, place] : state->file_of)
    if (!index.file_of.contains(name))
      refuse_safetensors(path, "which does not name " + quoted_name(name) + " of one of its files");
  for (const auto& [name, file] : index.file_of) {
    const auto found = state->file_of.find(name);
    if (found == state->file_of.end() || found->second != files.at(file))
      refuse_safetensors(path, c10::str("which names ", quoted_name(name), " of ",
                                        quoted_name(file), ", where it is not"));
  }
  return Safetensors(std::move(state));
}

const std::map<std::string, Safetensors::Info>& Safetensors::tensors() const {
  return state_->tensors;
}

const std::map<std::string, std::string>& Safetensors::metadata() const {
  return state_->metadata;
}

torch::Tensor Safetensors::tensor(const std::string& name) const {
  const auto& file = state_->file_with(name);
  const auto& entry = file.header.tensors.at(name);
  const auto options = torch::TensorOptions().dtype(entry.info.dtype).device(torch::kCPU);
  if (entry.begin == entry.end) return at::empty(entry.info.sizes, options);

  const auto bytes = file.bytes_of(entry);
  if (entry.info.dtype == torch::kBool)
    TORCH_CHECK_VALUE(bytes.find_first_not_of(std::string_view("\0\1", 2)) == bytes.npos,
                      "[Safetensors::tensor] bools must be 0 or 1, got another byte in ",
                      quoted_name(name), " of \"", state_->path, "\".");
  // LibTorch reads through a pointer to the dtype, so that must be aligned to it.
  const auto alignment = c10::elementSize(entry.info.dtype);
  if (reinterpret_cast<std::uintptr_t>(bytes.data()) % alignment != 0) {
    auto copy = at::empty(entry.info.sizes, options);
    bytes.copy(static_cast<char*>(copy.mutable_data_ptr()), bytes.size());
    return copy;
  }
  return at::from_blob(
      // The pages are private to this process, and may be written.
      const_cast<char*>(bytes.data()), entry.info.sizes,
      [pages = file.pages](void*) mutable { pages.reset(); }, options);
}

void Safetensors::forget(const std::string& name) const {
  const auto& file = state_->file_with(name);
  const auto bytes = file.bytes_of(file.header.tensors.at(name));
  // The pages that belong to this tensor alone.
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<std::uintptr_t>(bytes.data());
  const auto before = (page - start % page) % page, after = (start + bytes.size()) % page;
  if (before + after >= bytes.size()) return;
  // A system that does not want to may leave them. The pages are private, and may be written.
  ::madvise(const_cast<char*>(bytes.data() + before), bytes.size() - before - after, MADV_DONTNEED);
}

}  // namespace sag

#include "fuzz/read_input.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include "checkpoint/embedding.h"
#include "checkpoint/lora.h"
#include "checkpoint/safetensors_header.h"
#include "sag/safetensors.h"

namespace sag::test {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void give_up(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::abort();
}

// What a file is refused with; "" if it is not.
std::string refusal(const std::function<void()>& read) {
  try {
    read();
    return "";
  } catch (const c10::ValueError& error) {
    const std::string text = error.what_without_backtrace();
    if (text.empty() || text.find('\n') != text.npos) give_up("not one line: " + text);
    return text;
  }
  // Any other exception ends the process.
}

// A file without a disk, which always is what was written last.
class MemoryFile {
 public:
  MemoryFile() : file_(::memfd_create("input", 0)) {
    if (file_ < 0) give_up("there is no memfd_create");
  }
  ~MemoryFile() { ::close(file_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(file_); }
  void write(const std::string& bytes) const {
    const auto size = static_cast<off_t>(bytes.size());
    if (::ftruncate(file_, 0) != 0 || ::ftruncate(file_, size) != 0 ||
        ::pwrite(file_, bytes.data(), bytes.size(), 0) != size)
      give_up("cannot write the input");
  }

 private:
  int file_;
};

// The bytes alone in a block of their own, so that a sanitizer sees a read behind them; a mapped
// file goes on to the end of its page.
void read_header(const std::string& bytes) {
  const auto block = std::make_unique<char[]>(bytes.size());
  bytes.copy(block.get(), bytes.size());
  const auto header = read_safetensors_header({block.get(), bytes.size()}, "input");
  for (const auto& [name, entry] : header.tensors)
    if (entry.begin > entry.end || entry.end > bytes.size() - header.data)
      give_up("a tensor outside the file");
}

// Every byte of every tensor.
void read_tensors(const Safetensors& file, std::size_t most) {
  std::size_t total = 0;
  for (const auto& entry : file.tensors()) {
    const auto& info = entry.second;
    torch::Tensor tensor;
    if (!refusal([&] { tensor = file.tensor(entry.first); }).empty()) continue;
    if (tensor.sizes() != torch::IntArrayRef(info.sizes) || tensor.scalar_type() != info.dtype)
      give_up("a tensor that the header does not describe");
    total += tensor.nbytes();
    if (total > most) give_up("more bytes than the file has");
    const std::vector<char> copy(
        static_cast<const char*>(tensor.const_data_ptr()),
        static_cast<const char*>(tensor.const_data_ptr()) + tensor.nbytes());
  }
}

void read_lora(const std::string& path) {
  const LoraTarget target = {"unet", "mid_block.attentions.0.proj_in",
                             "model.diffusion_model.middle_block.1.proj_in"};
  const auto lora = Lora::open(path, 0.5);
  refusal([&] { lora.check_targets({target}); });
  const auto weight = at::ones({4, 3});
  const auto merged = lora.merged(target, weight);
  if (merged.sizes() != weight.sizes() || !merged.isfinite().all().item<bool>())
    give_up("a merged weight of another shape, or one that is not finite");
}

std::string read_file(const std::string& bytes) {
  static const MemoryFile file;
  file.write(bytes);
  const auto header = refusal([&] { read_header(bytes); });
  const auto whole = refusal([&] { read_tensors(Safetensors::open(file.path()), bytes.size()); });
  if (header.empty() != whole.empty()) give_up("the header and the file are judged differently");
  refusal([&] { read_lora(file.path()); });
  refusal([&] { read_embedding("a", file.path()); });
  return whole;
}

// Beside the index lie a.safetensors, with the tensor "a", and b.safetensors, with "b".
class IndexFolder {
 public:
  IndexFolder() : path_(fs::temp_directory_path() / ("sag_fuzz_" + std::to_string(::getpid()))) {
    fs::create_directories(path_);
    for (const std::string name : {"a", "b"}) {
      const auto header = R"({")" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
      std::string length(8, '\0');
      length[0] = static_cast<char>(header.size());
      write(name + ".safetensors", length + header + "x");
    }
  }
  ~IndexFolder() {
    for (const char* name : {"a.safetensors", "b.safetensors", "index.json"})
      fs::remove(path_ / name);
    fs::remove(path_);
  }
  IndexFolder(const IndexFolder&) = delete;
  IndexFolder& operator=(const IndexFolder&) = delete;

  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream stream(path_ / name, std::ios::binary);
    stream.exceptions(std::ios::failbit | std::ios::badbit);
    stream << bytes;
    return (path_ / name).string();
  }

 private:
  fs::path path_;
};

}  // namespace

std::string read_input(const std::string& bytes) {
  if (!bytes.starts_with('{')) return read_file(bytes);
  static const IndexFolder folder;
  const auto path = folder.write("index.json", bytes);
  return refusal([&] { read_tensors(Safetensors::open(path), 2); });
}

}  // namespace sag::test

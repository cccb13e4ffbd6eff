// The fuzzer of everything that reads a downloaded file. scripts/fuzz.sh builds and runs it.

#include <cstdint>
#include <cstring>
#include <string>

#include <c10/util/Logging.h>

#include "fuzz/read_input.h"

// Of libFuzzer.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

// Most inputs are refused, and a traceback for each would take most of the time.
extern "C" int LLVMFuzzerInitialize(int*, char***) {
  c10::SetStackTraceFetcher([] { return std::string(); });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  sag::test::read_input({reinterpret_cast<const char*>(data), size});
  return 0;
}

// A safetensors file begins with the length of its header, which must be right for anything behind
// it to be read. So mostly the header or the data change, and the length follows.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t most, unsigned int seed) {
  constexpr std::size_t kLengthBytes = 8;
  std::uint64_t length = 0;
  if (size >= kLengthBytes) std::memcpy(&length, data, kLengthBytes);
  const bool is_whole = size >= kLengthBytes && length <= size - kLengthBytes;
  if (!is_whole || seed % 8 == 0) return LLVMFuzzerMutate(data, size, most);

  std::string header(reinterpret_cast<char*>(data) + kLengthBytes, length);
  std::string rest(reinterpret_cast<char*>(data) + kLengthBytes + length,
                   size - kLengthBytes - length);
  auto& part = seed % 8 == 1 ? rest : header;
  const auto old = part.size();
  part.resize(old + most - size);
  part.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(part.data()), old, part.size()));
  length = header.size();
  std::memcpy(data, &length, kLengthBytes);
  header.copy(reinterpret_cast<char*>(data) + kLengthBytes, header.size());
  rest.copy(reinterpret_cast<char*>(data) + kLengthBytes + header.size(), rest.size());
  return kLengthBytes + header.size() + rest.size();
}

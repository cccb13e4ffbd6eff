#pragma once

// Reads the reference runs in tests/golden.

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <torch/script.h>
#include <torch/torch.h>

namespace sag::test {

inline std::string golden_dir() {
  return SAG_TEST_DATA_DIR;
}

/// The tensors of one file, on a device.
class Golden {
 public:
  Golden(const std::string& file, torch::Device device) : device_(device) {
    std::ifstream stream(golden_dir() + "/" + file, std::ios::binary);
    TORCH_CHECK(stream, "cannot read ", file);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), {});
    dict_ = std::make_unique<c10::impl::GenericDict>(torch::pickle_load(bytes).toGenericDict());
  }
  /// Returns a tensor, or an undefined one if there is none.
  torch::Tensor get(const std::string& key) const {
    return dict_->contains(key) ? dict_->at(key).toTensor().to(device_) : torch::Tensor();
  }
  /// Returns a tensor of numbers as doubles.
  std::vector<double> numbers(const std::string& key) const {
    const auto values = get(key).cpu().to(torch::kDouble).contiguous();
    return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
  }

 private:
  torch::Device device_;
  std::unique_ptr<c10::impl::GenericDict> dict_;
};

}  // namespace sag::test

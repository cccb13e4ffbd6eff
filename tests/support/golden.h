#pragma once

// Reads the reference runs in tests/golden.

#include <memory>
#include <string>
#include <vector>

#include <torch/script.h>
#include <torch/torch.h>

#include "support/files.h"

namespace sag::test {

/// The tensors of one file, on a device.
class Golden {
 public:
  Golden(const std::string& file, torch::Device device) : device_(device) {
    const auto bytes = read_bytes(kGoldenDir + file);
    dict_ = std::make_unique<c10::impl::GenericDict>(
        torch::pickle_load({bytes.begin(), bytes.end()}).toGenericDict());
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

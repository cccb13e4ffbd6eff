#pragma once

#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include <torch/types.h>

#include "package.h"

namespace sag {

/// By their names in the module that was exported.
using PackageWeights = std::unordered_map<std::string, torch::Tensor>;

/// Reads weights.pt. Throws ValueError when the file does not hold what a package lists.
PackageWeights read_weights_file(const std::string& path, const std::vector<PackageInfo>& packages,
                                 torch::Device device);

/// Calls each function and brings its tensor into the form that the packages list, on `device`: as
/// it is if it has that form, else copied. Throws ValueError, in one sentence, for packages that
/// hold weights of their own, for weights that are missing or left over, and for tensors of other
/// sizes or kinds or that are not finite in the packages' dtype.
PackageWeights convert_weights(const std::map<std::string, std::function<torch::Tensor()>>& weights,
                               const std::vector<PackageInfo>& packages, torch::Device device);

}  // namespace sag

#include "package_weights.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import_read.h>

#include "alignment.h"
#include "file_problem.h"
#include "module_conversion.h"
#include "plain_message.h"

namespace sag {
namespace {

using GivenWeights = std::map<std::string, std::function<torch::Tensor()>>;

// A weight, and the first package that lists it.
struct Listed {
  const PackageWeight* form;
  const PackageInfo* package;
};

PackageWeights read_dict(const std::string& path, torch::Device device) {
  const auto refuse = [&](const std::string& what) {
    TORCH_CHECK_VALUE(false,
                      "[AotiUNet::load] packages that were compiled without their weights need the "
                      "file weights.pt next to them, a plain dict of tensors, got \"",
                      path, "\", ", what);
  };
  if (const auto problem = zip_problem(path); !problem.empty()) refuse(problem);
  c10::IValue value;
  try {
    caffe2::serialize::PyTorchStreamReader reader(path);
    value = torch::jit::readArchiveAndTensors("data", "", "", {}, {}, device, reader);
  } catch (const std::exception& error) {
    const auto message = plain_message(error);
    if (message.find("INTERNAL ASSERT") != std::string::npos)
      refuse("which holds something else: save dict(module.state_dict()).");
    refuse("which cannot be read: " + message);
  }
  if (!value.isGenericDict()) refuse("which holds something else.");
  PackageWeights weights;
  for (const auto& entry : value.toGenericDict())
    if (entry.key().isString() && entry.value().isTensor())
      weights.emplace(entry.key().toStringRef(), entry.value().toTensor().resolve_neg());
  return weights;
}

// All weights that the packages list. One form serves all of them.
std::map<std::string, Listed> listed_weights(const std::vector<PackageInfo>& packages) {
  std::map<std::string, Listed> listed;
  for (const auto& package : packages) {
    TORCH_CHECK_VALUE(!package.weights.empty(),
                      "[AotiUNet::load] weights are for packages that were compiled without "
                      "theirs, but \"",
                      package.path, "\" holds its own.");
    for (const auto& [name, form] : package.weights) {
      const auto& first = listed.emplace(name, Listed{&form, &package}).first->second;
      TORCH_CHECK_VALUE(
          *first.form == form, "[AotiUNet::load] the packages of a folder must want \"", name,
          "\" in one form (dtype, sizes, strides), but \"", package.path, "\" wants ", form.text(),
          " and \"", first.package->path, "\" ", first.form->text(), ".");
    }
  }
  return listed;
}

void check_names(const GivenWeights& weights, const std::map<std::string, Listed>& listed) {
  // The first name of `keys` that `others` lacks, and how many there are.
  const auto lacking = [](const auto& keys, const auto& others) {
    std::pair<std::string, std::size_t> found;
    for (const auto& [name, value] : keys)
      if (!others.contains(name) && found.second++ == 0) found.first = name;
    return found;
  };
  const auto& path = listed.begin()->second.package->path;
  const auto [missing, missing_count] = lacking(listed, weights);
  TORCH_CHECK_VALUE(missing_count == 0, "[AotiUNet::load] weights must hold all ", listed.size(),
                    " that \"", path, "\" needs, but ", missing_count,
                    " are missing, the first of them \"", missing, "\".");
  const auto [extra, extra_count] = lacking(weights, listed);
  TORCH_CHECK_VALUE(extra_count == 0, "[AotiUNet::load] weights must be those that \"", path,
                    "\" needs, got ", extra_count, " others, the first of them \"", extra, "\".");
}

// Its elements fill the memory that it spans, each in a place of its own.
bool is_dense(const PackageWeight& form) {
  std::vector<std::pair<std::int64_t, std::int64_t>> sides;
  for (std::size_t i = 0; i < form.sizes.size(); ++i)
    if (form.sizes[i] != 1) sides.emplace_back(form.strides[i], form.sizes[i]);
  std::sort(sides.begin(), sides.end());
  std::int64_t next = 1;
  for (const auto& [stride, size] : sides) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

void check_given(const std::string& name, const torch::Tensor& t, const Listed& wanted,
                 torch::Device device) {
  const auto& [form, package] = wanted;
  const bool is_tensor = t.defined() && t.layout() == torch::kStrided;
  const auto got = [&] {
    return is_tensor ? weight_form(t).text() : std::string("no dense tensor");
  };
  const bool fits = is_tensor && t.sizes() == c10::IntArrayRef(form->sizes) &&
                    (t.scalar_type() == form->dtype ||
                     (t.is_floating_point() && c10::isFloatingType(form->dtype)));
  TORCH_CHECK_VALUE(fits, "[AotiUNet::load] weights must hold \"", name, "\" as \"", package->path,
                    "\" was compiled for (dtype, sizes, strides), ", form->text(), ", got ", got(),
                    "; only the floating dtype and the strides may differ.");
  TORCH_CHECK_VALUE(t.device().is_cpu() || t.device() == device,
                    "[AotiUNet::load] weights must be ", "on the CPU or on ", device, ", got \"",
                    name, "\" on ", t.device(), ".");
  TORCH_CHECK_VALUE(is_dense(*form), "[AotiUNet::load] \"", package->path,
                    "\" must list weights whose elements follow each other, got \"", name, "\" as ",
                    form->text(), ".");
}

// First to the device, and there into the form: what comes from a file is read once, and the CPU
// holds no copy of it.
torch::Tensor converted(const torch::Tensor& given, const PackageWeight& form,
                        torch::Device device) {
  const auto t = given.detach().resolve_conj().resolve_neg().to(device);
  if (weight_form(t) == form && is_aligned(t)) return t;
  auto copy = at::empty_strided(form.sizes, form.strides, t.options().dtype(form.dtype));
  copy.copy_(t);
  return copy;
}

}  // namespace

PackageWeights read_weights_file(const std::string& path, const std::vector<PackageInfo>& packages,
                                 torch::Device device) {
  auto weights = read_dict(path, device);
  for (const auto& package : packages)
    for (const auto& [name, wanted] : package.weights) {
      const auto found = weights.find(name);
      TORCH_CHECK_VALUE(found != weights.end(), "[AotiUNet::load] weights.pt must hold \"", name,
                        "\", which \"", package.path, "\" needs.");
      const auto given = weight_form(found->second);
      TORCH_CHECK_VALUE(given == wanted, "[AotiUNet::load] weights.pt must hold \"", name,
                        "\" as \"", package.path, "\" was compiled for (dtype, sizes, strides), ",
                        wanted.text(), ", got ", given.text(), ".");
    }
  return weights;
}

PackageWeights convert_weights(const GivenWeights& weights,
                               const std::vector<PackageInfo>& packages, torch::Device device) {
  const auto listed = listed_weights(packages);
  check_names(weights, listed);
  PackageWeights converted_weights;
  std::vector<std::string> names;
  std::vector<torch::Tensor> finite;
  for (const auto& [name, give] : weights) {
    const auto& wanted = listed.at(name);
    const auto given = give();
    check_given(name, given, wanted, device);
    auto t = converted(given, *wanted.form, device);
    names.push_back(name);
    finite.push_back(t.isfinite().all());
    converted_weights.emplace(name, std::move(t));
  }
  // Waits for all copies, too: another stream may read the weights next.
  check_finite(names, finite, "the dtype that the packages were compiled for", "AotiUNet::load");
  return converted_weights;
}

}  // namespace sag

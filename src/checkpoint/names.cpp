#include "checkpoint/names.h"

#include <algorithm>
#include <set>
#include <string_view>

#include <ATen/Tensor.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <nlohmann/json.hpp>

#include "checkpoint/json_text.h"

namespace sag {
namespace {

using nlohmann::json;
using Shape = std::vector<std::int64_t>;

constexpr const char* kRecord = "extra/names.json";

StoredTensor read_tensor(const json& value) {
  StoredTensor tensor = {.key = value.at("key").get<std::string>(),
                         .transposed = value.value("transposed", false)};
  if (value.contains("rows"))
    tensor.rows = value.at("rows").get<std::pair<std::int64_t, std::int64_t>>();
  return tensor;
}

StoredParameter read_parameter(const json& value) {
  StoredParameter parameter = {.tensors = {read_tensor(value)},
                               .shape = value.at("shape").get<Shape>(),
                               .free = value.value("free", Shape{})};
  for (const auto& other : value.value("also", json::array()))
    parameter.tensors.push_back(read_tensor(other));
  return parameter;
}

SkeletonNames read_names(const json& root) {
  SkeletonNames names;
  for (const auto& [name, value] : root.at("parameters").items())
    names.parameters.emplace(name, read_parameter(value));
  names.unneeded = root.value("unneeded", names.unneeded);
  names.spellings = root.value("spellings", names.spellings);
  return names;
}

// Trailing sides of 1 do not count: [512, 512] is a linear layer, [512, 512, 1, 1] the same as a
// convolution.
Shape without_trailing_ones(Shape shape) {
  while (shape.size() > 1 && shape.back() == 1) shape.pop_back();
  return shape;
}

// The parameter's shape, with what the tensor decides.
Shape final_shape(const StoredParameter& parameter, const Shape& tensor) {
  auto shape = parameter.shape;
  for (const auto dim : parameter.free)
    if (dim >= 0 && dim < static_cast<std::int64_t>(std::min(shape.size(), tensor.size())))
      shape[dim] = tensor[dim];
  return shape;
}

// What of a tensor of this shape is the parameter's.
Shape taken(const StoredTensor& stored, Shape shape) {
  if (stored.transposed && shape.size() == 2) std::swap(shape[0], shape[1]);
  if (stored.rows && !shape.empty() && stored.rows->second <= shape[0])
    shape[0] = stored.rows->second - stored.rows->first;
  return shape;
}

bool fits(const StoredParameter& parameter, const StoredTensor& stored, const Shape& shape) {
  return without_trailing_ones(taken(stored, shape)) ==
         without_trailing_ones(final_shape(parameter, shape));
}

// The first few names, and how many more there are.
std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t kMost = 3;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kMost); ++i)
    text += (i > 0 ? ", " : "") + quoted_name(names[i]);
  if (names.size() > kMost) text += c10::str(" and ", names.size() - kMost, " more");
  return text;
}

// The pattern that says that nobody needs a tensor; null: none does.
const std::string* pattern_for(const std::string& name, const std::vector<std::string>& unneeded) {
  for (const auto& pattern : unneeded) {
    const std::string_view begin(pattern.data(), pattern.size() - (pattern.ends_with('*') ? 1 : 0));
    if (pattern.ends_with('*') ? name.starts_with(begin) : name == pattern) return &pattern;
  }
  return nullptr;
}

}  // namespace

void refuse_checkpoint(const NamedFile& from, const std::string& problem) {
  C10_THROW_ERROR(ValueError, c10::str("[Checkpoint::open] ", from.argument, " must name ",
                                       from.what, ", got \"", from.path, "\", ", problem, "."));
}

SkeletonNames read_skeleton_names(const std::string& archive) {
  std::string problem;
  try {
    caffe2::serialize::PyTorchStreamReader reader(archive);
    if (reader.hasRecord(kRecord)) {
      const auto [bytes, size] = reader.getRecord(kRecord);
      const auto* text = static_cast<const char*>(bytes.get());
      return read_names(json::parse(text, text + size));
    }
    problem = "which has no names.json";
  } catch (const json::exception& error) {
    problem = c10::str("whose names.json is damaged (", error.what(), ")");
  } catch (const c10::Error&) {
    problem = "which cannot be read";
  }
  C10_THROW_ERROR(
      ValueError,
      c10::str("[Checkpoint::open] a skeleton's archive must say in its names.json what "
               "checkpoints call its parameters, got \"",
               archive, "\", ", problem, "."));
}

StoredNetwork::StoredNetwork(SkeletonNames names, Safetensors file, const NamedFile& from)
    : names_(std::move(names)), file_(std::move(file)) {
  find(from);
  check_shapes(from);
}

std::optional<StoredTensor> StoredNetwork::look_for(const StoredParameter& parameter) const {
  const auto& tensors = file_.tensors();
  for (auto tensor : parameter.tensors) {
    if (tensors.contains(tensor.key)) return tensor;
    for (const auto& [usual, other] : names_.spellings) {
      const auto spelled = other + tensor.key.substr(std::min(usual.size(), tensor.key.size()));
      if (!tensor.key.starts_with(usual) || !tensors.contains(spelled)) continue;
      tensor.key = spelled;
      return tensor;
    }
  }
  return std::nullopt;
}

void StoredNetwork::find(const NamedFile& from) {
  std::set<std::string> missing;
  for (const auto& [name, parameter] : names_.parameters) {
    if (auto tensor = look_for(parameter))
      found_[name] = std::move(*tensor);
    else
      missing.insert(parameter.tensors.front().key);
  }
  if (is_there() && !missing.empty())
    refuse_checkpoint(
        from, c10::str("in which ", missing.size(),
                       missing.size() == 1 ? " tensor is missing: " : " tensors are missing: ",
                       listed({missing.begin(), missing.end()})));
}

void StoredNetwork::check_shapes(const NamedFile& from) {
  std::map<torch::ScalarType, std::int64_t> of_dtype;
  // How many rows of a tensor the parameters take.
  std::map<std::string, std::int64_t> rows;
  for (const auto& [name, stored] : found_) {
    const auto& parameter = names_.parameters.at(name);
    const auto& info = file_.tensors().at(stored.key);
    if (!fits(parameter, stored, info.sizes))
      refuse_checkpoint(
          from, c10::str("in which ", quoted_name(stored.key), " has the shape ",
                         c10::IntArrayRef(info.sizes), " in place of ",
                         stored.rows ? "some rows of " : "", c10::IntArrayRef(parameter.shape)));
    if (!c10::isFloatingType(info.dtype))
      refuse_checkpoint(
          from, c10::str("in which ", quoted_name(stored.key), " is ", c10::toString(info.dtype),
                         ": quantized weights are not read"));
    if (stored.rows) rows[stored.key] = std::max(rows[stored.key], stored.rows->second);
    const auto count = c10::multiply_integers(taken(stored, info.sizes));
    of_dtype[info.dtype] += count;
    elements_ += count;
  }
  for (const auto& [key, count] : rows)
    if (const auto& sizes = file_.tensors().at(key).sizes; sizes[0] != count)
      refuse_checkpoint(from, c10::str("in which ", quoted_name(key), " has ", sizes[0],
                                       " rows in place of ", count));
  const auto most = std::max_element(of_dtype.begin(), of_dtype.end(),
                                     [](auto& a, auto& b) { return a.second < b.second; });
  if (most != of_dtype.end()) dtype_ = most->first;
}

const StoredTensor& StoredNetwork::stored(const std::string& parameter) const {
  const auto found = found_.find(parameter);
  TORCH_CHECK_VALUE(
      found != found_.end(),
      "[Checkpoint::load] a skeleton's names.json must say what checkpoints call every "
      "parameter of its archive, got nothing for \"",
      parameter, "\".");
  return found->second;
}

torch::Tensor StoredNetwork::value(const std::string& parameter) const {
  const auto& [key, rows, transposed] = stored(parameter);
  auto tensor = file_.tensor(key);
  const auto shape = final_shape(names_.parameters.at(parameter), tensor.sizes().vec());
  if (transposed) tensor = tensor.t();
  if (rows) tensor = tensor.narrow(0, rows->first, rows->second - rows->first);
  return tensor.reshape(shape).contiguous();
}

std::map<std::string, std::int64_t> check_all_used(
    const Safetensors& file, const std::vector<const StoredNetwork*>& networks,
    const NamedFile& from, std::vector<std::string> unneeded) {
  std::set<std::string> used;
  std::vector<std::string> unknown;
  for (const auto* network : networks) {
    const auto& names = network->names();
    unneeded.insert(unneeded.end(), names.unneeded.begin(), names.unneeded.end());
    if (!network->is_there()) continue;
    for (const auto& parameter : names.parameters)
      used.insert(network->stored(parameter.first).key);
  }
  std::map<std::string, std::int64_t> skipped;
  for (const auto& [name, info] : file.tensors()) {
    if (used.contains(name)) continue;
    if (const auto* pattern = pattern_for(name, unneeded))
      ++skipped[*pattern];
    else
      unknown.push_back(name);
  }
  if (!unknown.empty())
    refuse_checkpoint(
        from, c10::str("which has ", unknown.size(), unknown.size() == 1 ? " tensor" : " tensors",
                       " that nothing is known about: ", listed(unknown)));
  return skipped;
}

}  // namespace sag

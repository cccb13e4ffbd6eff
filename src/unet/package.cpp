#include "package.h"

#include <sys/utsname.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <iterator>
#include <sstream>
#include <unordered_map>

#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include "file_problem.h"
#include "plain_message.h"
#include "site_names.h"

namespace sag {
namespace {

using Metadata = std::unordered_map<std::string, std::string>;

constexpr const char* kHowToExport = "sag-export --format aoti writes packages";

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  C10_THROW_ERROR(ValueError,
                  c10::str("[AotiUNet::load] path must name a compiled UNet (.pt2), got \"", path,
                           "\", ", what));
}

// What keeps the loader from finding a compiled model in a zip archive, or nothing.
std::string content_problem(const std::string& path) {
  try {
    caffe2::serialize::PyTorchStreamReader reader(path);
    const auto records = reader.getAllRecords();
    const auto has = [&](const std::string& begin, const std::string& end) {
      return std::any_of(records.begin(), records.end(), [&](const auto& record) {
        return record.starts_with(begin) && record.ends_with(end);
      });
    };
    if (has("data/aotinductor/model/", "wrapper_metadata.json")) return "";
    if (has("constants.pkl", "")) return "which is a TorchScript archive (see TorchScriptUNet).";
    if (has("data.pkl", "")) return "which holds tensors but no code (a file of torch.save).";
    if (has("models/", ".json") || has("serialized_exported_program.json", ""))
      return c10::str("which is an exported program that is not compiled: ", kHowToExport, ".");
    return c10::str("which holds no compiled model called \"model\": ", kHowToExport, ".");
  } catch (const std::exception& error) {
    return read_problem(error);
  }
}

const std::string& value_of(const Metadata& metadata, const std::string& key,
                            const std::string& path) {
  const auto found = metadata.find(key);
  if (found == metadata.end())
    refuse(path, c10::str("whose metadata has no \"", key, "\": it is damaged."));
  return found->second;
}

// The lines of a value, split at spaces.
std::vector<std::vector<std::string>> lines_of(const Metadata& metadata, const std::string& key,
                                               const std::string& path) {
  std::vector<std::vector<std::string>> lines;
  std::istringstream text(value_of(metadata, key, path));
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line);
    lines.emplace_back(std::istream_iterator<std::string>(words),
                       std::istream_iterator<std::string>());
  }
  return lines;
}

std::int64_t number(const std::string& text, const std::string& path) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0)
    refuse(path,
           c10::str("whose metadata has \"", text, "\" in place of a number: it is damaged."));
  return value;
}

// "77", "1-8" or "8-128/8".
PackageDim parse_dim(const std::string& text, const std::string& path) {
  const auto slash = text.find('/');
  const auto range = text.substr(0, slash);
  const auto dash = range.find('-');
  PackageDim dim;
  dim.low = number(range.substr(0, dash), path);
  dim.high = dash == std::string::npos ? dim.low : number(range.substr(dash + 1), path);
  if (slash != std::string::npos) dim.multiple = number(text.substr(slash + 1), path);
  if (dim.multiple < 1) refuse(path, "whose metadata has a multiple of 0: it is damaged.");
  return dim;
}

const std::vector<std::pair<std::string, torch::ScalarType>>& dtypes() {
  static const std::vector<std::pair<std::string, torch::ScalarType>> known = {
      {"float32", torch::kFloat},  {"float16", torch::kHalf}, {"bfloat16", torch::kBFloat16},
      {"float64", torch::kDouble}, {"int64", torch::kLong},   {"int32", torch::kInt},
      {"int16", torch::kShort},    {"int8", torch::kChar},    {"uint8", torch::kByte},
      {"bool", torch::kBool}};
  return known;
}

// Null: there is none of that name.
const torch::ScalarType* find_dtype(const std::string& name) {
  const auto found = std::find_if(dtypes().begin(), dtypes().end(),
                                  [&](const auto& known) { return known.first == name; });
  return found == dtypes().end() ? nullptr : &found->second;
}

std::vector<PackageInput> read_inputs(const Metadata& metadata, const std::string& path) {
  std::vector<PackageInput> inputs;
  for (const auto& line : lines_of(metadata, "sag.inputs", path)) {
    const auto* dtype = line.size() > 2 ? find_dtype(line[1]) : nullptr;
    if (dtype == nullptr) refuse(path, "whose metadata lists inputs that make no sense.");
    PackageInput input{line[0], *dtype, {}};
    for (std::size_t i = 2; i < line.size(); ++i) input.dims.push_back(parse_dim(line[i], path));
    inputs.push_back(std::move(input));
  }
  const bool fits = inputs.size() > 1 && inputs[0].name == "x" && inputs[0].dims.size() == 4 &&
                    inputs[1].name == "timesteps" && inputs[1].dims.size() == 1;
  if (!fits) refuse(path, "whose forward does not take x and timesteps first.");
  return inputs;
}

std::vector<AttentionSiteInfo> read_sites(const Metadata& metadata, const std::string& path) {
  std::vector<AttentionSiteInfo> sites;
  for (const auto& line : lines_of(metadata, "sag.sites", path)) {
    if (line.size() != 2) refuse(path, "whose metadata lists sites that make no sense.");
    sites.push_back(make_site(line[1], number(line[0], path)));
  }
  return sites;
}

// Packages before 2026-11-27 do not have the list.
std::vector<AttentionSiteInfo> read_cross_sites(const Metadata& metadata, const std::string& path) {
  std::vector<AttentionSiteInfo> sites;
  if (!metadata.contains("sag.cross_sites")) return sites;
  for (const auto& line : lines_of(metadata, "sag.cross_sites", path)) {
    if (line.size() != 2 || !line[1].ends_with(".attn2"))
      refuse(path, "whose metadata lists cross-attentions that make no sense.");
    sites.push_back(make_cross_site(line[1], number(line[0], path)));
  }
  return sites;
}

// "320,4,3,3".
std::vector<std::int64_t> parse_numbers(const std::string& text, const std::string& path) {
  std::vector<std::int64_t> numbers;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) numbers.push_back(number(part, path));
  return numbers;
}

std::map<std::string, PackageWeight> read_weights(const Metadata& metadata,
                                                  const std::string& path) {
  std::map<std::string, PackageWeight> weights;
  for (const auto& line : lines_of(metadata, "sag.weights", path)) {
    PackageWeight weight;
    // A tensor of no dimensions has neither sizes nor strides.
    const bool is_scalar = line.size() == 2;
    if (line.size() == 4) {
      weight.sizes = parse_numbers(line[2], path);
      weight.strides = parse_numbers(line[3], path);
    }
    const auto* dtype = is_scalar || line.size() == 4 ? find_dtype(line[1]) : nullptr;
    if (dtype == nullptr || weight.sizes.size() != weight.strides.size())
      refuse(path, "whose metadata lists weights that make no sense.");
    weight.dtype = *dtype;
    weights.emplace(line[0], std::move(weight));
  }
  return weights;
}

std::string read_skeleton(const Metadata& metadata) {
  const auto found = metadata.find("sag.skeleton");
  return found == metadata.end() ? "" : found->second;
}

void check_format(const Metadata& metadata, const std::string& path) {
  const auto format = metadata.find("sag.format");
  if (format == metadata.end())
    refuse(path, c10::str("which was not written by sag's exporter: ", kHowToExport,
                          " that say what they take."));
  if (format->second != "1")
    refuse(path, c10::str("which has format ", format->second, ", but only format 1 can be read."));
}

// Compiled code may not work with another minor version of LibTorch.
void check_torch(const Metadata& metadata, const std::string& path) {
  const auto compiled = value_of(metadata, "sag.torch", path);
  const auto minor = [](const std::string& version) {
    return version.substr(0, version.find('.', version.find('.') + 1));
  };
  if (minor(compiled) != minor(TORCH_VERSION))
    refuse(path, c10::str("which was compiled by PyTorch ", compiled, ", but this is LibTorch ",
                          TORCH_VERSION, ": export it with that version."));
}

bool cpu_has([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "AVX2") return __builtin_cpu_supports("avx2");
  if (isa == "AVX512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "AVX512_VNNI") return __builtin_cpu_supports("avx512vnni");
  if (isa == "AMX_TILE") return __builtin_cpu_supports("amx-tile");
  return false;
#else
  return true;
#endif
}

// The code is for the exporter's CPU: elsewhere an instruction may be unknown, which ends the
// process.
void check_machine(const Metadata& metadata, const std::string& path) {
  utsname machine = {};
  const auto compiled = metadata.find("AOTI_MACHINE");
  if (compiled != metadata.end() && uname(&machine) == 0 && compiled->second != machine.machine)
    refuse(path, c10::str("which was compiled for ", compiled->second, ", but this is a ",
                          machine.machine, "."));
  const auto isa = metadata.find("AOTI_CPU_ISA");
  std::istringstream extensions(isa == metadata.end() ? "" : isa->second);
  for (std::string extension; extensions >> extension;)
    if (!cpu_has(extension))
      refuse(path, c10::str("which was compiled for CPUs with ", extension,
                            ", which this CPU does not have: export it on such a machine."));
}

torch::DeviceType read_device(const Metadata& metadata, const std::string& path) {
  const auto device = value_of(metadata, "sag.device", path);
  if (device != "cpu" && device != "cuda")
    refuse(path, c10::str("which was compiled for ", device, ", but only cpu and cuda are known."));
  return device == "cpu" ? torch::kCPU : torch::kCUDA;
}

std::string text_of(const PackageDim& dim) {
  if (dim.low == dim.high) return std::to_string(dim.low);
  const auto steps = dim.multiple > 1 ? c10::str(" in steps of ", dim.multiple) : "";
  return c10::str(dim.low, "-", dim.high, steps);
}

}  // namespace

bool PackageInput::takes(const torch::Tensor& t) const {
  return std::equal(dims.begin(), dims.end(), t.sizes().begin(), t.sizes().end(),
                    [](const PackageDim& dim, std::int64_t size) { return dim.takes(size); });
}

std::string PackageInfo::list_inputs() const {
  std::string text;
  for (const auto& input : inputs) {
    std::string dims;
    for (const auto& dim : input.dims) dims += (dims.empty() ? "" : ", ") + text_of(dim);
    text += c10::str(text.empty() ? "" : ", ", input.name, " [", dims, "]");
  }
  return text;
}

std::size_t PackageInfo::free_dims() const {
  std::size_t count = 0;
  for (const auto& input : inputs)
    for (const auto& dim : input.dims) count += dim.low != dim.high ? 1 : 0;
  return count;
}

PackageInfo read_package(const std::string& path) {
  auto problem = zip_problem(path);
  if (problem.empty()) problem = content_problem(path);
  if (!problem.empty()) refuse(path, problem);
  Metadata metadata;
  try {
    metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
  } catch (const std::exception& error) {
    refuse(path, "whose metadata cannot be read: " + plain_message(error));
  }
  check_format(metadata, path);
  check_torch(metadata, path);
  check_machine(metadata, path);
  const auto device = read_device(metadata, path);
  return {.path = path,
          .device = device,
          .model = value_of(metadata, "sag.model", path),
          .skeleton = read_skeleton(metadata),
          .gpu = device == torch::kCUDA ? value_of(metadata, "sag.gpu", path) : "",
          .inputs = read_inputs(metadata, path),
          .sites = read_sites(metadata, path),
          .cross_sites = read_cross_sites(metadata, path),
          .weights = read_weights(metadata, path)};
}

PackageWeight weight_form(const torch::Tensor& t) {
  return {.dtype = t.scalar_type(), .sizes = t.sizes().vec(), .strides = t.strides().vec()};
}

std::string PackageWeight::text() const {
  const auto known = std::find_if(dtypes().begin(), dtypes().end(),
                                  [&](const auto& entry) { return entry.second == dtype; });
  std::string text = known != dtypes().end() ? known->first : c10::toString(dtype);
  for (const auto* numbers : {&sizes, &strides})
    for (std::size_t i = 0; i < numbers->size(); ++i)
      text += c10::str(i == 0 ? " " : ",", (*numbers)[i]);
  return text;
}

std::vector<std::string> find_packages(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (!fs::is_directory(path, error)) return {path};
  std::vector<std::string> packages;
  for (const auto& entry : fs::directory_iterator(path, error))
    if (entry.path().extension() == ".pt2") packages.push_back(entry.path().string());
  if (packages.empty()) {
    const auto kind = folder_problem(path);
    C10_THROW_ERROR(ValueError,
                    c10::str("[AotiUNet::load] path must name a folder with packages "
                             "(*.pt2), got \"",
                             path, "\", which ", kind.empty() ? "has none" : "is " + kind, "."));
  }
  std::sort(packages.begin(), packages.end());
  return packages;
}

}  // namespace sag

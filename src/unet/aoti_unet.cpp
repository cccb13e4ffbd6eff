#include "sag/aoti_unet.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <mutex>
#include <utility>

#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "alignment.h"
#include "call_checks.h"
#include "numbered_device.h"
#include "package.h"
#include "package_weights.h"
#include "plain_message.h"
#include "row_calls.h"
#include "sag/attention.h"
#include "sag/attention_scope.h"
#include "site_names.h"

#ifdef SAG_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#endif

namespace sag {
namespace {

using torch::inductor::AOTIModelPackageLoader;

// A package that is loaded. The stream orders what it launches; its own state is for one thread at
// a time. The mutex is recursive: a hook may call the UNet that it runs in.
struct LoadedPackage {
  PackageInfo info;
  std::unique_ptr<AOTIModelPackageLoader> loader;
  std::recursive_mutex mutex;
};

// One load at a time in the process: LibTorch reads all metadata into one static object. It is
// recursive: what gives the weights may look at packages, too.
std::recursive_mutex& one_at_a_time() {
  static std::recursive_mutex mutex;
  return mutex;
}

// The device to run on.
torch::Device choose_device(const PackageInfo& package,
                            const std::optional<torch::Device>& wanted) {
  const auto device = wanted.value_or(torch::Device(package.device));
  TORCH_CHECK_VALUE(device.type() == package.device, "[AotiUNet::load] device must be a ",
                    package.device, ", which \"", package.path, "\" was compiled for, got ", device,
                    ".");
  return numbered_device(device, "AotiUNet::load");
}

// Machine code for a GPU runs on GPUs of the same generation that are not older.
void check_gpu([[maybe_unused]] const PackageInfo& package, [[maybe_unused]] torch::Device device) {
#ifdef SAG_WITH_CUDA
  if (!device.is_cuda()) return;
  const auto* gpu = at::cuda::getDeviceProperties(device.index());
  const auto here = c10::str(gpu->major, ".", gpu->minor);
  const auto dot = package.gpu.find('.');
  int minor = gpu->minor + 1;
  if (dot != std::string::npos) {
    std::from_chars(package.gpu.data() + dot + 1, package.gpu.data() + package.gpu.size(), minor);
  }
  const bool fits = package.gpu.substr(0, dot) == std::to_string(gpu->major) && minor <= gpu->minor;
  TORCH_CHECK_VALUE(fits, "[AotiUNet::load] \"", package.path,
                    "\" must be compiled for the compute capability of ", device, ", ", here,
                    ", got ", package.gpu, ".");
#endif
}

// What must be the same in all packages of a folder: one call may take one, the next another.
void check_belongs(const PackageInfo& package, const PackageInfo& first) {
  const auto same_input = [](const PackageInput& a, const PackageInput& b) {
    return a.name == b.name && a.dtype == b.dtype && a.dims.size() == b.dims.size();
  };
  const auto same_site = [](const AttentionSiteInfo& a, const AttentionSiteInfo& b) {
    return a.path == b.path && a.ordinal == b.ordinal;
  };
  const auto check = [&](bool same, const char* what) {
    TORCH_CHECK_VALUE(same, "[AotiUNet::load] the packages of a folder must have the same ", what,
                      ", but \"", package.path, "\" has others than \"", first.path, "\".");
  };
  check(package.device == first.device, "device");
  check(std::equal(package.inputs.begin(), package.inputs.end(), first.inputs.begin(),
                   first.inputs.end(), same_input),
        "inputs and dtypes");
  check(std::equal(package.sites.begin(), package.sites.end(), first.sites.begin(),
                   first.sites.end(), same_site),
        "attention sites");
  check(std::equal(package.cross_sites.begin(), package.cross_sites.end(),
                   first.cross_sites.begin(), first.cross_sites.end(), same_site),
        "cross-attentions");
  check(package.model == first.model && package.skeleton == first.skeleton, "network and weights");
}

// What the packages of a folder, or the one that is named, say about themselves.
std::vector<PackageInfo> read_packages(const std::string& path) {
  std::vector<PackageInfo> infos;
  for (const auto& file : find_packages(path)) {
    infos.push_back(read_package(file));
    check_belongs(infos.back(), infos.front());
  }
  return infos;
}

// The weights that the packages do not hold themselves.
PackageWeights weights_for(const std::vector<PackageInfo>& packages, const AotiUNetOptions& options,
                           torch::Device device) {
  if (!options.weights.empty()) return convert_weights(options.weights, packages, device);
  const auto& first = packages.front();
  TORCH_CHECK_VALUE(
      first.skeleton.empty(),
      "[AotiUNet::load] packages that were compiled from a skeleton need weights "
      "from a checkpoint (sag-sample --checkpoint FILE --compiled DIR), got none for \"",
      first.path, "\", which runs those of ", first.skeleton, ".");
  const auto lacks = [](const auto& package) { return !package.weights.empty(); };
  if (std::none_of(packages.begin(), packages.end(), lacks)) return {};
  const auto folder = std::filesystem::path(first.path).parent_path();
  return read_weights_file((folder / "weights.pt").string(), packages, device);
}

// Gives a package the weights that it shares with others, as views that own nothing: LibTorch does
// not release the tensors that it is given here.
void give_weights(LoadedPackage& package, const PackageWeights& weights) {
  PackageWeights views;
  for (const auto& name : package.loader->get_constant_fqns()) {
    const auto found = weights.find(name);
    TORCH_CHECK_VALUE(found != weights.end() && package.info.weights.contains(name),
                      "[AotiUNet::load] \"", package.info.path,
                      "\" must list the weights that it needs, but \"", name, "\" is missing.");
    const auto& t = found->second;
    views.emplace(name, at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options()));
  }
  package.loader->load_constants(views, /*use_inactive=*/false, /*check_full_update=*/false,
                                 /*user_managed=*/true);
}

// Unpacks the compiled code and loads it.
std::unique_ptr<AOTIModelPackageLoader> unpack(const PackageInfo& package, torch::Device device) {
  try {
    return std::make_unique<AOTIModelPackageLoader>(package.path, "model",
                                                    /*run_single_threaded=*/true,
                                                    /*num_runners=*/1, device.index());
  } catch (const std::exception& error) {
    TORCH_CHECK_VALUE(false, "[AotiUNet::load] path must name a compiled UNet (.pt2), got \"",
                      package.path, "\", which cannot be loaded: ", plain_message(error));
  }
}

// ---- inputs

torch::Tensor input_called(const UNetInput& input, const std::string& name) {
  if (name == "x") return input.x;
  if (name == "timesteps") return input.timesteps;
  if (name == "context") return input.context;
  if (name == "y") return input.y;
  const auto extra = input.extra.find(name);
  return extra == input.extra.end() ? torch::Tensor() : extra->second;
}

// Throws when an input is given that the packages do not take.
void check_no_others(const UNetInput& input, const PackageInfo& package) {
  const auto check = [&](const std::string& name, const torch::Tensor& t) {
    const bool takes = std::any_of(package.inputs.begin(), package.inputs.end(),
                                   [&](const auto& known) { return known.name == name; });
    TORCH_CHECK_VALUE(!t.defined() || takes,
                      "[AotiUNet::forward] an input must be one of the package's, ",
                      package.list_inputs(), ", got \"", name, "\".");
  };
  check("context", input.context);
  check("y", input.y);
  for (const auto& [name, t] : input.extra) check(name, t);
}

void check_argument(const PackageInput& input, const torch::Tensor& t, const torch::Tensor& x,
                    torch::Device device) {
  check_place(input.name, t, device, input.dtype, "AotiUNet::forward");
  TORCH_CHECK_TYPE(t.layout() == torch::kStrided, "[AotiUNet::forward] ", input.name,
                   " must be dense, got ", t.layout(), ".");
  TORCH_CHECK_VALUE(t.dim() == static_cast<std::int64_t>(input.dims.size()) &&
                        (t.dim() == 0 || t.size(0) == x.size(0)),
                    "[AotiUNet::forward] ", input.name, " must have ", input.dims.size(),
                    " dimensions and as many rows as x, got ", t.sizes(), " for x of shape ",
                    x.sizes(), ".");
}

// Compiled code assumes that the elements follow each other.
torch::Tensor contiguous_and_aligned(const torch::Tensor& t) {
  const auto plain = t.resolve_conj().resolve_neg().contiguous();
  return is_aligned(plain) ? plain : plain.clone();
}

}  // namespace

struct AotiUNet::State {
  State(const std::string& path, const AotiUNetOptions& options);

  std::vector<torch::Tensor> arguments(const UNetInput& input) const;
  LoadedPackage& package_for(const std::vector<torch::Tensor>& arguments, const UNetInput& input);
  std::vector<InstalledHook> hooks_by_path() const;
  std::int64_t rows_of_calls(c10::IntArrayRef x) const;
  torch::Tensor run(const UNetInput& input);

  const PackageInfo& first() const { return packages.front()->info; }

  // Shared by all packages that need them, and destroyed after those.
  PackageWeights weights;
  // The most specific first.
  std::vector<std::unique_ptr<LoadedPackage>> packages;
  torch::Device device = torch::kCPU;
};

AotiUNet::State::State(const std::string& path, const AotiUNetOptions& options) {
  auto infos = read_packages(path);
  std::stable_sort(infos.begin(), infos.end(),
                   [](const auto& a, const auto& b) { return a.free_dims() < b.free_dims(); });
  device = choose_device(infos.front(), options.device);
  // Everything is checked before anything is loaded: a loader that throws leaves files in /tmp.
  for (const auto& info : infos) check_gpu(info, device);
  weights = weights_for(infos, options, device);
  for (auto& info : infos) {
    auto& package = *packages.emplace_back(std::make_unique<LoadedPackage>());
    package.info = std::move(info);
    package.loader = unpack(package.info, device);
    if (!package.info.weights.empty()) give_weights(package, weights);
  }
}

std::vector<torch::Tensor> AotiUNet::State::arguments(const UNetInput& input) const {
  const auto& takes = first();
  check_x(input.x, "AotiUNet::forward");
  check_no_others(input, takes);
  std::vector<torch::Tensor> arguments;
  for (const auto& wanted : takes.inputs) {
    const auto t = input_called(input, wanted.name);
    TORCH_CHECK_VALUE(t.defined(), "[AotiUNet::forward] the package's input \"", wanted.name,
                      "\" must be given, got nothing; it takes ", takes.list_inputs(), ".");
    check_argument(wanted, t, input.x, device);
    arguments.push_back(contiguous_and_aligned(t));
  }
  return arguments;
}

LoadedPackage& AotiUNet::State::package_for(const std::vector<torch::Tensor>& arguments,
                                            const UNetInput& input) {
  std::string choice;
  for (const auto& package : packages) {
    const auto& inputs = package->info.inputs;
    const bool fits = std::equal(inputs.begin(), inputs.end(), arguments.begin(),
                                 [](const auto& takes, const auto& t) { return takes.takes(t); });
    if (fits) return *package;
    choice += c10::str(choice.empty() ? "" : "; or ", package->info.list_inputs());
  }
  TORCH_CHECK_VALUE(false, "[AotiUNet::forward] the inputs must be ", choice, "; got ",
                    list_shapes(input), ".");
}

// Inside a package, a site has its path as name.
std::vector<InstalledHook> AotiUNet::State::hooks_by_path() const {
  std::vector<InstalledHook> hooks;
  for (auto hook : AttentionScope::hooks()) {
    hook.site =
        hooked_site(first().sites, first().cross_sites, hook.site, "AotiUNet::forward").path;
    hooks.push_back(std::move(hook));
  }
  return hooks;
}

// How many rows a call needs to have for an x of these sizes: its own, else the next number above
// that a package takes, else the highest.
std::int64_t AotiUNet::State::rows_of_calls(c10::IntArrayRef x) const {
  const auto asked = x.front();
  if (asked < 1) return asked;
  std::int64_t above = 0, highest = 0;
  for (const auto& package : packages) {
    const auto& dims = package->info.inputs.front().dims;
    const bool fits =
        std::equal(dims.begin() + 2, dims.end(), x.begin() + 2, x.end(),
                   [](const PackageDim& dim, std::int64_t size) { return dim.takes(size); });
    if (!fits) continue;
    if (dims.front().takes(asked)) return asked;
    const auto [low, high, multiple] = dims.front();
    const auto next = std::max(low, rows_in_calls_of(multiple, asked));
    if (next <= high && (above == 0 || next < above)) above = next;
    highest = std::max(highest, high);
  }
  if (above > 0) return above;
  return highest > 0 ? highest : asked;
}

torch::Tensor AotiUNet::State::run(const UNetInput& input) {
  const auto given = arguments(input);
  auto& package = package_for(given, input);
  const auto call = [&] {
    try {
      const c10::DeviceGuard on(device);
      const std::lock_guard lock(package.mutex);
      const auto outputs = package.loader->run(given);
      return outputs.empty() ? torch::Tensor() : outputs.front();
    } catch (const std::exception& error) {
      throw_failure(error, c10::str("[AotiUNet::forward] \"", package.info.path, "\" failed for ",
                                    list_shapes(input), ": ", plain_message(error)));
    }
  };
  auto hooks = hooks_by_path();
  const auto out =
      hooks.empty() ? call() : run_hooked(std::move(hooks), *AttentionScope::pass(), call);
  check_output(out, input.x, "\"" + package.info.path + "\"", "AotiUNet::forward");
  return out.contiguous();
}

AotiUNet::AotiUNet(std::unique_ptr<State> state) : state_(std::move(state)) {}
AotiUNet::~AotiUNet() = default;

std::shared_ptr<AotiUNet> AotiUNet::load(const std::string& path, const AotiUNetOptions& options) {
  ensure_ops_registered();
  const torch::NoGradGuard no_grad;
  // Tensors made in a caller's InferenceMode could not be used outside of it.
  const c10::InferenceMode ordinary_tensors(false);
  const std::lock_guard lock(one_at_a_time());
  return std::shared_ptr<AotiUNet>(new AotiUNet(std::make_unique<State>(path, options)));
}

bool AotiUNet::is_package(const std::string& path) {
  std::error_code error;
  return path.ends_with(".pt2") || std::filesystem::is_directory(path, error);
}

std::string AotiUNet::skeleton(const std::string& path) {
  const std::lock_guard lock(one_at_a_time());
  return read_packages(path).front().skeleton;
}

torch::Tensor AotiUNet::forward(const UNetInput& input) const {
  const torch::NoGradGuard no_grad;
  const c10::InferenceMode ordinary_tensors(false);
  check_x(input.x, "AotiUNet::forward");
  const auto rows = state_->rows_of_calls(input.x.sizes());
  if (rows == input.x.size(0)) return state_->run(input);
  // Says what is wrong with the inputs before they are split.
  static_cast<void>(state_->arguments(input));
  return run_in_calls_of(rows, input, [this](const UNetInput& part) { return state_->run(part); });
}

std::vector<AttentionSiteInfo> AotiUNet::attention_sites() const {
  return state_->first().sites;
}

std::vector<AttentionSiteInfo> AotiUNet::cross_attention_sites() const {
  return state_->first().cross_sites;
}

std::string AotiUNet::note_on_sites() const {
  return "A compiled UNet has the sites that it was exported with: export it with --site for "
         "another, or with --cross-attention for all cross-attentions.";
}

std::int64_t AotiUNet::max_rows() const {
  std::int64_t most = 0;
  for (const auto& package : state_->packages)
    most = std::max(most, package->info.inputs.front().dims.front().high);
  return most;
}

std::int64_t AotiUNet::evaluated_rows(c10::IntArrayRef x) const {
  return rows_in_calls_of(state_->rows_of_calls(x), x.front());
}

torch::Device AotiUNet::device() const {
  return state_->device;
}

torch::ScalarType AotiUNet::dtype() const {
  return state_->first().inputs.front().dtype;
}

}  // namespace sag

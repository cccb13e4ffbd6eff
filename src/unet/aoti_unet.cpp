#include "sag/aoti_unet.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <unordered_map>
#include <utility>

#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import_read.h>

#include "archive.h"
#include "attention_sites.h"
#include "forward_call.h"
#include "package.h"
#include "sag/attention.h"
#include "sag/attention_scope.h"

#ifdef SAG_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#endif

namespace sag {
namespace {

using torch::inductor::AOTIModelPackageLoader;

using Weights = std::unordered_map<std::string, torch::Tensor>;

// A package that is loaded. What it launches is ordered by the stream; its own state is for one
// thread at a time. Recursive, for a hook may call the UNet that it runs in.
struct LoadedPackage {
  Package about;
  std::unique_ptr<AOTIModelPackageLoader> loader;
  std::recursive_mutex mutex;
};

// The device to run on.
torch::Device choose_device(const Package& package, const std::optional<torch::Device>& wanted) {
  const auto device = wanted.value_or(torch::Device(package.device));
  TORCH_CHECK_VALUE(device.type() == package.device, "[AotiUNet::load] device must be a ",
                    package.device, ", which '", package.path, "' was compiled for, got ", device);
  return numbered_device("AotiUNet::load", device);
}

// Machine code of a GPU runs on those of the same generation that are no older.
void check_gpu([[maybe_unused]] const Package& package, [[maybe_unused]] torch::Device device) {
#ifdef SAG_WITH_CUDA
  if (!device.is_cuda()) return;
  const auto* gpu = at::cuda::getDeviceProperties(device.index());
  const auto here = c10::str(gpu->major, ".", gpu->minor);
  const auto dot = package.gpu.find('.');
  const bool fits = package.gpu.substr(0, dot) == std::to_string(gpu->major) &&
                    std::atoi(package.gpu.substr(dot + 1).c_str()) <= gpu->minor;
  TORCH_CHECK_VALUE(fits, "[AotiUNet::load] '", package.path,
                    "' must fit the GPU, but was compiled for compute capability ", package.gpu,
                    ", and ", device, " has ", here);
#endif
}

// What must be the same in all packages of a folder: one call may take one, the next another.
void check_belongs(const Package& package, const Package& first) {
  const auto same_input = [](const PackageInput& a, const PackageInput& b) {
    return a.name == b.name && a.dtype == b.dtype && a.dims.size() == b.dims.size();
  };
  const auto same_site = [](const AttentionSiteInfo& a, const AttentionSiteInfo& b) {
    return a.path == b.path && a.ordinal == b.ordinal;
  };
  const auto check = [&](bool same, const char* what) {
    TORCH_CHECK_VALUE(same, "[AotiUNet::load] the packages of a folder must have the same ", what,
                      ", but '", package.path, "' has others than '", first.path, "'");
  };
  check(package.device == first.device, "device");
  check(std::equal(package.inputs.begin(), package.inputs.end(), first.inputs.begin(),
                   first.inputs.end(), same_input),
        "inputs and dtypes");
  check(std::equal(package.sites.begin(), package.sites.end(), first.sites.begin(),
                   first.sites.end(), same_site),
        "attention sites");
  check(package.model == first.model, "network and weights");
}

// ---- weights.pt

Weights read_weights(const std::string& path, torch::Device device) {
  const auto refuse = [&](const std::string& what) {
    TORCH_CHECK_VALUE(false,
                      "[AotiUNet::load] packages that were compiled without their weights need the "
                      "file weights.pt beside them, a plain dict of tensors, got '",
                      path, "', ", what);
  };
  if (const auto problem = zip_problem(path); !problem.empty()) refuse(problem);
  c10::IValue value;
  try {
    caffe2::serialize::PyTorchStreamReader reader(path);
    value = torch::jit::readArchiveAndTensors("data", "", "", {}, {}, device, reader);
  } catch (const std::exception& error) {
    const auto message = plain_message(error);
    if (message.find("INTERNAL ASSERT") != std::string::npos)
      refuse("which holds something else: save dict(module.state_dict())");
    refuse("which cannot be read: " + message);
  }
  if (!value.isGenericDict()) refuse("which holds something else");
  Weights weights;
  for (const auto& entry : value.toGenericDict())
    if (entry.key().isString() && entry.value().isTensor())
      weights.emplace(entry.key().toStringRef(), entry.value().toTensor().resolve_neg());
  return weights;
}

void check_weights(const Package& package, const Weights& weights) {
  for (const auto& [name, wanted] : package.weights) {
    const auto found = weights.find(name);
    TORCH_CHECK_VALUE(found != weights.end(), "[AotiUNet::load] weights.pt must hold '", name,
                      "', which '", package.path, "' needs");
    const auto given = describe_weight(found->second);
    TORCH_CHECK_VALUE(given == wanted, "[AotiUNet::load] weights.pt must hold '", name, "' as '",
                      package.path, "' was compiled for (dtype, sizes, strides), ", wanted,
                      ", got ", given);
  }
}

// Gives a package the weights that it shares with others. It gets views that own nothing: LibTorch
// forgets to release those that it is given, and they would never be freed.
void give_weights(LoadedPackage& package, const Weights& weights) {
  Weights views;
  for (const auto& name : package.loader->get_constant_fqns()) {
    const auto found = weights.find(name);
    TORCH_CHECK_VALUE(found != weights.end() && package.about.weights.contains(name),
                      "[AotiUNet::load] '", package.about.path,
                      "' must list the weights it needs, ", "but '", name, "' is missing");
    const auto& t = found->second;
    views.emplace(name, at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options()));
  }
  package.loader->load_constants(views, /*use_inactive=*/false, /*check_full_update=*/false,
                                 /*user_managed=*/true);
}

// Unpacks the compiled code and loads it.
std::unique_ptr<AOTIModelPackageLoader> unpack(const Package& package, torch::Device device) {
  try {
    return std::make_unique<AOTIModelPackageLoader>(package.path, "model",
                                                    /*run_single_threaded=*/true,
                                                    /*num_runners=*/1, device.index());
  } catch (const std::exception& error) {
    TORCH_CHECK_VALUE(false, "[AotiUNet::load] path must name a compiled UNet (.pt2), got '",
                      package.path, "', which cannot be loaded: ", plain_message(error));
  }
}

// ---- inputs

torch::Tensor named(const UNetInput& input, const std::string& name) {
  if (name == "x") return input.x;
  if (name == "timesteps") return input.timesteps;
  if (name == "context") return input.context;
  if (name == "y") return input.y;
  const auto extra = input.extra.find(name);
  return extra == input.extra.end() ? torch::Tensor() : extra->second;
}

// Throws when something is given that the packages do not take.
void check_nothing_else(const UNetInput& input, const Package& package) {
  const auto check = [&](const std::string& name, const torch::Tensor& t) {
    const bool takes = std::any_of(package.inputs.begin(), package.inputs.end(),
                                   [&](const auto& known) { return known.name == name; });
    TORCH_CHECK_VALUE(!t.defined() || takes, "[AotiUNet::forward] the package takes no tensor '",
                      name, "', it takes ", package.list_inputs());
  };
  check("context", input.context);
  check("y", input.y);
  for (const auto& [name, t] : input.extra) check(name, t);
}

void check_place(const PackageInput& input, const torch::Tensor& t, const torch::Tensor& x,
                 torch::Device device) {
  TORCH_CHECK_VALUE(t.device() == device, "[AotiUNet::forward] ", input.name,
                    " must be on the UNet's device, ", device, ", got ", t.device());
  TORCH_CHECK_TYPE(t.layout() == torch::kStrided, "[AotiUNet::forward] ", input.name,
                   " must be dense, got ", t.layout());
  TORCH_CHECK_TYPE(t.scalar_type() == input.dtype, "[AotiUNet::forward] ", input.name, " must be ",
                   input.dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == static_cast<std::int64_t>(input.dims.size()) &&
                        (t.dim() == 0 || t.size(0) == x.size(0)),
                    "[AotiUNet::forward] ", input.name, " must have ", input.dims.size(),
                    " dimensions and as many rows as x, got ", t.sizes(), " beside x ", x.sizes());
}

// As the compiled code assumes its inputs: one element after the other, from a place that kernels
// can read several at once from.
torch::Tensor laid_out(const torch::Tensor& t) {
  constexpr std::uintptr_t kAlignment = 16;
  const auto plain = t.resolve_conj().resolve_neg().contiguous();
  return reinterpret_cast<std::uintptr_t>(plain.const_data_ptr()) % kAlignment == 0 ? plain
                                                                                    : plain.clone();
}

}  // namespace

struct AotiUNet::State {
  State(const std::string& path, const AotiUNetOptions& options);

  std::vector<torch::Tensor> arguments(const UNetInput& input) const;
  LoadedPackage& package_for(const std::vector<torch::Tensor>& arguments, const UNetInput& input);
  std::vector<InstalledHook> hooks_by_path() const;
  torch::Tensor run(const UNetInput& input);

  const Package& first() const { return packages.front()->about; }

  // Of all packages that need them; they live longer than those.
  Weights weights;
  // The most specific first.
  std::vector<std::unique_ptr<LoadedPackage>> packages;
  torch::Device device = torch::kCPU;
};

AotiUNet::State::State(const std::string& path, const AotiUNetOptions& options) {
  for (const auto& file : find_packages(path)) {
    packages.push_back(std::make_unique<LoadedPackage>());
    packages.back()->about = read_package(file);
    check_belongs(packages.back()->about, first());
  }
  std::stable_sort(packages.begin(), packages.end(), [](const auto& a, const auto& b) {
    return a->about.free_dims() < b->about.free_dims();
  });
  device = choose_device(first(), options.device);
  // Everything is checked before anything is loaded: a loader that throws leaves its files in /tmp.
  for (const auto& package : packages) {
    check_gpu(package->about, device);
    if (package->about.weights.empty()) continue;
    const auto folder = std::filesystem::path(package->about.path).parent_path();
    if (weights.empty()) weights = read_weights((folder / "weights.pt").string(), device);
    check_weights(package->about, weights);
  }
  for (const auto& package : packages) {
    package->loader = unpack(package->about, device);
    if (!package->about.weights.empty()) give_weights(*package, weights);
  }
}

std::vector<torch::Tensor> AotiUNet::State::arguments(const UNetInput& input) const {
  const auto& takes = first();
  TORCH_CHECK_VALUE(input.x.defined() && input.x.dim() == 4,
                    "[AotiUNet::forward] x must have 4 dimensions, got ",
                    input.x.defined() ? c10::str(input.x.sizes()) : "none");
  check_nothing_else(input, takes);
  std::vector<torch::Tensor> arguments;
  for (const auto& wanted : takes.inputs) {
    const auto t = named(input, wanted.name);
    TORCH_CHECK_VALUE(t.defined(), "[AotiUNet::forward] the package needs '", wanted.name,
                      "', which is not given; it takes ", takes.list_inputs());
    check_place(wanted, t, input.x, device);
    arguments.push_back(laid_out(t));
  }
  return arguments;
}

LoadedPackage& AotiUNet::State::package_for(const std::vector<torch::Tensor>& arguments,
                                            const UNetInput& input) {
  std::string choice;
  for (const auto& package : packages) {
    const auto& inputs = package->about.inputs;
    const bool fits = std::equal(inputs.begin(), inputs.end(), arguments.begin(),
                                 [](const auto& takes, const auto& t) { return takes.takes(t); });
    if (fits) return *package;
    choice += c10::str(choice.empty() ? "" : "; or ", package->about.list_inputs());
  }
  TORCH_CHECK_VALUE(false, "[AotiUNet::forward] the inputs must be ", choice, "; got ",
                    list_shapes(input));
}

// Inside the packages, sites go by their paths.
std::vector<InstalledHook> AotiUNet::State::hooks_by_path() const {
  std::vector<InstalledHook> hooks;
  for (auto hook : AttentionScope::hooks()) {
    hook.site = site_called(first().sites, hook.site, "AotiUNet::forward").path;
    hooks.push_back(std::move(hook));
  }
  return hooks;
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
      TORCH_CHECK(false, "[AotiUNet::forward] '", package.about.path, "' failed for ",
                  list_shapes(input), ": ", plain_message(error));
    }
  };
  auto hooks = hooks_by_path();
  const auto out =
      hooks.empty() ? call() : run_hooked(std::move(hooks), *AttentionScope::pass(), call);
  check_output(out, input.x, "AotiUNet::forward", "'" + package.about.path + "'");
  return out.contiguous();
}

AotiUNet::AotiUNet(std::unique_ptr<State> state) : state_(std::move(state)) {}
AotiUNet::~AotiUNet() = default;

std::shared_ptr<AotiUNet> AotiUNet::load(const std::string& path, const AotiUNetOptions& options) {
  ensure_ops_registered();
  const torch::NoGradGuard no_grad;
  // What a caller's InferenceMode would make here could never be used outside of it.
  const c10::InferenceMode ordinary_tensors(false);
  // In the whole process: LibTorch reads the metadata of all packages into one static object.
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  return std::shared_ptr<AotiUNet>(new AotiUNet(std::make_unique<State>(path, options)));
}

std::shared_ptr<AotiUNet> AotiUNet::load(const std::string& path) {
  return load(path, {});
}

bool AotiUNet::is_package(const std::string& path) {
  std::error_code error;
  return path.ends_with(".pt2") || std::filesystem::is_directory(path, error);
}

torch::Tensor AotiUNet::forward(const UNetInput& input) const {
  const torch::NoGradGuard no_grad;
  const c10::InferenceMode ordinary_tensors(false);
  return state_->run(input);
}

std::vector<AttentionSiteInfo> AotiUNet::attention_sites() const {
  return state_->first().sites;
}

std::string AotiUNet::note_on_sites() const {
  return "A compiled UNet has the sites that it was exported with: export it with --site for "
         "another.";
}

std::int64_t AotiUNet::max_rows() const {
  std::int64_t most = 0;
  for (const auto& package : state_->packages)
    most = std::max(most, package->about.inputs.front().dims.front().high);
  return most;
}

torch::Device AotiUNet::device() const {
  return state_->device;
}

torch::ScalarType AotiUNet::dtype() const {
  return state_->first().inputs.front().dtype;
}

}  // namespace sag

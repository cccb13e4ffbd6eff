#include "checkpoint/lora.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include "checkpoint/json_text.h"
#include "checkpoint/lora_alphas.h"
#include "checkpoint/lora_names.h"
#include "sag/safetensors.h"

namespace sag {
namespace {

using Names = std::vector<std::string>;

// "name", or "name" and how many more.
std::string counted(const Names& names) {
  auto text = quoted_name(names.front());
  if (names.size() > 1) text += c10::str(" and ", names.size() - 1, " more");
  return text;
}

// What the file has for one weight.
struct Pair {
  torch::Tensor down, up, mid, alpha;
  // alpha / rank.
  double scale = 1;

  torch::Tensor& of(LoraRole role) {
    switch (role) {
      case LoraRole::down:
        return down;
      case LoraRole::up:
        return up;
      case LoraRole::mid:
        return mid;
      case LoraRole::alpha:
        return alpha;
    }
    TORCH_INTERNAL_ASSERT(false, "unknown role");
  }
};

using Pairs = std::map<std::string, Pair>;

// Files of transformers, which have no UNet to add a LoRA to.
bool is_of_a_transformer(const std::string& name) {
  constexpr std::array<std::string_view, 4> kParts = {"double_blocks", "single_blocks",
                                                      "joint_blocks", "single_transformer_blocks"};
  return name.starts_with("transformer.") || name.starts_with("lora_transformer_") ||
         std::any_of(kParts.begin(), kParts.end(),
                     [&](std::string_view part) { return name.find(part) != std::string::npos; });
}

// The model that a LoRA was made for, as far as it tells, as a further sentence. What attends to
// the text knows how wide the text is.
std::string family_of(const Pairs& pairs) {
  for (const auto& [module, pair] : pairs) {
    if (is_of_a_transformer(module)) return "; it is for a transformer, such as Flux or SD 3";
    const bool attends = module.ends_with("attn2_to_k") || module.ends_with("attn2.to_k") ||
                         module.ends_with("attn2.processor.to_k");
    if (!attends || !pair.down.defined() || pair.down.dim() < 2) continue;
    const auto width = pair.down.size(1);
    if (width == 768) return "; it is for Stable Diffusion 1";
    if (width == 1024) return "; it is for Stable Diffusion 2";
    if (width == 2048) return "; it is for SDXL";
  }
  return "";
}

void check_kinds(const Safetensors& file, const std::string& path) {
  std::map<std::string, Names> kinds;
  for (const auto& [name, info] : file.tensors())
    if (const char* kind = other_kind_of(name)) kinds[kind].push_back(name);
  if (kinds.empty()) return;
  const auto& [kind, names] = *kinds.begin();
  refuse_lora(path, c10::str("which holds ", kind, " (", counted(names),
                             "): only pairs of down and up are merged, so merge this one into the "
                             "checkpoint with the program that made it"));
}

Pairs pairs_of(const Safetensors& file, const std::string& path) {
  Pairs pairs;
  Names unknown, twice;
  for (const auto& [name, info] : file.tensors()) {
    const auto split = split_lora_name(name);
    if (!split) {
      unknown.push_back(name);
      continue;
    }
    auto& tensor = pairs[split->module].of(split->role);
    if (tensor.defined()) twice.push_back(name);
    tensor = file.tensor(name);
  }
  if (pairs.empty() && unknown.empty()) refuse_lora(path, "which holds no tensors");
  if (!unknown.empty())
    refuse_lora(path, c10::str("whose tensors ", counted(unknown), " have no names of a LoRA"));
  if (!twice.empty())
    refuse_lora(path, c10::str("which has ", counted(twice), " twice, by another name"));

  Names halves;
  for (const auto& [module, pair] : pairs)
    if (!pair.down.defined() || !pair.up.defined()) halves.push_back(module);
  if (!halves.empty())
    refuse_lora(path, c10::str("which lacks the down or the up of ", counted(halves)));
  return pairs;
}

bool is_floating(const torch::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == torch::kHalf || dtype == torch::kBFloat16 || dtype == torch::kFloat ||
         dtype == torch::kDouble;
}

bool is_finite(const torch::Tensor& tensor) {
  return tensor.to(torch::kFloat).isfinite().all().item<bool>();
}

bool is_one_by_one(const torch::Tensor& tensor) {
  const auto kernel = tensor.sizes().slice(2);
  return std::all_of(kernel.begin(), kernel.end(), [](auto size) { return size == 1; });
}

// Whether down [rank, in, …], perhaps mid [rank, rank, …] and up [out, rank, 1, …] follow each
// other.
bool fit(const Pair& pair) {
  const auto& [down, up, mid, alpha, scale] = pair;
  if (down.dim() < 2 || up.dim() < 2 || down.numel() == 0 || up.numel() == 0) return false;
  const auto rank = down.size(0);
  if (up.size(1) != rank || !is_one_by_one(up)) return false;
  if (!mid.defined()) return true;
  return mid.dim() >= 2 && mid.size(0) == rank && mid.size(1) == rank && mid.numel() > 0 &&
         is_one_by_one(down);
}

// Throws ValueError for the first rule that one of the pairs breaks, with all that break it.
void check_pairs(const Pairs& pairs, const std::string& path) {
  using Rule = bool (*)(const Pair&);
  const std::pair<Rule, const char*> rules[] = {
      {[](const Pair& pair) {
         return is_floating(pair.down) && is_floating(pair.up) &&
                (!pair.mid.defined() || is_floating(pair.mid));
       },
       "are not F16, BF16, F32 or F64"},
      {fit, "have shapes that do not fit each other"},
      {[](const Pair& pair) {
         return is_finite(pair.down) && is_finite(pair.up) &&
                (!pair.mid.defined() || is_finite(pair.mid));
       },
       "hold NaN or infinity"},
      {[](const Pair& pair) {
         const auto& alpha = pair.alpha;
         return !alpha.defined() || (alpha.numel() == 1 && !alpha.is_complex() &&
                                     alpha.scalar_type() != torch::kBool && is_finite(alpha));
       },
       "have an alpha that is not one finite number"},
  };
  for (const auto& [holds, says] : rules) {
    Names breaking;
    for (const auto& [module, pair] : pairs)
      if (!holds(pair)) breaking.push_back(module);
    if (!breaking.empty())
      refuse_lora(path, c10::str("in which the tensors of ", counted(breaking), " ", says));
  }
}

Names modules_of(const Pairs& pairs) {
  Names modules;
  for (const auto& [module, pair] : pairs) modules.push_back(module);
  return modules;
}

// In which products are made, fp32 or more. On the CPU a process may have its fp32 products made in
// bf16 or TF32 (set_float32_matmul_precision); fp64 is never touched.
torch::ScalarType exact_dtype(torch::Device device) {
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  const bool rounds =
      precision == at::Float32Precision::BF16 || precision == at::Float32Precision::TF32;
  return device.is_cpu() && rounds ? torch::kDouble : torch::kFloat;
}

// down [rank, in, kernel…], with the kernel that may lie between.
torch::Tensor whole_down(const Pair& pair, torch::TensorOptions options) {
  const auto down = pair.down.to(options);
  if (!pair.mid.defined()) return down;
  // [rank, rank, kernel…] · [rank, in]
  return at::tensordot(pair.mid.to(options), down.flatten(1), {1}, {0}).movedim(-1, 1);
}

// A linear layer's [out, in] and a convolution's [out, in, 1, 1] are the same.
c10::IntArrayRef without_ones(c10::IntArrayRef sizes) {
  while (!sizes.empty() && sizes.back() == 1) sizes = sizes.slice(0, sizes.size() - 1);
  return sizes;
}

}  // namespace

struct Lora::State {
  std::string path = {};
  double strength = 1;
  Pairs pairs = {};
};

Lora::Lora(std::shared_ptr<const State> state) : state_(std::move(state)) {}

Lora Lora::open(const std::string& path, double strength) {
  TORCH_CHECK_VALUE(std::isfinite(strength), "[Lora::open] strength must be finite, got ", strength,
                    ".");
  const auto file = Safetensors::open(path);
  check_kinds(file, path);
  auto state = std::make_shared<State>();
  state->path = path;
  state->strength = strength;
  state->pairs = pairs_of(file, path);
  check_pairs(state->pairs, path);
  const LoraAlphas alphas(file, modules_of(state->pairs), path);
  for (auto& [module, pair] : state->pairs) {
    const auto rank = pair.down.size(0);
    pair.scale = pair.alpha.defined()
                     ? pair.alpha.to(torch::kDouble).item<double>() / static_cast<double>(rank)
                     : alphas.scale(module, rank);
  }
  return Lora(std::move(state));
}

void Lora::check_targets(const std::vector<LoraTarget>& all) const {
  const auto& pairs = state_->pairs;
  std::map<std::string, int> targets_of;
  Names doubled;
  for (const auto& target : all) {
    Names found;
    for (const auto& name : lora_names_of(target))
      if (pairs.contains(name)) found.push_back(name);
    for (const auto& name : found) ++targets_of[name];
    if (found.size() > 1) doubled.push_back(found[1]);
  }
  Names unknown, ambiguous;
  for (const auto& [module, pair] : pairs) {
    const auto found = targets_of.find(module);
    if (found == targets_of.end())
      unknown.push_back(module);
    else if (found->second > 1)
      ambiguous.push_back(module);
  }
  const auto refuse = [&](const Names& names, const std::string& says) {
    if (names.empty()) return;
    C10_THROW_ERROR(ValueError, c10::str("[Lora::check_targets] the LoRA \"", state_->path,
                                         "\" must fit the model, but ", counted(names), " ", says,
                                         family_of(pairs), "."));
  };
  const char* no_weight = unknown.size() == 1 ? "is no weight of it" : "are no weights of it";
  refuse(unknown, unknown.size() == pairs.size()
                      ? c10::str(no_weight, ", and the LoRA has no other")
                      : std::string(no_weight));
  refuse(ambiguous, ambiguous.size() == 1 ? "may be a weight of either text encoder"
                                          : "may be weights of either text encoder");
  refuse(doubled, doubled.size() == 1 ? "is there twice, by different names"
                                      : "are there twice, by different names");
}

torch::Tensor Lora::merged(const LoraTarget& target, const torch::Tensor& weight) const {
  const auto& [path, strength, pairs] = *state_;
  auto found = pairs.end();
  for (const auto& name : lora_names_of(target)) {
    found = pairs.find(name);
    if (found != pairs.end()) break;
  }
  if (found == pairs.end()) return weight;
  const torch::NoGradGuard no_grad;
  // Autocast would make the product in half precision.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto& [module, pair] = *found;
  const at::NoTF32Guard no_tf32;
  const auto options = weight.options().dtype(exact_dtype(weight.device())).requires_grad(false);
  const auto down = whole_down(pair, options);
  auto sizes = down.sizes().vec();
  sizes[0] = pair.up.size(0);
  TORCH_CHECK_VALUE(without_ones(sizes) == without_ones(weight.sizes()),
                    "[Lora::merged] the LoRA \"", path, "\" must fit the model, but ",
                    quoted_name(module), " changes a weight ", c10::IntArrayRef(sizes),
                    ", which is ", weight.sizes(), family_of(pairs), ".");
  const double factor = strength * pair.scale;
  torch::Tensor sum;
  bool is_finite = std::abs(factor) <= std::numeric_limits<float>::max();
  if (is_finite) {
    // Into the copy: large weights would fill the memory with what lies between.
    sum = weight.detach().to(options, /*non_blocking=*/false, /*copy=*/true).contiguous();
    sum.view({sizes[0], -1}).addmm_(pair.up.to(options).flatten(1), down.flatten(1), 1, factor);
    sum = sum.to(torch::kFloat);
    const auto [least, most] = sum.aminmax();
    is_finite = std::isfinite(least.item<float>()) && std::isfinite(most.item<float>());
  }
  TORCH_CHECK_VALUE(is_finite, "[Lora::merged] the LoRA \"", path,
                    "\" must leave the weights finite, but with the strength ", strength, " ",
                    quoted_name(module), " does not.");
  return sum;
}

}  // namespace sag

#include "group_norm.h"

#include <limits>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/custom_operator.h>

#include "graph_rewrite.h"
#include "graph_walk.h"
#include "ops.h"

#ifdef SAG_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "group_norm_kernels.h"
#endif

namespace sag {
namespace {

using torch::jit::Graph;
using torch::jit::Node;

#ifdef SAG_WITH_CUDA

bool begins_aligned(const torch::Tensor& t) {
  return reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

bool is_plain_vector(const std::optional<torch::Tensor>& t, const torch::Tensor& x) {
  return t && t->defined() && t->dim() == 1 && t->size(0) == x.size(1) && t->is_contiguous() &&
         t->scalar_type() == x.scalar_type() && t->device() == x.device() && begins_aligned(*t);
}

bool kernel_takes(const torch::Tensor& x, std::int64_t groups,
                  const std::optional<torch::Tensor>& weight,
                  const std::optional<torch::Tensor>& bias) {
  const bool is_half = x.scalar_type() == torch::kHalf || x.scalar_type() == torch::kBFloat16;
  if (!x.is_cuda() || !is_half || x.dim() != 4 || x.numel() == 0 || groups < 1) return false;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
  const auto channels = x.size(1), pixels = x.size(2) * x.size(3);
  return channels % groups == 0 && channels % kGroupNormVector == 0 &&
         channels <= kGroupNormMaxChannels && pixels <= kMost && x.size(0) <= 65535 &&
         x.is_contiguous(at::MemoryFormat::ChannelsLast) && begins_aligned(x) &&
         is_plain_vector(weight, x) && is_plain_vector(bias, x);
}

torch::Tensor group_norm_cuda(const torch::Tensor& x, std::int64_t groups,
                              const torch::Tensor& weight, const torch::Tensor& bias, double eps,
                              bool silu) {
  const c10::cuda::CUDAGuard guard(x.device());
  auto out = at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast);
  GroupNormCall call = {.x = x.const_data_ptr(),
                        .weight = weight.const_data_ptr(),
                        .bias = bias.const_data_ptr(),
                        .out = out.mutable_data_ptr(),
                        .is_bfloat16 = x.scalar_type() == torch::kBFloat16,
                        .images = static_cast<int>(x.size(0)),
                        .pixels = static_cast<int>(x.size(2) * x.size(3)),
                        .channels = static_cast<int>(x.size(1)),
                        .groups = static_cast<int>(groups),
                        .eps = static_cast<float>(eps),
                        .silu = silu};
  const auto sums =
      at::empty({x.size(0), group_norm_chunks(call), groups, 2}, x.options().dtype(torch::kFloat));
  call.sums = sums.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_group_norm(call, c10::cuda::getCurrentCUDAStream()));
  return out;
}

#endif

void run_group_norm(torch::jit::Stack& stack) {
  torch::Tensor x;
  std::int64_t groups = 0;
  std::optional<torch::Tensor> weight, bias;
  double eps = 0;
  bool silu = false;
  torch::jit::pop(stack, x, groups, weight, bias, eps, silu);
  torch::jit::push(stack, fused_group_norm(x, groups, weight, bias, eps, silu));
}

// An operator of TorchScript, not of the dispatcher: no graph that holds it is ever saved.
c10::Symbol fused_kind() {
  static const torch::jit::RegisterOperators registered(
      {torch::jit::Operator("sag::fused_group_norm(Tensor x, int groups, Tensor? weight, Tensor? "
                            "bias, float eps, bool silu) "
                            "-> Tensor",
                            run_group_norm, c10::AliasAnalysisKind::FROM_SCHEMA)});
  return c10::Symbol::fromQualString("sag::fused_group_norm");
}

// The SiLU that is the only use of a value, or null.
Node* only_silu_of(const torch::jit::Value* value) {
  static const Ops silu = {c10::aten::silu, c10::aten::silu_};
  if (value->uses().size() != 1) return nullptr;
  Node* user = value->uses().front().user;
  return silu.contains(user->kind()) ? user : nullptr;
}

void fuse_group_norm(Node* norm, c10::Symbol own) {
  torch::jit::WithInsertPoint before(norm);
  Graph& graph = *norm->owningGraph();
  Node* silu = only_silu_of(norm->output());
  // Inputs of group_norm: x, groups, weight, bias, eps, and cuDNN's switch.
  Node* fused = graph.create(own, norm->inputs().slice(0, 5));
  fused->addInput(graph.insertConstant(silu != nullptr));
  if (silu) {
    silu->output()->replaceAllUsesWith(norm->output());
    silu->destroy();
  }
  replace_node(norm, fused);
}

}  // namespace

torch::Tensor fused_group_norm(const torch::Tensor& x, std::int64_t groups,
                               const std::optional<torch::Tensor>& weight,
                               const std::optional<torch::Tensor>& bias, double eps, bool silu) {
#ifdef SAG_WITH_CUDA
  if (kernel_takes(x, groups, weight, bias))
    return group_norm_cuda(x, groups, *weight, *bias, eps, silu);
#endif
  const auto y = at::group_norm(x, groups, weight, bias, eps);
  return silu ? at::silu(y) : y;
}

void fuse_group_norms(Graph& graph) {
  const auto own = fused_kind();
  std::vector<Node*> norms;
  for_each_node(graph, [&](Node* node) {
    if (node->kind() == c10::aten::group_norm) norms.push_back(node);
  });
  for (Node* norm : norms) fuse_group_norm(norm, own);
}

}  // namespace sag

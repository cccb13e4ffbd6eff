#include "sag/torchscript_unet.h"

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include "archive.h"
#include "attention/attention_scope_state.h"
#include "attention_nodes.h"
#include "attention_sites.h"
#include "call_checks.h"
#include "flatten.h"
#include "forward_call.h"
#include "forward_output.h"
#include "graph_rewrite.h"
#include "graph_walk.h"
#include "group_norm.h"
#include "model/site_list.h"
#include "module_conversion.h"
#include "numbered_device.h"
#include "plain_message.h"
#include "row_calls.h"
#include "sag/attention.h"
#include "sag/attention_scope.h"
#include "sag/step_context.h"
#include "site_names.h"
#include "timestep_form.h"

#ifdef SAG_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace sag {
namespace {

using torch::jit::Graph;
using torch::jit::GraphFunction;
using torch::jit::Module;
using torch::jit::Node;

// Who reports an error, and what it calls the model.
struct Origin {
  const char* caller;
  std::string model;
};

void check_rows(std::int64_t rows, const char* caller) {
  TORCH_CHECK_VALUE(rows >= 0, "[", caller, "] rows must be at least 0, got ", rows, ".");
}

// Returns the options with a numbered device, as tensors have it.
TorchScriptUNetOptions checked(TorchScriptUNetOptions options) {
  const auto dtype = options.dtype.value_or(torch::kFloat);
  TORCH_CHECK_TYPE(dtype == torch::kFloat || dtype == torch::kHalf || dtype == torch::kBFloat16 ||
                       dtype == torch::kDouble,
                   "[TorchScriptUNet::load] dtype must be float, half, bfloat16 or double, got ",
                   dtype, ".");
  check_rows(options.rows, "TorchScriptUNet::load");
  options.device = numbered_device(options.device, "TorchScriptUNet::load");
  return options;
}

// optimize_for_inference makes constants that cannot be saved: after loading, their nodes have no
// value.
void check_constants(Graph& graph, const Origin& origin) {
  for_each_node(graph, [&](Node* node) {
    const bool lost = node->kind() == c10::prim::Constant &&
                      !node->hasAttribute(c10::attr::value) &&
                      node->output()->type()->kind() == c10::TypeKind::TensorType;
    TORCH_CHECK_VALUE(
        !lost, "[", origin.caller, "] ", origin.model,
        " must hold its constants, got one that lost some when it was saved: save it before "
        "optimize_for_inference.");
  });
}

bool has_node(Graph& graph, bool (*is_wanted)(const Node*)) {
  bool found = false;
  for_each_node(graph, [&](Node* node) { found = found || is_wanted(node); });
  return found;
}

void check_sites(const FlatGraph& flat, const std::vector<AttentionSiteInfo>& sites,
                 const Origin& origin) {
  if (!sites.empty()) return;
  const auto attentions = flat.attention_paths.size();
  const std::string found =
      attentions > 0 ? "only cross-attention (" + std::to_string(attentions) + " of them)"
      : has_node(*flat.graph, is_softmax)
          ? "only softmax that does not belong to an attention known here: export it with "
            "scaled_dot_product_attention"
      : has_node(*flat.graph, is_fast_path)
          ? "only the fast path of nn.MultiheadAttention: trace it after "
            "torch.backends.mha.set_fastpath_enabled(False)"
          : "no attention at all";
  TORCH_CHECK_VALUE(false, "[", origin.caller, "] ", origin.model,
                    " must have a self-attention that can be hooked, got ", found, ".");
}

void check_is_in_eval_mode(const Module& module, const Origin& origin) {
  for (const Module& part : module.modules()) {
    TORCH_CHECK_VALUE(!part.hasattr("training") || !part.is_training(), "[", origin.caller, "] ",
                      origin.model,
                      " must be in eval mode, got one in training mode: call eval() on it first.");
  }
}

Origin check_has_forward(const Module& module, Origin origin) {
  TORCH_CHECK_VALUE(module.find_method("forward"), "[", origin.caller, "] ", origin.model,
                    " must have a method forward, got none.");
  return origin;
}

torch::Device device_of(const Module& module, Graph& graph) {
  for (const torch::Tensor& t : module.parameters()) return t.device();
  if (const auto device = constants_device(graph)) return *device;
  for (const torch::Tensor& t : module.buffers()) return t.device();
  return torch::kCPU;
}

torch::ScalarType dtype_of(const Module& module, Graph& graph) {
  if (const auto dtype = parameters_dtype(module)) return *dtype;
  return constant_weights_dtype(graph).value_or(torch::kFloat);
}

// Everything of the graph that depends on where and in which dtype it runs.
void fit_graph(Graph& graph, torch::Device device, torch::ScalarType recorded,
               torch::ScalarType dtype) {
  leave_fast_paths(graph);
  use_plain_convolutions(graph);
  move_constants(graph, device);
  const bool half = recorded == torch::kHalf || recorded == torch::kBFloat16;
  if (recorded != dtype) {
    convert_constants(graph, dtype);
    if (half) replace_recorded_dtype(graph, recorded, dtype);
  }
  // Timesteps come in fp32, and a file of another dtype may not cast them itself.
  if (recorded != dtype || dtype != torch::kFloat) follow_weights(graph);
}

// The x and the timesteps that the file was traced with, as far as shapes and dtypes go; undefined:
// unknown.
struct TracedInputs {
  torch::Tensor x, timesteps;

  std::int64_t rows() const { return x.defined() ? x.size(0) : 0; }
};

TracedInputs traced_inputs(const Module& module) {
  const auto by_method = module.retrieve_traced_inputs();
  const auto found = by_method.find("forward");
  if (found == by_method.end() || found->value().size() < 2) return {};
  const c10::IValue x = found->value().get(0), timesteps = found->value().get(1);
  if (!x.isTensor() || x.toTensor().dim() != 4 || !timesteps.isTensor()) return {};
  return {x.toTensor(), timesteps.toTensor()};
}

// Code that reads a timestep as a number leaves that number in a trace, and the same is predicted
// for every other.
void check_uses_timesteps(const TracedInputs& traced, const FlatGraph& flat, const Origin& origin) {
  TORCH_CHECK_VALUE(
      !traced.timesteps.defined() || is_computed_with(flat.graph->inputs()[2]), "[", origin.caller,
      "] ", origin.model,
      " must compute with its timesteps, got a trace with a number in their place: its code reads "
      "them with int, float or item, so script that code or compute with the tensor. (A network "
      "that needs no timesteps can add 0 * timesteps.sum().)");
}

// Whether the caller captures a CUDA graph, inside of which nothing can be looked at.
bool is_captured([[maybe_unused]] torch::Device device) {
#ifdef SAG_WITH_CUDA
  using c10::cuda::CaptureStatus;
  if (device.is_cuda())
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != CaptureStatus::None;
#endif
  return false;
}

// Runs a forked task where it is forked. LibTorch would give it to another thread: hooks would run
// in any order, and on CUDA the task would run on that thread's stream, outside of a capture.
void run_in_place(const std::function<void()>& task) {
  task();
}

}  // namespace

struct TorchScriptUNet::State {
  // `wanted`: where and how to run it; null: as the module is.
  State(Module loaded, const Origin& from, const TorchScriptUNetOptions* wanted)
      : origin(check_has_forward(loaded, from)),
        traced(traced_inputs(loaded)),
        module(std::move(loaded)),
        call(module.get_method("forward").function().getSchema(), origin.caller, origin.model),
        flat(flatten(module)),
        sites(self_attention_sites(flat)),
        cross_sites(sag::cross_attention_sites(flat)),
        blocks(sag::block_sites(flat)),
        timesteps(find_timestep_form(call.timesteps(), flat.graph->inputs()[2], traced.timesteps,
                                     traced.rows())),
        device(device_of(module, *flat.graph)) {
    check_constants(*flat.graph, origin);
    check_sites(flat, sites, origin);
    check_uses_timesteps(traced, flat, origin);
    const auto recorded = dtype_of(module, *flat.graph);
    dtype = recorded;
    if (wanted) {
      device = wanted->device;
      dtype = wanted->dtype.value_or(device.is_cpu() ? torch::kFloat : recorded);
      if (wanted->weights) fill_parameters(module, wanted->weights, device, dtype, origin.caller);
      convert_module(module, device, dtype == recorded ? std::nullopt : std::make_optional(dtype));
    }
    fit_graph(*flat.graph, device, recorded, dtype);
    if (wanted && wanted->channels_last.value_or(likes_channels_last())) {
      channels_last = true;
      use_channels_last(module);
      constants_to_channels_last(*flat.graph);
      let_views_copy(*flat.graph);
      fuse_group_norms(*flat.graph);
    }
  }

  bool likes_channels_last() const;
  std::shared_ptr<GraphFunction> function(const std::vector<std::string>& hooked);
  const AttentionSiteInfo* find_block(const std::string& key) const;
  std::shared_ptr<Graph> hooked_graph(const std::vector<std::string>& hooked) const;
  torch::Tensor run(const UNetInput& given);
  torch::Tensor run_any(const UNetInput& input);
  bool is_to_be_tried(std::int64_t rows);
  void try_rows(const UNetInput& input);
  std::int64_t fixed();
  // What a failure may come from, as a sentence in brackets after it; or nothing.
  std::string way_out(const UNetInput& input, const std::string& message);
  // The same where the number of rows may be what does not fit.
  std::string note_on_rows(const UNetInput& input);

  const Origin origin;
  const TracedInputs traced;
  Module module;
  const ForwardCall call;
  const FlatGraph flat;
  const std::vector<AttentionSiteInfo> sites, cross_sites, blocks;
  const TimestepForm timesteps;
  torch::Device device;
  torch::ScalarType dtype = torch::kFloat;
  bool channels_last = false;

  // Guards what follows.
  std::mutex mutex;
  // The only number of rows that the file works with; 0: none is known.
  std::int64_t fixed_rows = 0;
  // Numbers that were compared, and are right.
  std::set<std::int64_t> tried_rows;
  // By the sorted names of the hooked sites. GraphFunction compiles on first use, and may run on
  // several threads.
  std::map<std::vector<std::string>, std::shared_ptr<GraphFunction>> functions;
};

bool TorchScriptUNet::State::likes_channels_last() const {
  const bool half = dtype == torch::kHalf || dtype == torch::kBFloat16;
  return device.is_cuda() && half && convolution_share(module) >= 0.05;
}

// The block that hooks call `key`; null: they mean an attention.
const AttentionSiteInfo* TorchScriptUNet::State::find_block(const std::string& key) const {
  const auto found = std::find_if(blocks.begin(), blocks.end(), [&](const auto& block) {
    return key_of_block(block.path) == key;
  });
  return found == blocks.end() ? nullptr : &*found;
}

std::shared_ptr<Graph> TorchScriptUNet::State::hooked_graph(
    const std::vector<std::string>& hooked) const {
  const auto graph = flat.graph->copy();
  const auto nodes = attention_nodes(*graph);
  std::map<std::int64_t, std::string> names;
  std::set<std::string> hooked_blocks;
  for (const auto& name : hooked) {
    if (const auto* block = find_block(name)) {
      hooked_blocks.insert(block->path);
      continue;
    }
    const auto site = hooked_site(sites, cross_sites, name, "TorchScriptUNet::forward");
    const auto [other, is_new] = names.emplace(site.ordinal, name);
    TORCH_CHECK_VALUE(is_new, "[TorchScriptUNet::forward] a hooked site must have one name, got \"",
                      name, "\" and \"", other->second, "\".");
    for (const auto i : nodes_of(flat, site)) hook_attention(nodes[i], name, layer_input(nodes[i]));
  }
  leave_blocks(*graph, hooked_blocks);
  return graph;
}

std::shared_ptr<GraphFunction> TorchScriptUNet::State::function(
    const std::vector<std::string>& hooked) {
  const std::lock_guard lock(mutex);
  if (const auto known = functions.find(hooked); known != functions.end()) return known->second;
  // SIMPLE: without profiling runs and fusion no call is slower than the others, and no switch of
  // the process is set.
  auto function =
      std::make_shared<GraphFunction>(c10::QualifiedName("sag_unet_forward"), hooked_graph(hooked),
                                      nullptr, torch::jit::ExecutorExecutionMode::SIMPLE);
  return functions.emplace(hooked, std::move(function)).first->second;
}

torch::Tensor TorchScriptUNet::State::run(const UNetInput& given) {
  auto input = given;
  if (channels_last) input.x = input.x.contiguous(at::MemoryFormat::ChannelsLast);
  if (!is_captured(device))
    check_can_be_rounded(timesteps, input.timesteps, "TorchScriptUNet::forward");
  auto stack = call.arguments(input, timesteps);
  stack.insert(stack.begin(), module._ivalue());
  auto hooked = AttentionScope::hooked_sites();
  std::sort(hooked.begin(), hooked.end());
  hooked.erase(std::unique(hooked.begin(), hooked.end()), hooked.end());
  const auto forward = function(hooked);
  c10::IValue result;
  try {
    // Otherwise an executor that profiles and fuses would run forked tasks.
    const torch::jit::GraphOptimizerEnabledGuard as_it_is(false);
    const auto future = forward->runAsync(stack, run_in_place);
    future->waitAndThrow();
    result = future->value();
  } catch (const std::exception& error) {
    const auto message = plain_message(error);
    throw_failure(error, c10::str("[TorchScriptUNet::forward] ", origin.model, " failed for ",
                                  list_shapes(input), ": ", message, way_out(input, message)));
  }
  const auto out = output_tensor(result);
  TORCH_CHECK_VALUE(
      out.defined(), "[TorchScriptUNet::forward] the forward of ", origin.model,
      " must return a tensor, a tuple or list with one, or a dict with \"sample\" or \"out\", got ",
      result.tagKind(), ". ", list_sites(sites));
  check_output(out, input.x, origin.model, "TorchScriptUNet::forward",
               [&] { return note_on_rows(input); });
  return out.contiguous();
}

std::string TorchScriptUNet::State::way_out(const UNetInput& input, const std::string& message) {
  const auto mentions = [&](const char* text) { return message.find(text) != std::string::npos; };
  if (mentions(" channels, but got "))
    return " (Channels after the latent's are given as Conditioning::concat, sag-sample: "
           "--concat.)";
  return mentions("size") || mentions("shape") ? note_on_rows(input) : "";
}

// Without the traced inputs nobody knows whether rows are the matter.
std::string TorchScriptUNet::State::note_on_rows(const UNetInput& input) {
  if (traced.rows() > 0 || input.x.size(0) == fixed()) return "";
  return " (If a number of rows is written into the file, name it: TorchScriptUNetOptions::rows, "
         "sag-sample: --unet-rows.)";
}

std::int64_t TorchScriptUNet::State::fixed() {
  const std::lock_guard lock(mutex);
  return fixed_rows;
}

bool TorchScriptUNet::State::is_to_be_tried(std::int64_t rows) {
  const std::lock_guard lock(mutex);
  return fixed_rows == 0 && traced.rows() > 0 && rows != traced.rows() &&
         !tried_rows.contains(rows) && !is_captured(device);
}

// Compares these rows with those of calls as the file was traced.
void TorchScriptUNet::State::try_rows(const UNetInput& input) {
  const auto noisy = with_noise(input);
  StepContext nobody_reads(0, 0, input.x.size(2), input.x.size(3));
  const AttentionScope without_hooks({}, {.step = &nobody_reads});
  const auto run_noisy = [this](const UNetInput& some) { return run(some); };
  torch::Tensor expected, got;
  try {
    expected = run_in_calls_of(traced.rows(), noisy, run_noisy);
  } catch (const std::exception&) {
    // Rows are not the matter: the call itself says what is.
    return;
  }
  try {
    got = run(noisy);
  } catch (const c10::OutOfMemoryError&) {
    throw;
    // NOLINTNEXTLINE(bugprone-empty-catch)
  } catch (const std::exception&) {
    // It works with the traced number of rows only.
  }
  const bool same = got.defined() && same_rows(got, expected, dtype);
  const std::lock_guard lock(mutex);
  if (same)
    tried_rows.insert(input.x.size(0));
  else
    fixed_rows = traced.rows();
}

torch::Tensor TorchScriptUNet::State::run_any(const UNetInput& input) {
  const auto rows = input.x.size(0);
  if (is_to_be_tried(rows)) try_rows(input);
  const auto fixed_now = fixed();
  if (fixed_now > 0 && rows != fixed_now)
    return run_in_calls_of(fixed_now, input, [this](const UNetInput& part) { return run(part); });
  return run(input);
}

TorchScriptUNet::TorchScriptUNet(std::unique_ptr<State> state) : state_(std::move(state)) {}
TorchScriptUNet::~TorchScriptUNet() = default;

std::shared_ptr<TorchScriptUNet> TorchScriptUNet::load(const std::string& path,
                                                       const TorchScriptUNetOptions& options) {
  ensure_ops_registered();
  const auto wanted = checked(options);
  const Origin origin{"TorchScriptUNet::load", "\"" + path + "\""};
  auto state = std::make_unique<State>(read_archive(path, origin.caller), origin, &wanted);
  state->fixed_rows = wanted.rows;
  return std::shared_ptr<TorchScriptUNet>(new TorchScriptUNet(std::move(state)));
}

std::shared_ptr<TorchScriptUNet> TorchScriptUNet::from_module(const Module& module,
                                                              std::int64_t rows) {
  ensure_ops_registered();
  const Origin origin{"TorchScriptUNet::from_module", "the module"};
  check_rows(rows, origin.caller);
  check_is_in_eval_mode(module, origin);
  auto state = std::make_unique<State>(module, origin, nullptr);
  state->fixed_rows = rows;
  return std::shared_ptr<TorchScriptUNet>(new TorchScriptUNet(std::move(state)));
}

torch::Tensor TorchScriptUNet::forward(const UNetInput& input) const {
  torch::NoGradGuard no_grad;
  check_input(input, state_->device, state_->dtype, "TorchScriptUNet::forward");
  return state_->run_any(input);
}

std::vector<AttentionSiteInfo> TorchScriptUNet::attention_sites() const {
  return state_->sites;
}

std::vector<AttentionSiteInfo> TorchScriptUNet::cross_attention_sites() const {
  return state_->cross_sites;
}

std::vector<AttentionSiteInfo> TorchScriptUNet::block_sites() const {
  return state_->blocks;
}

torch::Device TorchScriptUNet::device() const {
  return state_->device;
}

torch::ScalarType TorchScriptUNet::dtype() const {
  return state_->dtype;
}

std::int64_t TorchScriptUNet::evaluated_rows(c10::IntArrayRef x) const {
  const auto fixed = state_->fixed();
  return fixed == 0 ? x.front() : rows_in_calls_of(fixed, x.front());
}

std::vector<std::string> TorchScriptUNet::argument_names() const {
  return state_->call.argument_names();
}

}  // namespace sag

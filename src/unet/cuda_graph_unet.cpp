#include "sag/cuda_graph_unet.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

#include <ATen/autocast_mode.h>

#include "plain_message.h"
#include "sag/attention_scope.h"
#include "sag/step_context.h"

#ifdef SAG_WITH_CUDA
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/ScopeExit.h>
#endif

namespace sag {
namespace {

// Why a call cannot be a graph, or nothing.
const char* reason_to_be_eager(const UNetInput& input) {
  if (!input.x.defined() || !input.x.is_cuda()) return "the input is not on a CUDA device";
  for (const auto& hook : AttentionScope::hooks())
    if (!hook.options.capturable || !hook.identity) return "an active hook is not capturable";
  // Autocast caches weights.
  if (at::autocast::is_autocast_enabled(torch::kCUDA)) return "autocast is on";
  return nullptr;
}

#ifdef SAG_WITH_CUDA

// What a graph was captured for: calls with equal keys replay it.
struct CallKey {
  // Sizes, strides, dtypes and the pass's layout in a row.
  std::vector<std::int64_t> numbers;
  // Of further inputs.
  std::vector<std::string> names;
  std::vector<Owner> owners;
  std::vector<std::shared_ptr<const void>> hooks;
  bool operator==(const CallKey&) const = default;
};

void append(CallKey& key, const torch::Tensor& t) {
  key.numbers.push_back(t.defined() ? t.dim() : -1);
  if (!t.defined()) return;
  key.numbers.push_back(static_cast<std::int64_t>(t.scalar_type()));
  key.numbers.insert(key.numbers.end(), t.sizes().begin(), t.sizes().end());
  key.numbers.insert(key.numbers.end(), t.strides().begin(), t.strides().end());
}

void append(CallKey& key, const RowGroup& group) {
  const auto area = group.area.value_or(Area{});
  key.numbers.insert(
      key.numbers.end(),
      {group.begin, group.count, group.image, static_cast<std::int64_t>(group.branch), group.entry,
       group.weight.defined(), group.area.has_value(), area.height, area.width, area.y, area.x});
  key.numbers.push_back(static_cast<std::int64_t>(group.context_parts.size()));
  key.numbers.insert(key.numbers.end(), group.context_parts.begin(), group.context_parts.end());
  key.owners.push_back(group.owner);
}

CallKey key_of(const UNetInput& input) {
  CallKey key;
  for (const auto* t : {&input.x, &input.timesteps, &input.context, &input.y}) append(key, *t);
  for (const auto& [name, t] : input.extra) {
    key.names.push_back(name);
    append(key, t);
  }
  for (const auto& hook : AttentionScope::hooks()) key.hooks.push_back(hook.identity);
  if (const auto* pass = AttentionScope::pass()) {
    key.numbers.insert(key.numbers.end(),
                       {pass->height, pass->width, pass->step->height(), pass->step->width()});
    for (const auto& group : pass->groups) append(key, group);
  }
  return key;
}

// Replays read and write the graph's own tensors, whose addresses are fixed.
struct Graph {
  CallKey key;
  UNetInput input;
  torch::Tensor output;
  struct Recorded {
    Owner owner;
    // Which of the pass's groups, and where in it the map's rows begin.
    std::size_t group;
    std::int64_t offset;
    torch::Tensor map;
  };
  std::vector<Recorded> recorded;
  std::vector<std::pair<Owner, std::string>> skips;
  at::cuda::CUDAGraph graph;

  torch::Tensor replay(const UNetInput& given);
};

template <typename Change>
void for_each_tensor(UNetInput& input, const UNetInput& other, const Change& change) {
  change(input.x, other.x);
  change(input.timesteps, other.timesteps);
  change(input.context, other.context);
  change(input.y, other.y);
  for (auto& [name, t] : input.extra) change(t, other.extra.at(name));
}

torch::Tensor Graph::replay(const UNetInput& given) {
  for_each_tensor(input, given, [](torch::Tensor& own, const torch::Tensor& t) {
    if (own.defined()) own.copy_(t, /*non_blocking=*/true);
  });
  graph.replay();
  // The next replay overwrites all of it, so the caller gets copies.
  if (const auto* pass = AttentionScope::pass()) {
    for (const auto& [owner, group, offset, map] : recorded)
      pass->step->record(owner, pass->groups[group].part(offset, map.size(0)), map.clone());
    for (const auto& [owner, reason] : skips) pass->step->skipped(owner, reason);
  }
  return output.clone();
}

// Whether the rows of `part` belong to the group. A site may compute its attention in several
// calls, whose groups are numbered from 0 again.
bool is_part_of(const RowGroup& part, const RowGroup& group) {
  return group.branch == part.branch && group.entry == part.entry && group.owner == part.owner &&
         group.area == part.area && group.image <= part.image &&
         part.image + part.count <= group.image + group.count;
}

// Runs the UNet with the hooks of the current scope. They record into a context of their own.
torch::Tensor run_apart(const UNet& unet, const UNetInput& input, Graph* graph) {
  const auto* outer = AttentionScope::pass();
  if (!outer) return unet.forward(input);
  StepContext context(outer->sigma, outer->step_index, outer->step->height(), outer->step->width());
  auto pass = *outer;
  pass.step = &context;
  const auto hooks = AttentionScope::hooks();
  auto output = run_hooked({hooks.begin(), hooks.end()}, std::move(pass),
                           [&] { return unet.forward(input); });
  if (!graph) return output;
  for (auto& [owner, record] : context.records()) {
    const auto& groups = outer->groups;
    const auto group = std::find_if(groups.begin(), groups.end(), [&record](const RowGroup& rows) {
      return is_part_of(record.rows, rows);
    });
    TORCH_INTERNAL_ASSERT(group != groups.end());
    graph->recorded.push_back({owner, static_cast<std::size_t>(group - groups.begin()),
                               record.rows.image - group->image, record.map});
  }
  graph->skips = context.skips();
  return output;
}

// The stream on which graphs for a stream of the caller's are captured. Libraries keep a workspace
// for every stream, and a graph keeps its stream's: graphs of two callers run at once. It does not
// come from LibTorch's pool, whose streams callers use, and it lives as long as the process.
c10::cuda::CUDAStream capture_stream(c10::cuda::CUDAStream caller) {
  static std::unordered_map<c10::cuda::CUDAStream, c10::cuda::CUDAStream> streams;
  const auto known = streams.find(caller);
  if (known != streams.end()) return known->second;
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return streams.emplace(caller, c10::cuda::getStreamFromExternal(stream, caller.device_index()))
      .first->second;
}

// Ends a capture that failed. CUDAGraph::capture_end stops at CUDA's error, before it tells the
// allocators, which would go on as if the process were capturing.
void abandon(at::cuda::CUDAGraph& graph, c10::DeviceIndex device, at::cuda::MempoolId_t pool) {
  const auto regardless = [](const auto& act) {
    try {
      act();
      // NOLINTNEXTLINE(bugprone-empty-catch)
    } catch (const std::exception&) {
      // It was done already, or has no effect any more.
    }
  };
  regardless([&] { graph.capture_end(); });
  // If capture_end got as far as the allocators, these throw at once: nothing is released twice.
  regardless([&] {
    c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool);
    c10::cuda::CUDACachingAllocator::releasePool(device, pool);
  });
  regardless([&] {
    auto* host = at::getHostAllocator(at::kCUDA);
    host->end_allocate_to_pool(pool);
    host->release_pool(pool);
  });
}

// A UNet that captures while it is captured would wait for itself.
thread_local bool capturing = false;

#endif

}  // namespace

#ifdef SAG_WITH_CUDA

struct CudaGraphUNet::State {
  // What belongs to one stream of a caller: graphs that share a pool must not run at once.
  struct CallerStream {
    explicit CallerStream(c10::cuda::CUDAStream stream)
        : stream(stream), pool(at::cuda::graph_pool_handle()) {}
    const c10::cuda::CUDAStream stream;
    // Dies with its last graph.
    at::cuda::MempoolId_t pool;
    std::mutex mutex;
    // The latest used first.
    std::list<std::unique_ptr<Graph>> graphs;
  };

  std::shared_ptr<CallerStream> current_stream();
  torch::Tensor forward(const UNetInput& input);
  torch::Tensor eager(const UNetInput& input, const char* reason);
  Graph* find(CallerStream& caller, const CallKey& key);
  bool failed() const;
  std::unique_ptr<Graph> capture(CallerStream& caller, const UNetInput& input, CallKey key);
  void warm_up(const Graph& graph, CallerStream& caller) const;
  void record(Graph& graph, CallerStream& caller) const;

  std::shared_ptr<const UNet> unet;
  CudaGraphUNetOptions options;
  // Guards what follows.
  mutable std::mutex mutex;
  std::vector<std::shared_ptr<CallerStream>> callers;
  CudaGraphReport report;
};

std::shared_ptr<CudaGraphUNet::State::CallerStream> CudaGraphUNet::State::current_stream() {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const std::lock_guard lock(mutex);
  for (const auto& caller : callers)
    if (caller->stream == stream) return caller;
  return callers.emplace_back(std::make_shared<CallerStream>(stream));
}

torch::Tensor CudaGraphUNet::State::eager(const UNetInput& input, const char* reason) {
  {
    const std::lock_guard lock(mutex);
    ++report.eager[reason];
  }
  return unet->forward(input);
}

Graph* CudaGraphUNet::State::find(CallerStream& caller, const CallKey& key) {
  auto& graphs = caller.graphs;
  const auto found = std::find_if(graphs.begin(), graphs.end(),
                                  [&key](const auto& graph) { return graph->key == key; });
  if (found == graphs.end()) return nullptr;
  graphs.splice(graphs.begin(), graphs, found);
  return graphs.front().get();
}

bool CudaGraphUNet::State::failed() const {
  const std::lock_guard lock(mutex);
  return !report.failure.empty();
}

void CudaGraphUNet::State::warm_up(const Graph& graph, CallerStream& caller) const {
  caller.stream.synchronize();
  const auto stream = capture_stream(caller.stream);
  const c10::cuda::CUDAStreamGuard on(stream);
  for (std::int64_t i = 0; i < options.warmup_runs; ++i) run_apart(*unet, graph.input, nullptr);
  stream.synchronize();
}

void CudaGraphUNet::State::record(Graph& graph, CallerStream& caller) const {
  const c10::cuda::CUDAStreamGuard on(capture_stream(caller.stream));
  graph.graph.capture_begin(caller.pool, cudaStreamCaptureModeThreadLocal);
  try {
    graph.output = run_apart(*unet, graph.input, &graph);
    graph.graph.capture_end();
  } catch (...) {
    abandon(graph.graph, caller.stream.device_index(), caller.pool);
    throw;
  }
}

// Returns nothing if it cannot be captured.
std::unique_ptr<Graph> CudaGraphUNet::State::capture(CallerStream& caller, const UNetInput& input,
                                                     CallKey key) {
  auto graph = std::make_unique<Graph>();
  graph->key = std::move(key);
  graph->input = input;
  for_each_tensor(graph->input, input, [](torch::Tensor& own, const torch::Tensor& t) {
    if (t.defined()) own = t.clone(at::MemoryFormat::Preserve);
  });
  // In the whole process: the allocator cannot take two captures at once.
  static std::mutex one_at_a_time;
  const std::lock_guard lock_captures(one_at_a_time);
  const auto until_the_end = c10::make_scope_exit([] { capturing = false; });
  capturing = true;
  // What the UNet or a hook throws here goes on to the caller.
  warm_up(*graph, caller);
  try {
    record(*graph, caller);
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex);
    report.failure = plain_message(error);
    if (caller.graphs.empty()) caller.pool = at::cuda::graph_pool_handle();
    return nullptr;
  }
  const std::lock_guard lock(mutex);
  ++report.captures;
  return graph;
}

torch::Tensor CudaGraphUNet::State::forward(const UNetInput& input) {
  if (const auto* reason = reason_to_be_eager(input)) return eager(input, reason);
  if (capturing) return eager(input, "another capture is under way");
  const torch::NoGradGuard no_grad;
  // A graph's own tensors outlive the caller's mode.
  const c10::InferenceMode ordinary_tensors(false);
  const c10::cuda::CUDAGuard device(input.x.device());
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    return eager(input, "the caller captures a graph itself");
  const auto caller = current_stream();
  const std::lock_guard lock(caller->mutex);
  auto key = key_of(input);
  auto* graph = find(*caller, key);
  if (!graph) {
    if (failed()) return eager(input, "a capture failed");
    auto captured = capture(*caller, input, std::move(key));
    if (!captured) return eager(input, "a capture failed");
    if (caller->graphs.size() == options.max_graphs) caller->graphs.pop_back();
    caller->graphs.push_front(std::move(captured));
    graph = caller->graphs.front().get();
  }
  {
    const std::lock_guard counting(mutex);
    ++report.replays;
  }
  return graph->replay(input);
}

#else

struct CudaGraphUNet::State {
  torch::Tensor forward(const UNetInput& input) {
    const auto* reason = reason_to_be_eager(input);
    {
      const std::lock_guard lock(mutex);
      ++report.eager[reason ? reason : "this library was built without CUDA"];
    }
    return unet->forward(input);
  }

  std::shared_ptr<const UNet> unet;
  CudaGraphUNetOptions options;
  mutable std::mutex mutex;
  CudaGraphReport report;
};

#endif

CudaGraphUNet::CudaGraphUNet(std::shared_ptr<const UNet> unet, const CudaGraphUNetOptions& options)
    : state_(std::make_unique<State>()) {
  TORCH_CHECK_VALUE(unet, "[CudaGraphUNet] unet must not be null.");
  TORCH_CHECK_VALUE(options.max_graphs >= 1, "[CudaGraphUNet] max_graphs must be at least 1, got ",
                    options.max_graphs, ".");
  TORCH_CHECK_VALUE(options.warmup_runs >= 1,
                    "[CudaGraphUNet] warmup_runs must be at least 1, got ", options.warmup_runs,
                    ".");
  state_->unet = std::move(unet);
  state_->options = options;
}

CudaGraphUNet::~CudaGraphUNet() = default;

torch::Tensor CudaGraphUNet::forward(const UNetInput& input) const {
  return state_->forward(input);
}

std::vector<AttentionSiteInfo> CudaGraphUNet::attention_sites() const {
  return state_->unet->attention_sites();
}

std::vector<AttentionSiteInfo> CudaGraphUNet::cross_attention_sites() const {
  return state_->unet->cross_attention_sites();
}

std::vector<AttentionSiteInfo> CudaGraphUNet::block_sites() const {
  return state_->unet->block_sites();
}

std::string CudaGraphUNet::note_on_sites() const {
  return state_->unet->note_on_sites();
}

std::int64_t CudaGraphUNet::max_rows() const {
  return state_->unet->max_rows();
}

std::int64_t CudaGraphUNet::evaluated_rows(c10::IntArrayRef x) const {
  return state_->unet->evaluated_rows(x);
}

torch::Device CudaGraphUNet::device() const {
  return state_->unet->device();
}

torch::ScalarType CudaGraphUNet::dtype() const {
  return state_->unet->dtype();
}

#ifdef SAG_WITH_CUDA

CudaGraphReport CudaGraphUNet::report() const {
  std::vector<std::shared_ptr<State::CallerStream>> callers;
  CudaGraphReport report;
  {
    const std::lock_guard lock(state_->mutex);
    callers = state_->callers;
    report = state_->report;
  }
  for (const auto& caller : callers) {
    const std::lock_guard lock(caller->mutex);
    report.graphs += static_cast<std::int64_t>(caller->graphs.size());
    if (caller->graphs.empty()) continue;
    for (const auto& segment : c10::cuda::CUDACachingAllocator::snapshot(caller->pool).segments)
      report.bytes += static_cast<std::int64_t>(segment.total_size);
  }
  return report;
}

void CudaGraphUNet::release() {
  std::vector<std::shared_ptr<State::CallerStream>> callers;
  {
    const std::lock_guard lock(state_->mutex);
    callers = state_->callers;
  }
  for (const auto& caller : callers) {
    const std::lock_guard lock(caller->mutex);
    caller->stream.synchronize();
    caller->graphs.clear();
    caller->pool = at::cuda::graph_pool_handle();
  }
}

#else

CudaGraphReport CudaGraphUNet::report() const {
  const std::lock_guard lock(state_->mutex);
  return state_->report;
}

void CudaGraphUNet::release() {}

#endif

}  // namespace sag

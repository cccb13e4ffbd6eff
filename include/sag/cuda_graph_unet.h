#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/unet.h"

namespace sag {

/// How many graphs are kept, and how they are made.
struct CudaGraphUNetOptions {
  /// Graphs kept per CUDA stream; the least recently used one is dropped first. A guided CFG step
  /// replays two: one for both branches, one for the guidance's own evaluation.
  std::size_t max_graphs = 8;
  /// Eager runs before a capture: libraries choose their kernels and workspaces in them.
  std::int64_t warmup_runs = 3;
};

/// What a `CudaGraphUNet` did so far.
struct CudaGraphReport {
  /// Graphs kept now.
  std::int64_t graphs = 0;
  /// Device memory that their pools hold now.
  std::int64_t bytes = 0;
  /// Calls that were captured.
  std::int64_t captures = 0;
  /// Calls that replayed a graph.
  std::int64_t replays = 0;
  /// Calls that ran without a graph, by reason.
  std::map<std::string, std::int64_t> eager = {};
  /// Why a capture failed; empty if none did. After a failure nothing new is captured, and calls
  /// without a graph are eager.
  std::string failure = {};
};

/// Runs another UNet as CUDA graphs: the first call of its kind is captured, later ones are
/// replayed, which costs the host next to nothing. Two calls are of one kind if their shapes,
/// dtypes, groups of rows, active hooks and stream are the same. The values are those of the UNet
/// run eagerly, to the bit if the kernels are the same.
///
/// Only hooks declared capturable run inside a graph (`AttentionHookOptions::capturable`): their
/// host code runs at capture, and what they recorded is recorded again at each replay. With any
/// other active hook, on the CPU, under autocast, or while the caller captures a graph itself,
/// calls are eager.
///
/// May be used from several threads. Threads with streams of their own wait for each other only
/// during captures. Each CUDA stream on which it was called keeps its graphs as long as this object
/// lives, and a stream for captures as long as the process: use few streams, again and again.
/// `forward` and the other functions are those of the wrapped UNet.
class SAG_API CudaGraphUNet final : public UNet {
 public:
  /// Throws ValueError when `unet` is null or an option is out of range.
  explicit CudaGraphUNet(std::shared_ptr<const UNet> unet,
                         const CudaGraphUNetOptions& options = {});
  ~CudaGraphUNet() override;

  torch::Tensor forward(const UNetInput& input) const override;
  std::vector<AttentionSiteInfo> attention_sites() const override;
  std::vector<AttentionSiteInfo> cross_attention_sites() const override;
  std::vector<AttentionSiteInfo> block_sites() const override;
  std::string note_on_sites() const override;
  std::int64_t max_rows() const override;
  std::int64_t evaluated_rows(c10::IntArrayRef x) const override;
  torch::Device device() const override;
  torch::ScalarType dtype() const override;

  /// Returns what was done so far.
  CudaGraphReport report() const;
  /// Drops all graphs. Their memory goes back to LibTorch's allocator, which frees it when its
  /// cache is emptied.
  void release();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sag

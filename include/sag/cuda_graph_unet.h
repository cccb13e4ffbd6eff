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

struct CudaGraphUNetOptions {
  /// Graphs kept per CUDA stream; the one that was not used for longest goes first. A guided CFG
  /// step replays two: both branches, and guidance's own evaluation.
  std::size_t max_graphs = 8;
  /// Eager runs before a capture, in which libraries choose their kernels and workspaces.
  std::int64_t warmup_runs = 3;
};

/// What a `CudaGraphUNet` did so far.
struct CudaGraphReport {
  std::int64_t graphs = 0;  ///< kept now
  std::int64_t bytes = 0;   ///< of device memory that their pools hold now
  std::int64_t captures = 0, replays = 0;
  /// Calls that ran without a graph, by reason.
  std::map<std::string, std::int64_t> eager = {};
  /// Why a capture failed; after that nothing new is captured, and calls without a graph are eager.
  /// Empty: none did.
  std::string failure = {};
};

/// Runs another UNet as CUDA graphs: the first call of its kind is captured, later ones are
/// replayed, which costs the host next to nothing. Calls are of one kind when shapes, dtypes, the
/// pass's groups of rows and the active hooks are the same, on one stream. Values are those of the
/// UNet run eagerly, to the bit for the same kernels.
///
/// Only hooks declared capturable run inside a graph (`AttentionHookOptions::capturable`): their
/// host code runs at capture, and what they recorded is recorded anew at each replay. With any
/// other active hook, on the CPU, under autocast, or while the caller captures a graph itself,
/// calls are eager.
///
/// May be used from several threads; on streams of their own they do not wait for each other, but
/// for captures. Each CUDA stream that it was called on keeps its graphs as long as the object
/// lives, and a stream for its captures as long as the process: call it on few, used again and
/// again. `forward` and the other functions are those of the wrapped UNet.
class SAG_API CudaGraphUNet final : public UNet {
 public:
  /// Throws ValueError when `unet` is null or an option is out of range.
  CudaGraphUNet(std::shared_ptr<const UNet> unet, const CudaGraphUNetOptions& options);
  explicit CudaGraphUNet(std::shared_ptr<const UNet> unet);
  ~CudaGraphUNet() override;

  torch::Tensor forward(const UNetInput& input) const override;
  std::vector<AttentionSiteInfo> attention_sites() const override;
  std::string note_on_sites() const override;
  std::int64_t max_rows() const override;
  torch::Device device() const override;
  torch::ScalarType dtype() const override;

  CudaGraphReport report() const;
  /// Drops all graphs. Their memory goes back to LibTorch's allocator, which frees it when it is
  /// told to empty its cache.
  void release();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sag

#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"
#include "sag/pass.h"

namespace sag {

/// What one guidance did in one evaluation of the model.
struct GuidanceNote {
  /// The name of its owner.
  std::string name = {};
  /// Whether it changed the result.
  bool guided = false;
  /// Why it did not guide; empty when it did.
  std::string reason = {};
  /// Where the guidance blurred the picture (one-pass SAG: what acts in the next step), [images, 1,
  /// height, width] bool on the latent's device; undefined if it has no such mask. It is a tensor
  /// so that nothing waits for the device inside a step.
  torch::Tensor mask = {};
};

/// The state of one evaluation of the denoiser: hooks write to it while the UNet runs, guidances
/// read it afterwards, and it ends with the evaluation. So no attention map can go stale, leak into
/// a clone or be shared between threads.
class SAG_API StepContext {
 public:
  /// `height` and `width` are the latent's.
  StepContext(double sigma, std::int64_t step_index, std::int64_t height, std::int64_t width);

  /// Returns the noise level.
  double sigma() const { return sigma_; }
  /// Returns the step that the evaluation belongs to (`CfgGuider::begin_run`).
  std::int64_t step_index() const { return step_index_; }
  /// Returns the latent's height.
  std::int64_t height() const { return height_; }
  /// Returns the latent's width.
  std::int64_t width() const { return width_; }

  /// A map recorded for some rows: [rows.count, tokens] fp32.
  struct Record {
    /// Which rows.
    RowGroup rows;
    /// [rows.count, tokens].
    torch::Tensor map;
  };

  /// Keeps `map` for the guidance `owner`. Safe from several threads. Recording the same rows again
  /// keeps the later map.
  void record(const Owner& owner, const RowGroup& rows, torch::Tensor map);
  /// Returns what was recorded for `owner`, in the order of recording.
  std::vector<Record> records(const Owner& owner) const;

  /// Takes over what `part` holds: its notes and, if `fault` is empty, its records. Otherwise
  /// `fault` becomes the skip reason of every owner that recorded there.
  void take(const StepContext& part, const std::string& fault = {});

  /// Returns what was recorded for all owners, in the order of recording.
  std::vector<std::pair<Owner, Record>> records() const;

  /// Notes that `owner` guided; `mask` is described at `GuidanceNote::mask`.
  void guided(const Owner& owner, torch::Tensor mask = {});
  /// Notes that `owner` could not or need not guide, and why. The first reason in an evaluation is
  /// kept.
  void skipped(const Owner& owner, std::string reason);
  /// Returns the reason noted for `owner`, or an empty string.
  std::string skip_reason(const Owner& owner) const;
  /// Returns the owners that did not guide, and why.
  std::vector<std::pair<Owner, std::string>> skips() const;
  /// Returns one note per guidance, in the order in which they were made.
  std::vector<GuidanceNote> notes() const;

 private:
  GuidanceNote& note(const Owner& owner);

  double sigma_;
  std::int64_t step_index_, height_, width_;
  mutable std::mutex mutex_;
  std::vector<std::pair<Owner, Record>> records_;
  std::vector<std::pair<Owner, GuidanceNote>> notes_;
};

}  // namespace sag

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/export.h"

namespace sag {

class StepContext;

/// Which prompt a row of a UNet batch belongs to.
enum class Branch { cond, uncond };

/// Who asked for rows of a UNet batch: the main pass, or one guidance for an evaluation of its own.
/// Copies are equal. A named owner differs from every other, even one of the same name.
class SAG_API Owner {
 public:
  /// The main pass.
  Owner() = default;
  /// A new guidance; `name` is what reports call it.
  explicit Owner(std::string name);

  /// The main pass.
  static const Owner main;

  /// Returns the name; empty: the main pass.
  const std::string& name() const;
  /// Whether both are the main pass, or copies of one named owner.
  bool operator==(const Owner&) const = default;

 private:
  std::shared_ptr<const std::string> name_;
};

/// A rectangle of a latent, in latent cells.
struct Area {
  /// Number of rows of cells.
  std::int64_t height = 0;
  /// Number of columns of cells.
  std::int64_t width = 0;
  /// The first row.
  std::int64_t y = 0;
  /// The first column.
  std::int64_t x = 0;
  /// Compares all fields.
  bool operator==(const Area&) const = default;
};

/// Rows of a UNet batch that belong together: one conditioning of one branch, asked for by one
/// owner, one row per image. A row limit can split a group over several UNet calls.
struct SAG_API RowGroup {
  /// The first row.
  std::int64_t begin = 0;
  /// Number of rows.
  std::int64_t count = 0;
  /// The image that the first row shows; row `begin + i` shows image `image + i`.
  std::int64_t image = 0;
  /// Which prompts the rows stand for.
  Branch branch = Branch::cond;
  /// Which of several positives or negatives.
  std::int64_t entry = 0;
  /// Who asked for the rows.
  Owner owner = {};
  /// The part of the latent that the rows show; unset: all of it.
  std::optional<Area> area = {};
  /// How much the rows count in the branch's prediction, [1 or count, 1, h, w] over the area.
  /// Undefined: the same everywhere.
  torch::Tensor weight = {};
  /// The tokens of each prompt in the rows' context, in order (`Conditioning::context_parts`); one
  /// number where there is one prompt. Where rows with fewer tokens share a call, their context is
  /// repeated as a whole. Empty: no context, or unknown.
  std::vector<std::int64_t> context_parts = {};

  /// Returns these rows of `t`, a view: t[begin : begin + count].
  torch::Tensor of(const torch::Tensor& t) const;
  /// Returns `rows` of these rows, from `offset` on, with their images and weights.
  RowGroup part(std::int64_t offset, std::int64_t rows) const;
};

/// One call of the UNet, as hooks see it: what each of its rows is. A hook asks the pass instead of
/// guessing the order of a batch (ComfyUI: `cond_or_uncond`).
struct SAG_API Pass {
  /// The noise level.
  double sigma = 0;
  /// Index of the sampler step that this evaluation belongs to (see `CfgGuider`).
  std::int64_t step_index = 0;
  /// Height of the UNet's input in this pass: the latent's, or an area's.
  std::int64_t height = 0;
  /// Width of the same.
  std::int64_t width = 0;
  /// In row order, without gaps. Empty where it is unknown what the rows are (`AttentionScope`).
  std::vector<RowGroup> groups = {};
  /// Where hooks record what a guidance reads after the evaluation; never null while a hook runs.
  StepContext* step = nullptr;

  /// Number of rows of the UNet batch.
  std::int64_t size() const;
  /// Returns the pass of `count` rows from `begin` on: their groups, numbered from 0.
  Pass part(std::int64_t begin, std::int64_t count) const;
  /// Returns the groups of a branch that `owner` asked for.
  std::vector<RowGroup> rows(Branch branch, const Owner& owner = Owner::main) const;
  /// Returns the group's rows of q, k, v or probabilities as [count, heads, tokens, head_dim], a
  /// view. UNets lay out heads in three ways, and all are accepted: [rows, heads, tokens,
  /// head_dim], [rows * heads, tokens, head_dim] and [rows * heads, 1, tokens, head_dim]. Throws
  /// ValueError when the first dimension is not a multiple of the pass's rows.
  torch::Tensor select(const RowGroup& group, const torch::Tensor& t) const;
};

}  // namespace sag

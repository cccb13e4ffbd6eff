#include "sag/pass.h"

#include <algorithm>
#include <utility>

namespace sag {

const Owner Owner::main;

Owner::Owner(std::string name) : name_(std::make_shared<const std::string>(std::move(name))) {}

const std::string& Owner::name() const {
  static const std::string main_pass = "main";
  return name_ ? *name_ : main_pass;
}

torch::Tensor RowGroup::of(const torch::Tensor& t) const {
  return t.narrow(0, begin, count);
}

RowGroup RowGroup::part(std::int64_t offset, std::int64_t rows) const {
  auto group = *this;
  group.begin += offset;
  group.image += offset;
  group.count = rows;
  if (weight.defined() && weight.size(0) > 1) group.weight = weight.narrow(0, offset, rows);
  return group;
}

std::int64_t Pass::size() const {
  return groups.empty() ? 0 : groups.back().begin + groups.back().count;
}

Pass Pass::part(std::int64_t begin, std::int64_t count) const {
  auto some = *this;
  some.groups.clear();
  for (const auto& group : groups) {
    const auto first = std::max(begin, group.begin);
    const auto last = std::min(begin + count, group.begin + group.count);
    if (first >= last) continue;
    some.groups.push_back(group.part(first - group.begin, last - first));
    some.groups.back().begin = first - begin;
  }
  return some;
}

std::vector<RowGroup> Pass::rows(Branch branch, const Owner& owner) const {
  std::vector<RowGroup> found;
  for (const auto& group : groups)
    if (group.branch == branch && group.owner == owner) found.push_back(group);
  return found;
}

torch::Tensor Pass::select(const RowGroup& group, const torch::Tensor& t) const {
  TORCH_CHECK_VALUE(t.dim() == 3 || t.dim() == 4,
                    "[Pass::select] t must have 3 or 4 dimensions, got shape ", t.sizes(), ".");
  TORCH_CHECK_VALUE(size() > 0 && t.size(0) % size() == 0,
                    "[Pass::select] the first dimension must be a multiple of the ", size(),
                    " rows of the pass, got shape ", t.sizes(), ".");
  const auto heads_in_rows = t.size(0) / size();
  if (t.dim() == 4 && heads_in_rows == 1) return group.of(t);

  TORCH_CHECK_VALUE(
      t.dim() == 3 || t.size(1) == 1,
      "[Pass::select] heads must be either in the rows or in the second dimension, got shape ",
      t.sizes(), " for ", size(), " rows.");
  // [rows * heads, tokens, head_dim]
  const auto tokens = t.dim() == 3 ? t : t.squeeze(1);
  return group.of(tokens.unflatten(0, {size(), heads_in_rows}));
}

}  // namespace sag

#include "sag/step_context.h"

namespace sag {
namespace {

bool same_rows(const RowGroup& a, const RowGroup& b) {
  return a.branch == b.branch && a.entry == b.entry && a.owner == b.owner && a.area == b.area &&
         a.image == b.image && a.count == b.count;
}

}  // namespace

StepContext::StepContext(double sigma, std::int64_t step_index, std::int64_t height,
                         std::int64_t width)
    : sigma_(sigma), step_index_(step_index), height_(height), width_(width) {}

void StepContext::record(const Owner& owner, const RowGroup& rows, torch::Tensor map) {
  TORCH_CHECK_VALUE(map.dim() == 2 && map.size(0) == rows.count,
                    "[StepContext::record] map must have shape [", rows.count, ", tokens], got ",
                    map.sizes(), ".");
  const std::lock_guard lock(mutex_);
  for (auto& [by, record] : records_) {
    if (by == owner && same_rows(record.rows, rows)) {
      record = {rows, std::move(map)};
      return;
    }
  }
  records_.emplace_back(owner, Record{rows, std::move(map)});
}

std::vector<StepContext::Record> StepContext::records(const Owner& owner) const {
  const std::lock_guard lock(mutex_);
  std::vector<Record> found;
  for (const auto& [by, record] : records_)
    if (by == owner) found.push_back(record);
  return found;
}

std::vector<std::pair<Owner, StepContext::Record>> StepContext::records() const {
  const std::lock_guard lock(mutex_);
  return records_;
}

void StepContext::take(const StepContext& part, const std::string& fault) {
  for (const auto& [owner, recorded] : part.records()) {
    if (fault.empty())
      record(owner, recorded.rows, recorded.map);
    else
      skipped(owner, fault);
  }
  decltype(notes_) notes;
  {
    const std::lock_guard lock(part.mutex_);
    notes = part.notes_;
  }
  for (const auto& [owner, entry] : notes) {
    if (entry.guided)
      guided(owner, entry.mask);
    else
      skipped(owner, entry.reason);
  }
}

void StepContext::guided(const Owner& owner, torch::Tensor mask) {
  const std::lock_guard lock(mutex_);
  auto& entry = note(owner);
  entry.guided = true;
  entry.reason.clear();
  entry.mask = std::move(mask);
}

void StepContext::skipped(const Owner& owner, std::string reason) {
  const std::lock_guard lock(mutex_);
  auto& entry = note(owner);
  if (!entry.guided && entry.reason.empty()) entry.reason = std::move(reason);
}

std::string StepContext::skip_reason(const Owner& owner) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [by, entry] : notes_)
    if (by == owner) return entry.reason;
  return {};
}

std::vector<std::pair<Owner, std::string>> StepContext::skips() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<Owner, std::string>> found;
  for (const auto& [by, entry] : notes_)
    if (!entry.reason.empty()) found.emplace_back(by, entry.reason);
  return found;
}

std::vector<GuidanceNote> StepContext::notes() const {
  const std::lock_guard lock(mutex_);
  std::vector<GuidanceNote> all;
  for (const auto& entry : notes_) all.push_back(entry.second);
  return all;
}

GuidanceNote& StepContext::note(const Owner& owner) {
  for (auto& [by, entry] : notes_)
    if (by == owner) return entry;
  return notes_.emplace_back(owner, GuidanceNote{.name = owner.name()}).second;
}

}  // namespace sag

#include "row_calls.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "sag/attention_scope.h"

namespace sag {
namespace {

// `rows` rows from `begin` on; where they end, the last one again.
torch::Tensor filled_rows(const torch::Tensor& t, std::int64_t begin, std::int64_t rows) {
  if (!t.defined()) return t;
  const auto count = std::min(rows, t.size(0) - begin);
  const auto given = t.narrow(0, begin, count);
  if (count == rows) return given;
  auto sizes = t.sizes().vec();
  sizes[0] = rows - count;
  return at::cat({given, given.narrow(0, count - 1, 1).expand(sizes)});
}

UNetInput filled_rows(const UNetInput& input, std::int64_t begin, std::int64_t rows) {
  UNetInput part{.x = filled_rows(input.x, begin, rows),
                 .timesteps = filled_rows(input.timesteps, begin, rows),
                 .context = filled_rows(input.context, begin, rows),
                 .y = filled_rows(input.y, begin, rows)};
  for (const auto& [name, t] : input.extra) part.extra[name] = filled_rows(t, begin, rows);
  return part;
}

// The pass of one call.
Pass filled_pass(const Pass& whole, std::int64_t begin, std::int64_t rows) {
  static const Owner filler("filler");
  auto pass = whole.part(begin, rows);
  // Where it is unknown what the rows are, nothing is added to that.
  if (pass.groups.empty() || pass.size() == rows) return pass;
  const auto last = pass.groups.back();
  pass.groups.push_back({.begin = pass.size(),
                         .count = rows - pass.size(),
                         .image = last.image + last.count - 1,
                         .branch = last.branch,
                         .owner = filler,
                         .context_parts = last.context_parts});
  return pass;
}

}  // namespace

torch::Tensor run_in_calls_of(std::int64_t rows, const UNetInput& input,
                              const std::function<torch::Tensor(const UNetInput&)>& call) {
  const auto asked = input.x.size(0);
  std::vector<torch::Tensor> results;
  for (std::int64_t begin = 0; begin < asked; begin += rows) {
    const auto part = filled_rows(input, begin, rows);
    const auto run = [&] { return call(part); };
    const auto hooks = AttentionScope::hooks();
    const auto out = hooks.empty()
                         ? run()
                         : run_hooked({hooks.begin(), hooks.end()},
                                      filled_pass(*AttentionScope::pass(), begin, rows), run);
    results.push_back(out.narrow(0, 0, std::min(rows, asked - begin)));
  }
  return at::cat(results);
}

std::int64_t rows_in_calls_of(std::int64_t rows, std::int64_t asked) {
  return (asked + rows - 1) / rows * rows;
}

bool same_rows(const torch::Tensor& got, const torch::Tensor& expected, torch::ScalarType dtype) {
  if (got.sizes() != expected.sizes()) return false;
  const auto wide = expected.to(torch::kFloat);
  const auto size = wide.norm().item<double>();
  if (!std::isfinite(size) || size == 0) return true;
  const bool half = dtype == torch::kHalf || dtype == torch::kBFloat16;
  // TF32 is allowed for fp32. Rows that are mixed differ by much more, as each has its own noise.
  const double tolerance = half ? 0.05 : 0.01;
  return (got.to(torch::kFloat) - wide).norm().item<double>() <= tolerance * size;
}

UNetInput with_noise(const UNetInput& input) {
  auto generator = at::detail::createCPUGenerator(1);
  const auto noisy = [&](const torch::Tensor& t) {
    if (!t.defined() || !t.is_floating_point()) return t;
    const auto noise = at::randn(t.sizes(), generator,
                                 at::TensorOptions().dtype(torch::kFloat).device(torch::kCPU));
    return t + noise.to(t.device(), t.scalar_type());
  };
  UNetInput random{.x = noisy(input.x),
                   .timesteps = input.timesteps,
                   .context = noisy(input.context),
                   .y = noisy(input.y)};
  for (const auto& [name, t] : input.extra) random.extra[name] = noisy(t);
  return random;
}

}  // namespace sag

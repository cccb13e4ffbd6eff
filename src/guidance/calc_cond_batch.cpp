#include "sag/calc_cond_batch.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include <ATen/ATen.h>

#include "model/conditioning_checks.h"
#include "model/latent.h"
#include "model/site_list.h"
#include "sag/attention_scope.h"

namespace sag {
namespace {

/// A conditioning of a request, on some of its images; one group of rows is made from it.
struct Item {
  std::size_t request = 0;
  const Conditioning* cond = nullptr;
  // All but `begin`.
  RowGroup rows;
  // Cropped to the area: the rows' noisy latent, and the conditioning's further channels and
  // inputs.
  torch::Tensor x, concat;
  std::map<std::string, torch::Tensor> extra;
};

Area clipped(const Area& area, std::int64_t height, std::int64_t width) {
  return {std::min(area.height, height - area.y), std::min(area.width, width - area.x), area.y,
          area.x};
}

torch::Tensor crop(const torch::Tensor& t, const std::optional<Area>& area) {
  return area ? t.narrow(-2, area->y, area->height).narrow(-1, area->x, area->width) : t;
}

// Crops inputs that match the latent cell by cell (ComfyUI: `CONDNoiseShape`); the rest, tokens and
// features, stays as it is for the area.
std::map<std::string, torch::Tensor> crop_pictures(std::map<std::string, torch::Tensor> extra,
                                                   const std::optional<Area>& area,
                                                   const torch::Tensor& x) {
  for (auto& [name, t] : extra)
    if (t.defined() && t.dim() == 4 && t.size(2) == x.size(2) && t.size(3) == x.size(3))
      t = crop(t, area);
  return extra;
}

std::vector<std::int64_t> parts_of(const Conditioning& cond) {
  if (!cond.context_parts.empty() || !cond.context.defined()) return cond.context_parts;
  return {cond.context.size(1)};
}

torch::Tensor images_of(const torch::Tensor& t, std::int64_t image, std::int64_t count) {
  return t.defined() && t.size(0) > 1 ? t.narrow(0, image, count) : t;
}

// Fades the weight in over up to 8 cells from each edge of the area that lies inside the latent.
void feather(torch::Tensor& weight, const Area& area, std::int64_t height, std::int64_t width) {
  const auto fade = [&](std::int64_t dim, std::int64_t side, bool at_begin, bool at_end) {
    const auto reach = std::min<std::int64_t>(8, side / 4);
    for (std::int64_t t = 0; t < reach; ++t) {
      const auto factor = static_cast<double>(t + 1) / static_cast<double>(reach);
      if (at_begin) weight.narrow(dim, t, 1).mul_(factor);
      if (at_end) weight.narrow(dim, side - 1 - t, 1).mul_(factor);
    }
  };
  fade(2, area.height, area.y > 0, area.y + area.height < height);
  fade(3, area.width, area.x > 0, area.x + area.width < width);
}

// Returns how much each cell of the prediction counts, [1 or images, 1, h, w]; undefined: 1
// everywhere.
torch::Tensor weight_of(const Conditioning& cond, const std::optional<Area>& area,
                        const torch::Tensor& x) {
  const auto height = x.size(2), width = x.size(3);
  if (!cond.mask.defined() && !area && cond.strength == 1) return {};
  const auto options = x.options().dtype(torch::kFloat);
  if (cond.mask.defined()) {
    const auto mask = cond.mask.dim() == 2 ? cond.mask.unsqueeze(0) : cond.mask;
    return crop(mask.unsqueeze(1).to(options), area) * cond.strength;
  }
  auto weight = torch::full({1, 1, area ? area->height : height, area ? area->width : width},
                            cond.strength, options);
  if (area) feather(weight, *area, height, width);
  return weight;
}

std::vector<Item> items_of(std::span<const CondRequest> requests, double sigma,
                           std::int64_t max_rows) {
  std::vector<Item> items;
  for (std::size_t r = 0; r < requests.size(); ++r) {
    const auto& request = requests[r];
    const auto& x = request.x;
    const auto images = x.size(0), height = x.size(2), width = x.size(3);
    const auto rows_at_once = max_rows > 0 ? std::min(max_rows, images) : images;
    for (std::size_t entry = 0; entry < request.conds.size(); ++entry) {
      const auto& cond = request.conds[entry];
      check_conditioning(cond, images, height, width, "calc_cond_batch");
      if (!is_active(cond, sigma)) continue;
      const auto area =
          cond.area ? std::optional(clipped(*cond.area, height, width)) : std::nullopt;
      const auto weight = weight_of(cond, area, x);
      const auto concat = cond.concat.defined() ? crop(cond.concat, area) : cond.concat;
      const auto extra = crop_pictures(cond.extra, area, x);
      for (std::int64_t image = 0; image < images; image += rows_at_once) {
        const auto count = std::min(rows_at_once, images - image);
        const RowGroup rows{.count = count,
                            .image = image,
                            .branch = request.branch,
                            .entry = static_cast<std::int64_t>(entry),
                            .owner = request.owner,
                            .area = area,
                            .weight = images_of(weight, image, count),
                            .context_parts = parts_of(cond)};
        items.push_back({r, &cond, rows, crop(x.narrow(0, image, count), area), concat, extra});
      }
    }
  }
  return items;
}

bool same_tail(const torch::Tensor& a, const torch::Tensor& b) {
  if (a.defined() != b.defined()) return false;
  return !a.defined() ||
         (a.sizes().slice(1) == b.sizes().slice(1) && a.scalar_type() == b.scalar_type());
}

// Cross-attention does not notice that tokens are repeated, so contexts may differ in length there,
// but not so much that the repetition costs more than another call (ComfyUI:
// `CONDCrossAttn.can_concat`). Joint attention does notice.
bool contexts_fit(const torch::Tensor& a, const torch::Tensor& b, const UNet& unet) {
  if (same_tail(a, b)) return true;
  if (!a.defined() || !b.defined() || a.size(2) != b.size(2)) return false;
  const auto common = std::lcm(a.size(1), b.size(1));
  const bool is_cross =
      is_known_unet(unet.attention_sites()) || !unet.cross_attention_sites().empty();
  return common / std::min(a.size(1), b.size(1)) <= 4 && is_cross;
}

bool fits_together(const Item& a, const Item& b, const UNet& unet) {
  const auto same_extra = [](const auto& p, const auto& q) {
    return p.first == q.first && same_tail(p.second, q.second);
  };
  return a.x.sizes().slice(1) == b.x.sizes().slice(1) && same_tail(a.concat, b.concat) &&
         contexts_fit(a.cond->context, b.cond->context, unet) && same_tail(a.cond->y, b.cond->y) &&
         std::equal(a.extra.begin(), a.extra.end(), b.extra.begin(), b.extra.end(), same_extra);
}

// Takes the first item and all later ones that fit into one UNet call with it.
std::vector<Item> take_batch(std::vector<Item>& items, std::int64_t max_rows, const UNet& unet) {
  std::vector<Item> batch;
  std::int64_t rows = 0;
  const auto fits = [&](const Item& item) {
    return batch.empty() || ((max_rows == 0 || rows + item.rows.count <= max_rows) &&
                             std::all_of(batch.begin(), batch.end(), [&](const Item& other) {
                               return fits_together(other, item, unet);
                             }));
  };
  std::vector<Item> rest;
  for (auto& item : items) {
    if (fits(item)) {
      rows += item.rows.count;
      batch.push_back(std::move(item));
    } else {
      rest.push_back(std::move(item));
    }
  }
  items = std::move(rest);
  return batch;
}

// Joins one tensor of every item in a batch, repeated for the item's rows.
template <class Get>
torch::Tensor join(const std::vector<Item>& batch, Get get) {
  std::vector<torch::Tensor> parts;
  for (const auto& item : batch) {
    const auto part = images_of(get(item), item.rows.image, item.rows.count);
    if (!part.defined()) return {};
    auto sizes = part.sizes().vec();
    sizes[0] = item.rows.count;
    parts.push_back(part.expand(sizes));
  }
  return at::cat(parts);
}

Conditioning joined_conditioning(const std::vector<Item>& batch) {
  std::int64_t tokens = 1;
  for (const auto& item : batch)
    if (item.cond->context.defined()) tokens = std::lcm(tokens, item.cond->context.size(1));

  Conditioning joined;
  joined.context = join(batch, [&](const Item& item) {
    const auto& context = item.cond->context;
    return context.defined() ? context.repeat({1, tokens / context.size(1), 1}) : context;
  });
  joined.y = join(batch, [](const Item& item) { return item.cond->y; });
  joined.concat = join(batch, [](const Item& item) { return item.concat; });
  for (const auto& [name, tensor] : batch.front().extra)
    joined.extra[name] = join(batch, [&name](const Item& item) { return item.extra.at(name); });
  return joined;
}

Pass pass_of(std::vector<Item>& batch, double sigma, StepContext& step) {
  Pass pass{.sigma = sigma,
            .step_index = step.step_index(),
            .height = batch.front().x.size(2),
            .width = batch.front().x.size(3),
            .step = &step};
  for (auto& item : batch) {
    item.rows.begin = pass.size();
    pass.groups.push_back(item.rows);
  }
  return pass;
}

// A hook without a site would never run, and nobody would notice.
void check_sites(const std::vector<InstalledHook>& active) {
  for (const auto& hook : active)
    TORCH_CHECK_VALUE(!hook.site.empty(),
                      "[calc_cond_batch] the sites of all active hooks must be decided "
                      "(ModelPatcher::decide_sites, or name them), got an undecided \"middle\".");
}

torch::Tensor evaluate(const ModelPatcher& model, const std::vector<Item>& batch, const Pass& pass,
                       double sigma) {
  std::vector<torch::Tensor> x;
  for (const auto& item : batch) x.push_back(item.x);
  auto hooks = active_hooks(model.attention_hooks(), *pass.step);
  check_sites(hooks);
  return run_hooked(std::move(hooks), pass, [&] {
    return model.denoiser()(at::cat(x), sigma, joined_conditioning(batch));
  });
}

/// A request's prediction while it is summed: the weighted sum of its parts, and the sum of their
/// weights (undefined: 1 everywhere, as for one conditioning on the whole latent).
struct Sum {
  torch::Tensor value, weight;
};

void add(Sum& sum, const Item& item, const torch::Tensor& denoised, const torch::Tensor& x) {
  const auto& rows = item.rows;
  if (!sum.value.defined() && !rows.weight.defined() && !rows.area && rows.count == x.size(0)) {
    sum.value = denoised;
    return;
  }
  if (!sum.weight.defined()) {
    const std::vector<std::int64_t> cells = {x.size(0), 1, x.size(2), x.size(3)};
    sum.weight = sum.value.defined() ? at::ones(cells, denoised.options())
                                     : at::zeros(cells, denoised.options());
    sum.value = sum.value.defined() ? sum.value.clone() : at::zeros(x.sizes(), denoised.options());
  }
  const auto part = [&](const torch::Tensor& t) {
    return crop(t.narrow(0, rows.image, rows.count), rows.area);
  };
  part(sum.value).add_(rows.weight.defined() ? denoised * rows.weight : denoised);
  part(sum.weight).add_(rows.weight.defined() ? rows.weight : at::ones({1}, denoised.options()));
}

// 0 means no limit.
std::int64_t smaller_limit(std::int64_t a, std::int64_t b) {
  return a == 0 || b == 0 ? std::max(a, b) : std::min(a, b);
}

// A cell that no conditioning covers is 0, as in the reference.
torch::Tensor average(const Sum& sum) {
  if (!sum.weight.defined()) return sum.value;
  return at::where(sum.weight != 0, sum.value / sum.weight, 0.0);
}

void check_requests(std::span<const CondRequest> requests, const CalcCondBatchOptions& options) {
  TORCH_CHECK_VALUE(options.max_rows >= 0, "[calc_cond_batch] max_rows must be at least 0, got ",
                    options.max_rows, ".");
  for (const auto& request : requests) check_latent(request.x, "x", "calc_cond_batch");
}

}  // namespace

CondBatch calc_cond_batch(const ModelPatcher& model, std::span<const CondRequest> requests,
                          double sigma, StepContext& step, const CalcCondBatchOptions& options) {
  check_requests(requests, options);
  const torch::NoGradGuard no_grad;
  CondBatch result;
  std::vector<Sum> sums(requests.size());
  const auto max_rows = smaller_limit(options.max_rows, model.unet().max_rows());
  for (auto items = items_of(requests, sigma, max_rows); !items.empty();) {
    auto batch = take_batch(items, max_rows, model.unet());
    const auto pass = pass_of(batch, sigma, step);
    const auto denoised = evaluate(model, batch, pass, sigma);
    for (const auto& item : batch)
      add(sums[item.request], item, item.rows.of(denoised), requests[item.request].x);
    result.unet_calls += 1;
    auto sizes = batch.front().x.sizes().vec();
    sizes[0] = pass.size();
    const auto rows = model.unet().evaluated_rows(sizes);
    result.unet_rows += rows;
    result.filler_rows += rows - pass.size();
  }
  for (const auto& sum : sums) result.denoised.push_back(average(sum));
  return result;
}

}  // namespace sag

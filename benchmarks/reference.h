#pragma once

// A UNet's output and attention map against what another program computed:
// tools/make_benchmark_unet.py writes such files. Header only, as device.h is.

#include <cmath>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include <torch/serialize.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "sag/attention_scope.h"
#include "sag/step_context.h"
#include "sag/unet.h"

namespace sag::bench {

/// A dict of tensors, as torch.save writes it.
class ReferenceFile {
 public:
  explicit ReferenceFile(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    TORCH_CHECK_VALUE(file, "--reference must name a file, got '", path, "'");
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    dict_ = torch::pickle_load(bytes).toGenericDict();
  }
  torch::Tensor operator[](const std::string& name) const {
    return dict_.contains(name) ? dict_.at(name).toTensor() : torch::Tensor();
  }

 private:
  c10::impl::GenericDict dict_{c10::AnyType::get(), c10::AnyType::get()};
};

/// attention_map in the plain form, all in fp32.
inline torch::Tensor plain_attention_map(const torch::Tensor& q, const torch::Tensor& k,
                                         std::optional<double> scale) {
  const auto factor = scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1))));
  const auto scores =
      q.to(torch::kFloat).matmul(k.to(torch::kFloat).transpose(-1, -2)).mul_(factor);
  return scores.softmax(-1).sum(-2).mean(1);
}

/// The largest differences: of the map, whose mean is 1, from the plain form of the q and k that
/// the hook was given, and from the file's token_sums; of the output, by its largest value.
struct Differences {
  double map = 0, token_sums = 0, output = 0;
};

/// Calls the UNet on the file's x, timesteps, context and y, with a hook that makes the map of the
/// middle block's self-attention, and compares with its token_sums, [rows, tokens], and output.
inline Differences compare_with_reference(const UNet& unet, const ReferenceFile& file) {
  const auto given = [&](const char* name) {
    const auto t = file[name];
    return t.defined() ? t.to(unet.device(),
                              std::string(name) == "timesteps" ? torch::kFloat : unet.dtype())
                       : t;
  };
  const UNetInput input{.x = given("x"),
                        .timesteps = given("timesteps"),
                        .context = given("context"),
                        .y = given("y")};
  const auto height = input.x.size(2), width = input.x.size(3);
  const Owner maps("map"), plain_maps("plain map");
  const AttentionHook record = [=](const AttentionCall& call, const Pass& pass,
                                   const NextAttention& next) {
    const auto& rows = pass.groups.front();
    const auto q = pass.select(rows, call.q), k = pass.select(rows, call.k);
    pass.step->record(maps, rows, attention_map(q, k, call.scale));
    pass.step->record(plain_maps, rows, plain_attention_map(q, k, call.scale));
    return next(call);
  };
  StepContext step(1.0, 0, height, width);
  const Pass pass{.sigma = 1.0,
                  .height = height,
                  .width = width,
                  .groups = {{.count = input.x.size(0), .branch = Branch::uncond}},
                  .step = &step};
  const auto output = run_hooked({{.site = resolve_attention_site(unet, {"middle", 0}),
                                   .hook = record,
                                   .options = {.capturable = true},
                                   .identity = std::make_shared<int>()}},
                                 pass, [&] { return unet.forward(input); })
                          .to(torch::kFloat);
  const auto records = step.records(maps);
  TORCH_CHECK(records.size() == 1, "the middle block's self-attention did not run once");
  const auto far = [](const torch::Tensor& a, const torch::Tensor& b) {
    return (a - b.to(a.device(), torch::kFloat)).abs().max().item<double>();
  };
  const auto& map = records.front().map;
  return {far(map, step.records(plain_maps).front().map), far(map, file["token_sums"]),
          far(output, file["output"]) / file["output"].abs().max().item<double>()};
}

}  // namespace sag::bench

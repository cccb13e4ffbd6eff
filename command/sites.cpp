#include "sites.h"

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <torch/torch.h>

#include "files/networks.h"
#include "inputs.h"

namespace sag_sample {
namespace {

// One row of what the command line and the model give to the UNet.
sag::UNetInput probe_input(const Options& options, const Settings& settings,
                           const sag::UNet& unet) {
  const auto inputs = read_inputs(options, settings);
  const auto& batch = inputs.batches.front();
  auto cond = batch.positive.empty() ? batch.negative.front() : batch.positive.front();
  const auto [channels, height, width] = inputs.shape;
  if (!cond.context.defined() && !settings.text_encoder.empty()) {
    const auto text = TextEncoder(settings.text_encoder).encode("", height, width);
    cond.context = text.context;
    cond.y = text.y;
  }
  const auto row = [&unet](const torch::Tensor& t) {
    return t.defined() ? t.narrow(0, 0, 1).to(unet.device(), unet.dtype()) : t;
  };
  const auto on_device = torch::TensorOptions(unet.device());
  return {.x = torch::zeros({1, channels, height, width}, on_device.dtype(unet.dtype())),
          .timesteps = torch::ones({1}, on_device.dtype(torch::kFloat)),
          .context = row(cond.context),
          .y = row(cond.y)};
}

// What each site works on; without sizes, and with the reason why, where the UNet cannot be run.
std::vector<sag::AttentionSiteShape> shapes_of_sites(const sag::UNet& unet,
                                                     const sag::UNetInput& input,
                                                     std::string& reason) {
  try {
    return sag::probe_attention_sites(unet, input);
  } catch (const c10::Error& error) {
    reason = error.what_without_backtrace();
    reason = reason.substr(0, reason.find('\n'));
    if (reason.starts_with('[')) reason.erase(0, reason.find("] ") + 2);
  }
  std::vector<sag::AttentionSiteShape> shapes;
  for (const auto& site : unet.attention_sites()) shapes.push_back({.site = site});
  return shapes;
}

void print_sites(const std::vector<sag::AttentionSiteShape>& shapes, std::ostream& out) {
  std::size_t width = 0;
  std::int64_t fewest = 0;
  for (const auto& [site, heads, tokens, head_dim] : shapes) {
    width = std::max(width, site.name.size());
    if (tokens > 0) fewest = fewest > 0 ? std::min(fewest, tokens) : tokens;
  }
  for (const auto& [site, heads, tokens, head_dim] : shapes) {
    const std::string ordinal = site.ordinal >= 0 ? fmt::format("#{}", site.ordinal) : "";
    const std::string path = site.path == site.name ? "" : site.path;
    std::string line = fmt::format("{:<{}}  {:<4}", site.name, width, ordinal);
    if (fewest > 0)
      line += tokens > 0 ? fmt::format("  {:>3} heads x {:>5} tokens x {:>3}{}", heads, tokens,
                                       head_dim, tokens == fewest ? "  fewest" : "        ")
                         : fmt::format("  {:<34}", "did not run");
    line += "  " + path;
    line.erase(line.find_last_not_of(' ') + 1);
    out << line << '\n';
  }
}

}  // namespace

void list_sites(const Options& options, const Settings& settings, const sag::UNet& unet,
                std::ostream& out) {
  std::string reason;
  print_sites(shapes_of_sites(unet, probe_input(options, settings, unet), reason), out);
  if (!reason.empty())
    out << "Their sizes are not known, as the UNet did not run: " << reason << '\n';
}

}  // namespace sag_sample

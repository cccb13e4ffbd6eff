#include "sites.h"

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <torch/torch.h>

#include "errors.h"
#include "input_tensors.h"
#include "messages.h"
#include "model_networks.h"
#include "words/nearest.h"

namespace sag_sample {
namespace {

// One row of what the tensors and the model give to the UNet.
sag::UNetInput probe_input(const PictureOptions& pictures, const Network& network,
                           const sag::UNet& unet) {
  const auto tensors = read_input_tensors(pictures, {}, network, unet.device());
  const auto size = latent_size(tensors, pictures, network);
  const bool conditional = tensors.cond.defined();
  auto context = conditional ? tensors.cond : tensors.uncond;
  auto y = conditional ? tensors.cond_y : tensors.uncond_y;
  if (const auto encoder = context.defined() ? std::nullopt : load_text_encoder(network)) {
    const auto text = encoder->encode("", size.height, size.width);
    context = text.context;
    y = text.y;
  }
  const auto row = [&unet](const torch::Tensor& t) {
    return t.defined() ? t.narrow(0, 0, 1).to(unet.device(), unet.dtype()) : t;
  };
  const auto on_device = torch::TensorOptions(unet.device());
  const auto& inputs = network.inputs;
  const auto channels = size.channels + (inputs.concat ? inputs.concat->channels : 0);
  sag::UNetInput input = {
      .x = torch::zeros({1, channels, size.height, size.width}, on_device.dtype(unet.dtype())),
      .timesteps = torch::ones({1}, on_device.dtype(torch::kFloat)),
      .context = row(context),
      .y = row(y)};
  if (inputs.takes_class) {
    input.extra["class_labels"] = torch::zeros({1}, on_device.dtype(torch::kLong));
  }
  if (inputs.guidance_size > 0) {
    input.extra["timestep_cond"] =
        torch::zeros({1, inputs.guidance_size}, on_device.dtype(unet.dtype()));
  }
  return input;
}

// What the sites of a UNet work on, and which one "middle" is.
struct Sites {
  // Without sizes where the UNet did not run.
  std::vector<sag::AttentionSiteShape> shapes = {};
  // Why there are no sizes.
  std::string not_run = {};
  // Nothing: none was found.
  std::optional<sag::SiteChoice> middle = {};
  std::string no_middle = {};
};

Sites find_sites(const sag::UNet& unet, const sag::UNetInput& input) {
  Sites sites;
  try {
    sites.shapes = sag::probe_attention_sites(unet, input);
  } catch (const c10::Error& error) {
    sites.not_run = sentence_of(error);
    for (const auto& site : unet.attention_sites()) sites.shapes.push_back({.site = site});
  }
  try {
    sites.middle = sag::find_middle_attention(unet);
    if (!sites.middle && sites.not_run.empty()) {
      sites.middle = sag::find_middle_attention(std::span(std::as_const(sites.shapes)));
    }
  } catch (const c10::ValueError&) {
    sites.no_middle = "Several could be the middle block's: choose one with --site.";
  }
  return sites;
}

std::string size_text(const sag::AttentionSiteShape& shape, std::int64_t fewest) {
  const auto& [site, heads, tokens, head_dim] = shape;
  if (fewest == 0) return "";
  if (tokens == 0) return fmt::format("  {:<34}", "did not run");
  return fmt::format("  {:>3} heads x {:>5} tokens x {:>3}{}", heads, tokens, head_dim,
                     tokens == fewest ? "  fewest" : "        ");
}

void print_sites(const Sites& sites, std::ostream& out) {
  std::size_t width = 0;
  std::int64_t fewest = 0;
  for (const auto& [site, heads, tokens, head_dim] : sites.shapes) {
    width = std::max(width, site.name.size());
    if (tokens > 0) fewest = fewest > 0 ? std::min(fewest, tokens) : tokens;
  }
  for (const auto& shape : sites.shapes) {
    const auto& site = shape.site;
    const bool is_middle =
        sites.middle && (sites.middle->site == site.name || sites.middle->site == site.path);
    const std::string ordinal = site.ordinal >= 0 ? fmt::format("#{}", site.ordinal) : "";
    std::string line =
        fmt::format("{} {:<{}}  {:<4}", is_middle ? '*' : ' ', site.name, width, ordinal);
    line += size_text(shape, fewest) + "  " + (site.path == site.name ? "" : site.path);
    line.erase(line.find_last_not_of(' ') + 1);
    out << line << '\n';
  }
}

}  // namespace

void check_site(const sag::UNet& unet, const std::string& site) {
  if (site == "middle") return;
  try {
    static_cast<void>(sag::resolve_attention_site(unet, site));
  } catch (const c10::ValueError& error) {
    std::vector<std::string> names;
    for (const auto& known : unet.attention_sites()) {
      names.push_back(known.name);
      names.push_back(known.path);
    }
    auto sentence = sentence_of(error);
    if (const auto hint = suggestion(site, names); sentence.ends_with('.')) {
      sentence.replace(sentence.size() - 1, 1, hint);
    }
    throw UsageError(sentence);
  }
}

void list_sites(const PictureOptions& pictures, const Network& network, const sag::UNet& unet,
                std::ostream& out) {
  const auto sites = find_sites(unet, probe_input(pictures, network, unet));
  print_sites(sites, out);
  if (sites.middle) {
    out << fmt::format("* what --site middle chooses: {}\n", sites.middle->reason);
  } else if (!sites.no_middle.empty()) {
    out << sites.no_middle << '\n';
  }
  if (!sites.not_run.empty()) {
    out << "Their sizes are not known, as the UNet did not run: " << sites.not_run << '\n';
  }
}

}  // namespace sag_sample

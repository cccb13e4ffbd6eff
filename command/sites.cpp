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

using Shapes = std::vector<sag::AttentionSiteShape>;

// What the sites of a UNet work on, and which one "middle" is.
struct Sites {
  // Without sizes where the UNet did not run.
  Shapes self = {}, cross = {};
  // Why there are no sizes.
  std::string not_run = {};
  // Nothing: none was found.
  std::optional<sag::SiteChoice> middle = {};
  std::string no_middle = {};
};

Shapes without_sizes(const std::vector<sag::AttentionSiteInfo>& sites) {
  Shapes shapes;
  for (const auto& site : sites) shapes.push_back({.site = site});
  return shapes;
}

Sites find_sites(const sag::UNet& unet, const sag::UNetInput& input) {
  Sites sites;
  try {
    sites.self = sag::probe_attention_sites(unet, input);
    sites.cross = sag::probe_cross_attention_sites(unet, input);
  } catch (const c10::Error& error) {
    sites.not_run = sentence_of(error);
    sites.self = without_sizes(unet.attention_sites());
    sites.cross = without_sizes(unet.cross_attention_sites());
  }
  try {
    sites.middle = sag::find_middle_attention(unet);
    if (!sites.middle && sites.not_run.empty()) {
      sites.middle = sag::find_middle_attention(std::span(std::as_const(sites.self)));
    }
  } catch (const c10::ValueError&) {
    sites.no_middle = "Several could be the middle block's: choose one with --site.";
  }
  return sites;
}

std::int64_t fewest_tokens(const Shapes& shapes) {
  std::int64_t fewest = 0;
  for (const auto& shape : shapes) {
    if (shape.tokens > 0) fewest = fewest > 0 ? std::min(fewest, shape.tokens) : shape.tokens;
  }
  return fewest;
}

std::string size_text(const sag::AttentionSiteShape& shape, std::int64_t fewest) {
  if (fewest == 0) return "";
  if (shape.tokens == 0) return fmt::format("  {:<34}", "did not run");
  return fmt::format("  {:>3} heads x {:>5} tokens x {:>3}{}", shape.heads, shape.tokens,
                     shape.head_dim, shape.tokens == fewest ? "  fewest" : "        ");
}

// `chosen`: the site that gets a mark; null: none.
void print_sites(const Shapes& shapes, const sag::SiteChoice* chosen, std::ostream& out) {
  std::size_t width = 0;
  for (const auto& shape : shapes) width = std::max(width, shape.site.name.size());
  const auto fewest = fewest_tokens(shapes);
  for (const auto& shape : shapes) {
    const auto& site = shape.site;
    const bool is_chosen = chosen && (chosen->site == site.name || chosen->site == site.path);
    const std::string ordinal = site.ordinal >= 0 ? fmt::format("#{}", site.ordinal) : "";
    std::string line =
        fmt::format("{} {:<{}}  {:<4}", is_chosen ? '*' : ' ', site.name, width, ordinal);
    line += size_text(shape, fewest) + "  " + (site.path == site.name ? "" : site.path);
    line.erase(line.find_last_not_of(' ') + 1);
    out << line << '\n';
  }
}

// What other guidances look into.
void print_others(const Sites& sites, const std::vector<sag::AttentionSiteInfo>& blocks,
                  std::ostream& out) {
  if (sites.cross.empty()) {
    out << "\nNo cross-attentions for --guidance nag: they have other names than LDM's and "
           "diffusers', "
           "or something else reads the context, too.\n";
  } else {
    out << "\nCross-attentions, for --guidance nag, which looks into all of them:\n";
    print_sites(sites.cross, nullptr, out);
  }
  if (!blocks.empty()) {
    out << "\nTransformer blocks, for --guidance slg and tpg:\n";
    print_sites(without_sizes(blocks), nullptr, out);
  }
}

// Throws the library's sentence about a name that is not there, with the nearest one that is.
[[noreturn]] void refuse_name(const c10::ValueError& error, const std::string& title,
                              const std::string& name,
                              const std::vector<sag::AttentionSiteInfo>& known) {
  std::vector<std::string> names = {"middle"};
  for (const auto& site : known) {
    names.push_back(site.name);
    names.push_back(site.path);
  }
  auto sentence = sentence_of(error);
  if (const auto hint = suggestion(name, names); sentence.ends_with('.')) {
    sentence.replace(sentence.size() - 1, 1, hint);
  }
  throw UsageError(fmt::format("{}: {}", title, sentence));
}

torch::Tensor leave_as_it_is(const sag::AttentionCall& call, const sag::Pass& /*pass*/,
                             const sag::NextAttention& next) {
  return next(call);
}

void check_site(const sag::UNet& unet, const Guidance& guidance, const std::string& site) {
  if (site == "middle") return;
  try {
    static_cast<void>(sag::resolve_attention_site(unet, site));
  } catch (const c10::ValueError& error) {
    refuse_name(error, guidance.title, site, unet.attention_sites());
  }
}

}  // namespace

void check_sites(const sag::ModelPatcher& model, const Guidance& guidance) {
  for (const auto& site : guidance.sites) check_site(model.unet(), guidance, site);
  for (const auto& block : guidance.blocks) {
    try {
      model.clone().set_block_replace(leave_as_it_is, block);
    } catch (const c10::ValueError& error) {
      refuse_name(error, guidance.title, block, model.unet().block_sites());
    }
  }
  if (guidance.needs_cross_attention && model.unet().cross_attention_sites().empty()) {
    const auto note = model.unet().note_on_sites();
    throw UsageError(fmt::format(
        "{} needs cross-attentions of which is known that they alone read the context: this UNet's "
        "have other names than LDM's and diffusers', or something else reads it, too.{}{}",
        guidance.title, note.empty() ? "" : " ", note));
  }
}

void list_sites(const PictureOptions& pictures, const Network& network, const sag::UNet& unet,
                std::ostream& out) {
  const auto sites = find_sites(unet, probe_input(pictures, network, unet));
  print_sites(sites.self, sites.middle ? &*sites.middle : nullptr, out);
  if (sites.middle) {
    out << fmt::format("* what --site middle chooses: {}\n", sites.middle->reason);
  } else if (!sites.no_middle.empty()) {
    out << sites.no_middle << '\n';
  }
  if (!sites.not_run.empty()) {
    out << "Their sizes are not known, as the UNet did not run: " << sites.not_run << '\n';
  }
  print_others(sites, unet.block_sites(), out);
}

}  // namespace sag_sample

#include "drawing.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <torch/torch.h>

#include "picture/pictures.h"
#include "picture/sheet.h"

namespace sag_sample {
namespace {

std::vector<Cell> make_cells(const Drawn& drawn, const Inputs& inputs) {
  const auto guided = to_images(drawn.guided);
  std::vector<Cell> cells;
  for (std::size_t i = 0; i < guided.size(); ++i)
    cells.push_back({inputs.pictures[i].label, {guided[i]}});
  if (!drawn.unguided.defined()) return cells;
  const auto unguided = to_images(drawn.unguided);
  const auto heat =
      to_heat(drawn.heat.defined() ? drawn.heat : torch::zeros({drawn.guided.size(0), 1, 1, 1}),
              guided.front().width, guided.front().height);
  for (std::size_t i = 0; i < cells.size(); ++i) {
    cells[i].pictures = {unguided[i], guided[i], heat_overlay(guided[i], heat[i])};
  }
  return cells;
}

// Prompts and unconditional pictures apart, if there are both.
std::vector<Section> make_sections(std::vector<Cell> cells, const Inputs& inputs) {
  Section prompts, unconditional;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    auto& section = inputs.pictures[i].unconditional ? unconditional : prompts;
    section.cells.push_back(std::move(cells[i]));
  }
  if (unconditional.cells.empty()) return {prompts};
  if (prompts.cells.empty()) return {unconditional};
  prompts.title = "Prompts";
  unconditional.title = "Unconditional";
  return {prompts, unconditional};
}

}  // namespace

std::string describe_run(const Options& options, const Settings& settings, const Inputs& inputs) {
  std::string text = fmt::format("{} {} steps", inputs.sigmas.size() - 1, settings.sampler);
  if (options.sigmas.empty()) text += fmt::format(", {}", settings.schedule);
  const bool any_prompt = std::any_of(inputs.batches.begin(), inputs.batches.end(),
                                      [](const Batch& batch) { return !batch.positive.empty(); });
  if (any_prompt) text += fmt::format(", cfg {:g}", settings.cfg);
  if (settings.guided) {
    text += fmt::format(", SAG scale {:g}, blur {:g}", settings.guidance.scale,
                        settings.guidance.blur_sigma);
  }
  return text;
}

Image draw(const Drawn& drawn, const Options& options, const Settings& settings,
           const Inputs& inputs) {
  auto cells = make_cells(drawn, inputs);
  if (cells.size() == 1 && !options.compare) {
    return enlarge(cells.front().pictures.front(),
                   static_cast<int>(std::max<std::int64_t>(options.zoom, 1)));
  }
  Sheet sheet = {.headers = {},
                 .sections = make_sections(std::move(cells), inputs),
                 .footer = describe_run(options, settings, inputs),
                 .legend = ""};
  if (options.compare) {
    sheet.headers = {"unguided", "guided by SAG", "attention mask"};
    sheet.legend = "masked in";
  }
  return draw_sheet(sheet, {.columns = static_cast<int>(options.columns),
                            .zoom = static_cast<int>(options.zoom)});
}

}  // namespace sag_sample

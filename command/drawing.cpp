#include "drawing.h"

#include <algorithm>

#include <torch/torch.h>

#include "picture/pictures.h"
#include "picture/sheet.h"

namespace sag_sample {
namespace {

// Adds the compared pictures before, and the masks after, the guided one of each cell.
void add_comparison(std::vector<Cell>& cells, const Drawn& drawn) {
  const auto guided = to_images(drawn.pictures);
  for (auto& cell : cells) cell.pictures.clear();
  for (const auto& [header, pictures] : drawn.compared) {
    const auto images = to_images(pictures);
    for (std::size_t i = 0; i < cells.size(); ++i) cells[i].pictures.push_back(images[i]);
  }
  for (std::size_t i = 0; i < cells.size(); ++i) cells[i].pictures.push_back(guided[i]);
  for (const auto& [header, mask] : drawn.masks) {
    const auto heat = to_heat(
        mask.defined() ? mask : torch::zeros({drawn.pictures.size(0), 1, 1, 1}, torch::kFloat),
        guided.front().width, guided.front().height);
    for (std::size_t i = 0; i < cells.size(); ++i) {
      cells[i].pictures.push_back(heat_overlay(guided[i], heat[i]));
    }
  }
}

// Prompts and unconditional pictures apart, if there are both.
std::vector<Section> make_sections(std::vector<Cell> cells, const std::vector<Picture>& pictures) {
  Section prompts, unconditional;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    auto& section = pictures[i].unconditional ? unconditional : prompts;
    section.cells.push_back(std::move(cells[i]));
  }
  if (unconditional.cells.empty()) return {prompts};
  if (prompts.cells.empty()) return {unconditional};
  prompts.title = "Prompts";
  unconditional.title = "Unconditional";
  return {prompts, unconditional};
}

}  // namespace

Image draw(const Drawn& drawn, const std::vector<Picture>& pictures, const OutputOptions& options) {
  const auto images = to_images(drawn.pictures);
  if (images.size() == 1 && drawn.compared.empty()) {
    return enlarge(images.front(), static_cast<int>(std::max<std::int64_t>(options.zoom, 1)));
  }
  std::vector<Cell> cells;
  for (std::size_t i = 0; i < images.size(); ++i) cells.push_back({pictures[i].label, {images[i]}});
  Sheet sheet = {.headers = {}, .sections = {}, .footer = drawn.footer, .legend = ""};
  if (!drawn.compared.empty()) {
    add_comparison(cells, drawn);
    for (const auto& [header, picture] : drawn.compared) sheet.headers.push_back(header);
    sheet.headers.push_back(drawn.guided_header);
    for (const auto& [header, mask] : drawn.masks) sheet.headers.push_back(header);
    if (!drawn.masks.empty()) sheet.legend = "masked in";
  }
  sheet.sections = make_sections(std::move(cells), pictures);
  return draw_sheet(sheet, {.columns = static_cast<int>(options.columns),
                            .zoom = static_cast<int>(options.zoom)});
}

}  // namespace sag_sample

// What sag-sample shows: text, pictures, sheets, progress and the summary.
#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "errors.h"
#include "picture/font.h"
#include "picture/pictures.h"
#include "picture/png_file.h"
#include "picture/sheet.h"
#include "progress.h"
#include "report.h"

namespace sag_sample {
namespace {

using testing::HasSubstr;

constexpr Rgb kWhite = {255, 255, 255};

std::ptrdiff_t count_ink(const Image& image) {
  return std::count_if(image.pixels.begin(), image.pixels.end(),
                       [](const Rgb& p) { return p != kWhite; });
}

TEST(SampleFont, EveryPrintableCharacterButTheSpaceDraws) {
  for (char c = '!'; c <= '~'; ++c) {
    Image image(24, 24);
    draw_text(image, 4, 4, std::string(1, c), {});
    EXPECT_GT(count_ink(image), 0) << c;
  }
  Image image(24, 24);
  draw_text(image, 4, 4, " ", {});
  EXPECT_EQ(count_ink(image), 0);
}

TEST(SampleFont, CharactersDiffer) {
  std::vector<std::vector<Rgb>> seen;
  for (char c = ' '; c <= '~'; ++c) {
    Image image(24, 24);
    draw_text(image, 4, 4, std::string(1, c), {});
    EXPECT_EQ(std::find(seen.begin(), seen.end(), image.pixels), seen.end()) << c;
    seen.push_back(image.pixels);
  }
}

TEST(SampleFont, TextStaysInsideItsBox) {
  const std::string text = "Q|jgy{@} W%";
  for (const double scale : {0.9, 1.0, 1.5, 2.0}) {
    const TextStyle style = {.scale = scale};
    const int width = text_width(text, style), height = text_height(style);
    Image image(width + 20, height + 20);
    draw_text(image, 10, 10, text, style);
    for (int y = 0; y < image.height; ++y) {
      for (int x = 0; x < image.width; ++x) {
        const bool inside = x >= 9 && x < 11 + width && y >= 9 && y < 11 + height;
        if (!inside) {
          EXPECT_EQ(image.at(x, y), kWhite) << scale << ' ' << x << ' ' << y;
        }
      }
    }
  }
}

TEST(SampleFont, TextOverTheEdgeIsCutOff) {
  Image image(10, 10);
  draw_text(image, -5, -5, "Wide text", {.scale = 3});
  draw_text(image, 8, 8, "Wide text", {});
}

TEST(SampleFont, OtherScriptsAreBoxesOneACharacter) {
  EXPECT_EQ(text_width("\xc3\xa9", {}), text_width("\xe4\xb8\xad", {}));
}

TEST(SampleFont, ShortensLongText) {
  EXPECT_EQ(shorten_text("heart", 200, {}), "heart");
  const auto text = shorten_text("a very long prompt \xc3\xa9 about nothing at all", 120, {});
  EXPECT_TRUE(text.ends_with("..."));
  EXPECT_LE(text_width(text, {}), 120);
}

TEST(SamplePng, RoundTrips) {
  Image image(5, 3);
  for (std::size_t i = 0; i < image.pixels.size(); ++i) {
    image.pixels[i] = {static_cast<std::uint8_t>(i * 17), static_cast<std::uint8_t>(255 - i), 3};
  }
  const auto back = decode_png(encode_png(image));
  EXPECT_EQ(back.width, 5);
  EXPECT_EQ(back.height, 3);
  EXPECT_EQ(back.pixels, image.pixels);
  EXPECT_THROW(decode_png("no picture"), RunError);
}

// The bytes of a number, the greatest first.
std::string big_endian(std::uint32_t value) {
  std::string bytes;
  for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(value >> shift);
  return bytes;
}

std::string png_chunk(const std::string& content) {
  std::uint32_t crc = 0xffffffff;
  for (const unsigned char byte : content) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc % 2 == 1 ? 0xedb88320 : 0);
  }
  return big_endian(static_cast<std::uint32_t>(content.size() - 4)) + content + big_endian(~crc);
}

// A PNG of one pixel with 16 bits a channel and nothing that says how bright they are. The type
// is PNG's: 0 grey, 2 RGB, 4 and 6 the same with alpha.
std::string png_of_16_bits(char type, const std::vector<std::uint16_t>& channels) {
  std::string row(1, '\0');
  for (const auto value : channels) row += big_endian(value).substr(2);
  std::uint32_t a = 1, b = 0;
  for (const unsigned char byte : row) b += a += byte;
  const auto length = static_cast<char>(row.size());
  const std::string stored = {0x78, 0x01, 1, length, 0, static_cast<char>(~length), '\xff'};
  const std::string header = big_endian(1) + big_endian(1) + std::string{16, type, 0, 0, 0};
  return "\x89PNG\r\n\x1a\n" + png_chunk("IHDR" + header) +
         png_chunk("IDAT" + stored + row + big_endian(b % 65521 * 65536 + a % 65521)) +
         png_chunk("IEND");
}

TEST(SamplePng, SixteenBitsAreAsBrightAsEight) {
  const auto pixel = [](char type, const std::vector<std::uint16_t>& channels) {
    return decode_png(png_of_16_bits(type, channels)).pixels.at(0);
  };
  const Rgb grey = {128, 128, 128};
  const std::uint16_t value = 128 * 257, opaque = 65535;
  EXPECT_EQ(pixel(0, {value}), grey);
  EXPECT_EQ(pixel(4, {value, opaque}), grey);
  EXPECT_EQ(pixel(2, {7 * 257, value, 250 * 257}), (Rgb{7, 128, 250}));
  EXPECT_EQ(pixel(6, {7 * 257, value, 250 * 257, opaque}), (Rgb{7, 128, 250}));
  EXPECT_EQ(pixel(6, {7 * 257, value, 250 * 257, 0}), kWhite);
}

TEST(SamplePictures, TensorsBecomePixels) {
  auto tensor = torch::zeros({1, 3, 1, 3});
  tensor[0][0][0][0] = -1.0;
  tensor[0][0][0][1] = 1.0;
  tensor[0][0][0][2] = 7.0;
  const auto image = to_images(tensor).front();
  EXPECT_EQ(image.at(0, 0), (Rgb{0, 128, 128}));
  EXPECT_EQ(image.at(1, 0), (Rgb{255, 128, 128}));
  EXPECT_EQ(image.at(2, 0), (Rgb{255, 128, 128})) << "clamped";
  EXPECT_EQ(to_images(torch::ones({2, 1, 4, 5})).back().at(4, 3), kWhite) << "grey";
  EXPECT_THROW(to_images(torch::ones({1, 4, 4, 4})), RunError);
}

TEST(SamplePictures, HeatComesToThePicturesSize) {
  auto heat = torch::zeros({1, 1, 2, 2});
  heat[0][0][1][0] = 0.5;
  const auto map = to_heat(heat, 4, 6).front();
  ASSERT_EQ(map.size(), 24u);
  EXPECT_EQ(map[0], 0.0f);
  EXPECT_EQ(map[4 * 5 + 1], 0.5f);
}

TEST(SampleSheet, EnlargingKeepsFlatColourAndPlace) {
  Image image(4, 4, {10, 200, 30});
  const auto large = enlarge(image, 3);
  EXPECT_EQ(large.width, 12);
  EXPECT_EQ(std::count(large.pixels.begin(), large.pixels.end(), Rgb{10, 200, 30}), 144);
  image.at(0, 3) = {250, 0, 0};
  EXPECT_GT(enlarge(image, 3).at(1, 10).r, 200);
  EXPECT_EQ(enlarge(image, 1).pixels, image.pixels);
}

TEST(SampleSheet, SmallPicturesAreEnlarged) {
  EXPECT_EQ(default_zoom(Image(64, 64)), 2);
  EXPECT_EQ(default_zoom(Image(16, 32)), 8);
  EXPECT_EQ(default_zoom(Image(512, 768)), 1);
}

TEST(SampleSheet, HeatColoursWhatIsMasked) {
  const Image picture(2, 1, {200, 200, 200});
  const auto overlay = heat_overlay(picture, {0.0f, 1.0f});
  EXPECT_GT(overlay.at(0, 0).b, 150);
  EXPECT_LT(overlay.at(1, 0).b, 120);
}

Sheet make_sheet(int prompts, int unconditional) {
  Sheet sheet = {.headers = {"unguided", "guided", "mask"},
                 .sections = {},
                 .footer = "20 steps",
                 .legend = "masked in"};
  const Image picture(64, 64, {90, 90, 90});
  for (const int cells : {prompts, unconditional}) {
    Section section = {.title = "Section", .cells = {}};
    for (int i = 0; i < cells; ++i) section.cells.push_back({"label", {picture, picture, picture}});
    if (cells > 0) sheet.sections.push_back(section);
  }
  return sheet;
}

std::ptrdiff_t count_grey(const Image& image) {
  return std::count(image.pixels.begin(), image.pixels.end(), Rgb{90, 90, 90});
}

TEST(SampleSheet, HoldsEveryPictureWhole) {
  for (const int columns : {0, 1, 2, 3, 7}) {
    const auto image = draw_sheet(make_sheet(4, 3), {.columns = columns, .zoom = 1});
    EXPECT_EQ(count_grey(image), 7 * 3 * 64 * 64) << columns;
  }
  EXPECT_EQ(count_grey(draw_sheet(make_sheet(1, 0), {.zoom = 3})), 3 * 192 * 192);
}

// A line of its own for the footer, where the legend leaves it none.
TEST(SampleSheet, CutsNoFooterForTheLegend) {
  auto sheet = make_sheet(1, 0);
  sheet.footer = "20 steps of a sampler with a name";
  const auto narrow = draw_sheet(sheet, {.zoom = 2}), wide = draw_sheet(sheet, {.zoom = 4});
  sheet.legend.clear();
  EXPECT_GT(narrow.height, draw_sheet(sheet, {.zoom = 2}).height);
  EXPECT_EQ(wide.height, draw_sheet(sheet, {.zoom = 4}).height);
}

TEST(SampleSheet, HasAWhiteMargin) {
  const auto image = draw_sheet(make_sheet(3, 2), {});
  for (int x = 0; x < image.width; ++x) {
    EXPECT_EQ(image.at(x, 0), kWhite);
    EXPECT_EQ(image.at(x, image.height - 1), kWhite);
  }
  for (int y = 0; y < image.height; ++y) {
    EXPECT_EQ(image.at(0, y), kWhite);
    EXPECT_EQ(image.at(image.width - 1, y), kWhite);
  }
}

TEST(SampleSheet, MoreColumnsMakeItWiderAndFlatter) {
  const auto narrow = draw_sheet(make_sheet(4, 0), {.columns = 1});
  const auto wide = draw_sheet(make_sheet(4, 0), {.columns = 2});
  EXPECT_GT(wide.width, narrow.width);
  EXPECT_LT(wide.height, narrow.height);
}

TEST(SampleProgress, TextShowsShareRateAndRest) {
  const auto text = progress_text(0.25, 10, 20, "step 5 of 20");
  EXPECT_THAT(text, HasSubstr("[######..................]"));
  EXPECT_THAT(text, HasSubstr(" 25 %"));
  EXPECT_THAT(text, HasSubstr("2.0 evaluations/s"));
  EXPECT_THAT(text, HasSubstr("0:30 left"));
  EXPECT_THAT(progress_text(1, 10, 20, ""), HasSubstr("[########################] 100 %"));
}

TEST(SampleReport, CountsWhatWasGuidedAndWhyNot) {
  const RunReport unguided = {.steps = {{.evaluations = 1, .rows = 2}}, .seconds = 1};
  const RunReport guided = {
      .guidances = {"a"},
      .steps = {{.evaluations = 2,
                 .rows = 3,
                 .notes = {{.guidance = "a", .guided = true, .masked = 0.5}}},
                {.evaluations = 1,
                 .rows = 2,
                 .notes = {{.guidance = "a", .reason = "outside the window"}}}},
      .seconds = 2};
  const auto totals = total({unguided, guided});
  EXPECT_EQ(totals.evaluations, 4);
  EXPECT_EQ(totals.rows, 7);
  EXPECT_EQ(totals.seconds, 3);
  for (const char* guidance : {"", "a"}) {
    EXPECT_EQ(
        guidance_summary(guidance_total({unguided, guided}, guidance)),
        "1 of 2 evaluations guided, 50 % of the picture masked; 1 not guided: outside the window");
  }
}

TEST(SampleReport, TellsSeveralGuidancesApart) {
  const RunReport run = {.guidances = {"a", "b"},
                         .steps = {{.notes = {{.guidance = "a", .guided = true, .masked = 0.25},
                                              {.guidance = "b", .reason = "no"}}},
                                   {.notes = {{.guidance = "a", .reason = "never"},
                                              {.guidance = "b", .reason = "no"}}}}};
  EXPECT_EQ(guidance_total({run}, "a").guided, 1);
  EXPECT_EQ(guidance_total({run}, "a").masked, 0.25);
  EXPECT_EQ(guidance_total({run}, "b").guided, 0);
  EXPECT_EQ(guidance_total({run}, "b").skipped.at("no"), 2);
  EXPECT_EQ(guidance_total({run}, "c").steps, 0);
  const auto together = guidance_total({run});
  EXPECT_EQ(together.steps, 2);
  EXPECT_EQ(together.guided, 1);
  EXPECT_EQ(together.skipped.at("never"), 1);
}

}  // namespace
}  // namespace sag_sample

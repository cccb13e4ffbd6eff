// The weights in a prompt, as ComfyUI reads them.

#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "errors.h"
#include "prompt.h"

namespace sag_sample {
namespace {

using testing::ElementsAre;
using Piece = std::pair<std::string, double>;

std::vector<Piece> parsed(const std::string& prompt) {
  std::vector<Piece> pieces;
  for (const auto& piece : parse_prompt(prompt)) pieces.emplace_back(piece.text, piece.weight);
  return pieces;
}

TEST(ParsePrompt, WeighsWhatIsInParentheses) {
  EXPECT_THAT(parsed("a red cat"), ElementsAre(Piece("a red cat", 1.0)));
  EXPECT_THAT(parsed("a (red) cat"),
              ElementsAre(Piece("a ", 1.0), Piece("red", 1.1), Piece(" cat", 1.0)));
  EXPECT_THAT(parsed("(red:1.3)cat"), ElementsAre(Piece("red", 1.3), Piece("cat", 1.0)));
  EXPECT_THAT(parsed("(a)(b:2)"), ElementsAre(Piece("a", 1.1), Piece("b", 2.0)));
}

TEST(ParsePrompt, MultipliesNestedParenthesesAndSetsNumbers) {
  EXPECT_THAT(parsed("((a) b)"), ElementsAre(Piece("a", 1.1 * 1.1), Piece(" b", 1.1)));
  EXPECT_THAT(parsed("((a):1.5)"), ElementsAre(Piece("a", 1.5 * 1.1)));
  EXPECT_THAT(parsed("((a:1.5) b:0.5)"), ElementsAre(Piece("a", 1.5), Piece(" b", 0.5)));
  EXPECT_THAT(parsed("((a:1.5))"), ElementsAre(Piece("a", 1.5)));
}

TEST(ParsePrompt, ReadsFiniteNumbersAfterTheLastColon) {
  EXPECT_THAT(parsed("(a:-1)"), ElementsAre(Piece("a", -1.0)));
  EXPECT_THAT(parsed("(a:0)"), ElementsAre(Piece("a", 0.0)));
  EXPECT_THAT(parsed("(a:1e3)"), ElementsAre(Piece("a", 1000.0)));
  EXPECT_THAT(parsed("(a: +.5 )"), ElementsAre(Piece("a", 0.5)));
  EXPECT_THAT(parsed("(a:b:2.)"), ElementsAre(Piece("a:b", 2.0)));
  for (const char* text : {"a:", "a:abc", "a:1.3 b", "a:1,3", "a:nan", "a:inf", "a:1e999", "a:+-1",
                           "a:0x10", ":1.3", "1.3"}) {
    EXPECT_THAT(parsed(fmt::format("({})", text)), ElementsAre(Piece(text, 1.1)));
  }
}

TEST(ParsePrompt, KeepsEscapedParentheses) {
  EXPECT_THAT(parsed("a \\(red\\) cat"), ElementsAre(Piece("a (red) cat", 1.0)));
  EXPECT_THAT(parsed("(fate \\(series\\):1.2)"), ElementsAre(Piece("fate (series)", 1.2)));
  EXPECT_THAT(parsed("(a\\)"), ElementsAre(Piece("(a)", 1.0)));
  EXPECT_THAT(parsed("\\\\(a"), ElementsAre(Piece("\\(a", 1.0)));
  EXPECT_THAT(parsed("a\\b\\"), ElementsAre(Piece("a\\b\\", 1.0)));
}

TEST(ParsePrompt, TakesParenthesesWithoutPartnersForText) {
  EXPECT_THAT(parsed(":("), ElementsAre(Piece(":", 1.0), Piece("(", 1.0)));
  EXPECT_THAT(parsed(":) red"), ElementsAre(Piece(":) red", 1.0)));
  EXPECT_THAT(parsed("(red:1.3"), ElementsAre(Piece("(red:1.3", 1.0)));
  EXPECT_THAT(parsed("((red)"), ElementsAre(Piece("(red", 1.1)));
  EXPECT_THAT(parsed("(red))"), ElementsAre(Piece("red", 1.1), Piece(")", 1.0)));
  EXPECT_THAT(parsed(":) (red)"), ElementsAre(Piece(":) (red)", 1.0)));
  EXPECT_THAT(parsed(std::string(5000, '(')), ElementsAre(Piece(std::string(5000, '('), 1.0)));
}

TEST(ParsePrompt, LeavesEverythingElseToTheTextEncoder) {
  EXPECT_THAT(parsed(""), ElementsAre());
  EXPECT_THAT(parsed("()"), ElementsAre());
  EXPECT_THAT(parsed(" \n "), ElementsAre(Piece(" \n ", 1.0)));
  EXPECT_THAT(parsed("a BREAK [b] {c} 🦊"), ElementsAre(Piece("a BREAK [b] {c} 🦊", 1.0)));
  EXPECT_THAT(parsed("(🦊:1.2)"), ElementsAre(Piece("🦊", 1.2)));
}

TEST(ParsePrompt, RefusesToNestWithoutEnd) {
  const auto nested = [](std::size_t depth) {
    return fmt::format("{}a{}", std::string(depth, '('), std::string(depth, ')'));
  };
  EXPECT_EQ(parsed(nested(100)).size(), 1U);
  EXPECT_THROW(parse_prompt(nested(101)), UsageError);
  EXPECT_THROW(parse_prompt(nested(50000)), UsageError);
}

}  // namespace
}  // namespace sag_sample

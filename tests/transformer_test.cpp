// SAG, PAG and SEG in diffusion transformers, a DiT and MMDiTs with a joint attention of text and
// picture: against the formulas in fp64, in which only what the picture's queries get is changed.

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "sag/cfg_guider.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/self_attention_guidance.h"
#include "sag/smoothed_energy_guidance.h"
#include "support/device.h"
#include "support/error.h"
#include "support/reference.h"
#include "support/toy_unet.h"
#include "support/transformers.h"

namespace sag {
namespace {

using test::JointText;
using test::max_diff;
using test::transformer_site;
using testing::HasSubstr;

constexpr auto kRest = PictureTokens::kRest;
constexpr double kInfinity = std::numeric_limits<double>::infinity(), kTimestep = 600;
// The middle one of three.
constexpr std::int64_t kBlock = 1, kWords = 7;

struct Prompts {
  Conditioning positive, negative;
};

// A DiT has the text's vector alone.
Conditioning prompt(JointText text, double start, std::int64_t words) {
  Conditioning made;
  if (text != JointText::none)
    made.context = test::fill({1, words, test::kTextWidth}, .7, start, 1);
  made.y = test::fill({1, test::kPooledWidth}, .9, start, 1);
  return made;
}

Prompts prompts(JointText text, std::int64_t words = kWords, std::int64_t negative_words = kWords) {
  return {prompt(text, .5, words), prompt(text, 2, negative_words)};
}

// Two pictures.
torch::Tensor latent(std::int64_t height = 10, std::int64_t width = 14) {
  return test::fill({2, 4, height, width}, .262, .3, 1.5);
}

// The DiT predicts eps, the MMDiTs flow, as the published ones do.
ModelSampling sampling_of(JointText text) {
  return text == JointText::none ? ModelSampling::discrete() : ModelSampling::flow();
}

/// Which tokens of an attention are the picture's.
struct Picture {
  std::int64_t begin = 0;
  TokenGrid grid;

  torch::Tensor of(const torch::Tensor& t, std::int64_t dim = 2) const {
    return t.narrow(dim, begin, grid.rows * grid.cols);
  }
};

// What an attention does with q, k and v, [rows, heads, tokens, head_dim].
using Attend = std::function<torch::Tensor(const torch::Tensor& q, const torch::Tensor& k,
                                           const torch::Tensor& v, const Picture& picture)>;

torch::Tensor probabilities(const torch::Tensor& q, const torch::Tensor& k) {
  return (q.matmul(k.transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)))).softmax(-1);
}

torch::Tensor usual(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                    const Picture&) {
  return probabilities(q, k).matmul(v);
}

// PAG: a query of the picture sees its own token, and no text.
torch::Tensor identity(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                       const Picture& picture) {
  const auto seen = probabilities(q, k);
  const auto rows = picture.of(seen);
  rows.zero_();
  picture.of(rows, 3).copy_(torch::eye(rows.size(2), torch::kDouble));
  return seen.matmul(v);
}

torch::Tensor all_identity(const torch::Tensor&, const torch::Tensor&, const torch::Tensor& v,
                           const Picture&) {
  return v;
}

// [side, side]: what each token takes from which.
torch::Tensor blur_along(std::int64_t side, double sigma) {
  const auto taps = std::min(static_cast<std::int64_t>(std::ceil(6 * sigma)), side) | 1;
  const auto offsets = torch::arange(-(taps / 2), taps / 2 + 1, torch::kDouble);
  const auto weights = (-0.5 * (offsets / sigma).square()).exp();
  auto blur = torch::zeros({side, side}, torch::kDouble);
  for (std::int64_t i = 0; i < side; ++i)
    for (std::int64_t t = 0; t < taps; ++t)
      blur[i][test::reflect(i + t - taps / 2, side)] += weights[t] / weights.sum();
  return blur;
}

// [tokens, tokens]
torch::Tensor blur_of(const TokenGrid& grid, double sigma) {
  const auto tokens = grid.rows * grid.cols;
  if (std::isinf(sigma))
    return torch::full({tokens, tokens}, 1 / static_cast<double>(tokens), torch::kDouble);
  return torch::kron(blur_along(grid.rows, sigma), blur_along(grid.cols, sigma));
}

// SEG: the picture's queries are blurred over its grid; what they see is not.
Attend smooth(double sigma) {
  return [sigma](const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                 const Picture& picture) {
    const auto changed = q.clone();
    picture.of(changed).copy_(blur_of(picture.grid, sigma).matmul(picture.of(q)));
    return usual(changed, k, v, picture);
  };
}

/// A network in fp64, with weights and inputs that `dtype` can hold, and the guidances written
/// again.
class Formula {
 public:
  Formula(JointText text, Prompts given, torch::ScalarType dtype = torch::kDouble)
      : text_(text), prompts_(std::move(given)), dtype_(dtype), net_(text) {
    net_->to(dtype);
    net_->to(torch::kDouble);
  }

  torch::Tensor cfg(const torch::Tensor& x, double cond_scale) const {
    const auto cond = predicted(x, prompts_.positive), uncond = predicted(x, prompts_.negative);
    return uncond + cond_scale * (cond - uncond);
  }

  // What PAG and SEG add at their scale of 3.
  torch::Tensor perturbed(const torch::Tensor& x, const Attend& attend,
                          const std::set<std::int64_t>& blocks = {kBlock}) const {
    const auto& positive = prompts_.positive;
    return 3 * (predicted(x, positive) - predicted(x, positive, attend, blocks));
  }

  // What SAG adds at its scale of 0.5 when it blurs where the mask is.
  torch::Tensor sag(const torch::Tensor& x, const torch::Tensor& mask) const {
    const auto uncond = predicted(x, prompts_.negative);
    const auto degraded = torch::where(mask, test::reference_blur(uncond, 4, 2), uncond);
    const auto clean_share = is_flow() ? 1 - sigma() : 1;
    const auto x_again = x.to(torch::kDouble) + clean_share * (degraded - uncond);
    return 0.5 * (degraded - predicted(x_again, prompts_.negative));
  }

  // SAG's map, [images, 1, height, width]: what the picture's queries give to its keys, over the
  // mean.
  torch::Tensor map(const torch::Tensor& x) const {
    torch::Tensor cells;
    const auto look = [&cells](const torch::Tensor& q, const torch::Tensor& k,
                               const torch::Tensor& v, const Picture& picture) {
      const auto given = picture.of(picture.of(probabilities(q, k)), 3).sum(2).mean(1);
      cells = (given / given.mean(1, true)).reshape({-1, 1, picture.grid.rows, picture.grid.cols});
      return usual(q, k, v, picture);
    };
    predicted(x, prompts_.negative, look, {kBlock});
    return cells.repeat_interleave(2, 2)
        .repeat_interleave(2, 3)
        .narrow(2, 0, x.size(2))
        .narrow(3, 0, x.size(3));
  }

 private:
  bool is_flow() const { return text_ != JointText::none; }
  double sigma() const { return sampling_of(text_).sigma(kTimestep); }
  torch::Tensor rounded(const torch::Tensor& t) const { return t.to(dtype_).to(torch::kDouble); }

  torch::Tensor predicted(const torch::Tensor& given, const Conditioning& prompt,
                          const Attend& attend = usual,
                          const std::set<std::int64_t>& blocks = {}) const {
    const auto x = given.to(torch::kDouble);
    const auto images = x.size(0);
    const TokenGrid grid{(x.size(2) + 1) / 2, (x.size(3) + 1) / 2};
    UNetInput input{.x = rounded(is_flow() ? x : x / std::sqrt(sigma() * sigma() + 1)),
                    .timesteps = torch::full({images}, kTimestep, torch::kFloat),
                    .y = rounded(prompt.y).expand({images, -1})};
    if (is_flow()) input.context = rounded(prompt.context).expand({images, -1, -1});
    const auto attention_of = [&](const torch::Tensor& q, const torch::Tensor& k,
                                  const torch::Tensor& v, std::int64_t block) {
      const auto words = q.size(2) - grid.rows * grid.cols;
      const Picture picture{text_ == JointText::first ? words : 0, grid};
      return blocks.contains(block) ? attend(q, k, v, picture) : usual(q, k, v, picture);
    };
    return x - sigma() * net_->forward(input, attention_of);
  }

  JointText text_;
  Prompts prompts_;
  torch::ScalarType dtype_;
  mutable test::Transformer net_;
};

/// A guidance of the library, and what it adds to the result by its formula.
struct Guidance {
  const char* name;
  std::function<ModelPatcher(const ModelPatcher& model, const PictureTokens& tokens)> apply;
  // mask: where SAG blurred.
  std::function<torch::Tensor(const Formula& formula, const torch::Tensor& x,
                              const torch::Tensor& mask)>
      added;
};

Guidance sag_guidance() {
  return {"SAG",
          [](const ModelPatcher& model, const PictureTokens& tokens) {
            return apply_self_attention_guidance(
                model, {.site = transformer_site(kBlock), .tokens = tokens});
          },
          [](const Formula& formula, const torch::Tensor& x, const torch::Tensor& mask) {
            return formula.sag(x, mask);
          }};
}

Guidance pag(const std::set<std::int64_t>& blocks = {kBlock}) {
  std::vector<AttentionSite> sites;
  for (const auto block : blocks) sites.emplace_back(transformer_site(block));
  return {"PAG",
          [sites](const ModelPatcher& model, const PictureTokens& tokens) {
            return apply_perturbed_attention_guidance(model, {.sites = sites, .tokens = tokens});
          },
          [blocks](const Formula& formula, const torch::Tensor& x, const torch::Tensor&) {
            return formula.perturbed(x, identity, blocks);
          }};
}

Guidance seg(double sigma, const std::set<std::int64_t>& blocks = {kBlock}) {
  std::vector<AttentionSite> sites;
  for (const auto block : blocks) sites.emplace_back(transformer_site(block));
  return {sigma == kInfinity ? "SEG of the mean" : "SEG",
          [sites, sigma](const ModelPatcher& model, const PictureTokens& tokens) {
            return apply_smoothed_energy_guidance(
                model, {.blur_sigma = sigma, .sites = sites, .tokens = tokens});
          },
          [blocks, sigma](const Formula& formula, const torch::Tensor& x, const torch::Tensor&) {
            return formula.perturbed(x, smooth(sigma), blocks);
          }};
}

std::vector<Guidance> guidances() {
  return {sag_guidance(), pag(), seg(1), seg(kInfinity)};
}

// What SAG reports is where the map is above 1, but for cells as near to 1 as rounding.
void expect_mask(const torch::Tensor& mask, const torch::Tensor& map, double margin) {
  const auto sure = (map - 1).abs() > margin;
  EXPECT_TRUE(torch::equal(mask.logical_and(sure), (map > 1).logical_and(sure)));
  EXPECT_GT(sure.to(torch::kDouble).mean().item<double>(), 0.5);
}

struct Network {
  const char* name;
  JointText text;
  // For kWords of text.
  PictureTokens tokens;
};

/// How a network is called.
struct Call {
  PictureTokens tokens;
  Prompts prompts;
  double cond_scale = 1;
  torch::ScalarType dtype = torch::kDouble;
  std::int64_t max_rows = 0;
};

struct Result {
  torch::Tensor denoised;
  std::vector<GuidanceNote> notes;

  torch::Tensor mask() const {
    const auto& mask = notes.at(0).mask;
    return mask.defined() ? mask.cpu() : mask;
  }
};

class Transformers : public testing::TestWithParam<std::tuple<const char*, Network>> {
 protected:
  void SetUp() override { SAG_SKIP_WITHOUT_CUDA(device()); }
  torch::Device device() const { return torch::Device(std::get<0>(GetParam())); }
  const Network& network() const { return std::get<1>(GetParam()); }
  JointText text() const { return network().text; }

  ModelPatcher model(torch::ScalarType dtype = torch::kDouble) const {
    return {std::make_shared<test::TransformerUNet>(text(), device(), dtype), sampling_of(text())};
  }
  Call call(double cond_scale, torch::ScalarType dtype = torch::kDouble) const {
    return {network().tokens, prompts(text()), cond_scale, dtype};
  }
  Result evaluate(const ModelPatcher& model, const torch::Tensor& x, const Call& call) const {
    CfgGuider guider(model, {call.prompts.positive}, {call.prompts.negative},
                     {.cond_scale = call.cond_scale, .max_rows = call.max_rows});
    const auto wide = call.dtype == torch::kDouble ? torch::kDouble : torch::kFloat;
    const auto sigma = sampling_of(text()).sigma(kTimestep);
    const auto denoised = guider(x.to(device(), wide), sigma).cpu();
    return {denoised, guider.report().evaluations.front().guidances};
  }

  void expect_formula(const Guidance& guidance, const torch::Tensor& x, const Call& call,
                      double tolerance) const {
    SCOPED_TRACE(c10::str(guidance.name, " at CFG ", call.cond_scale, " of ", x.sizes()));
    const auto result = evaluate(guidance.apply(model(call.dtype), call.tokens), x, call);
    ASSERT_TRUE(result.notes.at(0).guided) << result.notes.at(0).reason;
    const Formula formula(text(), call.prompts, call.dtype);
    const auto mask = result.mask();
    if (mask.defined()) expect_mask(mask, formula.map(x), 1e-5);
    const auto added = guidance.added(formula, x, mask);
    EXPECT_LT(max_diff(result.denoised, formula.cfg(x, call.cond_scale) + added), tolerance);
    EXPECT_GT(added.abs().max().item<double>(), 0.3) << "too little to see";
  }
};

/// Those of text and picture.
class JointAttention : public Transformers {};

std::string name_of(const testing::TestParamInfo<std::tuple<const char*, Network>>& info) {
  return std::string(std::get<1>(info.param).name) + "_" + std::get<0>(info.param);
}

const Network kDiT{"DiT", JointText::none, {.reduction = 2}};
const Network kTextFirst{"TextFirst", JointText::first, {.before = kWords, .reduction = 2}};
const Network kTextLast{"TextLast", JointText::last, {.after = kWords, .reduction = 2}};

INSTANTIATE_TEST_SUITE_P(Of, Transformers,
                         testing::Combine(test::backends(),
                                          testing::Values(kDiT, kTextFirst, kTextLast)),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Of, JointAttention,
                         testing::Combine(test::backends(), testing::Values(kTextFirst, kTextLast)),
                         name_of);

// 9 x 13 is filled up to 10 x 14.
TEST_P(Transformers, AreGuidedByTheFormulas) {
  for (const auto& [height, width] : {std::pair{10, 14}, {9, 13}, {6, 22}})
    for (const auto& guidance : guidances())
      for (const double cond_scale : {1.0, 4.0})
        expect_formula(guidance, latent(height, width), call(cond_scale), 1e-9);
}

TEST_P(Transformers, AreGuidedInSeveralBlocks) {
  for (const auto& guidance : {pag({0, 2}), seg(1, {0, 2})})
    expect_formula(guidance, latent(), call(4), 1e-9);
}

TEST_P(Transformers, AreGuidedInSinglePrecision) {
  for (const auto& guidance : guidances())
    expect_formula(guidance, latent(), call(4, torch::kFloat), 2e-4);
}

// What the guidance adds, to a share of its largest value. It is a difference of predictions that
// are up to ten times larger, and so is their rounding: on a CPU, 0.013 of it in fp16 and 0.11 in
// bf16.
TEST_P(Transformers, AreGuidedInHalfPrecision) {
  const auto x = latent();
  for (const auto& [dtype, share] : {std::pair{torch::kHalf, 0.05}, {torch::kBFloat16, 0.25}})
    for (const auto& guidance : guidances()) {
      const auto at = call(1, dtype);
      const auto plain = evaluate(model(dtype), x, at),
                 guided = evaluate(guidance.apply(model(dtype), at.tokens), x, at);
      ASSERT_TRUE(guided.notes.at(0).guided) << guided.notes.at(0).reason;
      const Formula formula(text(), at.prompts, dtype);
      const auto mask = guided.mask();
      if (mask.defined()) expect_mask(mask, formula.map(x), 0.05);
      const auto added = guidance.added(formula, x, mask);
      EXPECT_LT(max_diff(guided.denoised - plain.denoised, added),
                share * added.abs().max().item<double>())
          << guidance.name << " in " << dtype;
    }
}

// Each row has a call of its own, so that those of CFG are the same with and without the guidance.
TEST_P(Transformers, AreLeftAloneWithWrongTokens) {
  const auto x = latent();
  const auto right = network().tokens;
  auto more_before = right, more_after = right, none_left = right, other_patch = right;
  more_before.before += 1;
  more_after.after += 1;
  none_left.before = 1000;
  other_patch.reduction = 3;
  auto unknown_patch = more_before;
  unknown_patch.reduction = 0;
  for (const double cond_scale : {1.0, 4.0}) {
    auto at = call(cond_scale, torch::kFloat);
    at.max_rows = 1;
    const auto base = model(torch::kFloat);
    const auto plain = evaluate(base, x, at);
    for (const auto& tokens : {more_before, more_after, none_left, other_patch, unknown_patch})
      for (const auto& guidance : guidances()) {
        const auto result = evaluate(guidance.apply(base, tokens), x, at);
        EXPECT_TRUE(torch::equal(result.denoised, plain.denoised)) << guidance.name;
        EXPECT_FALSE(result.notes.at(0).guided) << guidance.name;
        EXPECT_THAT(
            result.notes.at(0).reason,
            HasSubstr("what the option tokens says of them is no grid of the 10 x 14 latent"));
      }
  }
}

// All its attentions have as many tokens.
TEST_P(Transformers, HaveNoMiddleThatCouldBeFound) {
  const auto x = latent();
  const auto error_with = [&](const ModelPatcher& guided) {
    return test::error_of<c10::ValueError>([&] { evaluate(guided, x, call(1)); });
  };
  const auto tokens = network().tokens;
  for (const auto& error :
       {error_with(apply_self_attention_guidance(model(), {.tokens = tokens})),
        error_with(apply_perturbed_attention_guidance(model(), {.tokens = tokens})),
        error_with(apply_smoothed_energy_guidance(model(), {.tokens = tokens}))}) {
    EXPECT_THAT(error, HasSubstr("site must be named"));
    EXPECT_THAT(error, HasSubstr(transformer_site(2)));
  }
}

// Positive and negative then have calls of their own, and the picture begins elsewhere in each.
TEST_P(JointAttention, IsGuidedWithTextsOfAnyLength) {
  auto at = call(4);
  at.prompts = prompts(text(), 7, 5);
  at.tokens = text() == JointText::first ? PictureTokens{.before = kRest, .reduction = 2}
                                         : PictureTokens{.after = kRest, .reduction = 2};
  for (const auto& guidance : guidances()) expect_formula(guidance, latent(), at, 1e-9);
}

// In the block itself; what follows sees another picture. A hook outside of the guidance's looks.
TEST_P(JointAttention, KeepsWhatTheTextGetsInThePerturbedBlock) {
  for (const auto& guidance : {pag(), seg(1), seg(kInfinity)}) {
    auto base = model();
    torch::Tensor plain, perturbed;
    base.set_attn1_replace(
        [&](const AttentionCall& call, const Pass& pass, const NextAttention& next) {
          const auto out = next(call);
          for (const auto& rows : pass.groups)
            (rows.owner == Owner::main ? plain : perturbed) = pass.select(rows, out).clone();
          return out;
        },
        transformer_site(kBlock));
    evaluate(guidance.apply(base, network().tokens), latent(), call(1));
    ASSERT_TRUE(plain.defined() && perturbed.defined());
    const auto cells = plain.size(2) - kWords;
    const bool first = text() == JointText::first;
    const auto words = [&](const torch::Tensor& t) {
      return t.narrow(2, first ? 0 : cells, kWords);
    };
    const auto picture = [&](const torch::Tensor& t) {
      return t.narrow(2, first ? kWords : 0, cells);
    };
    EXPECT_LT(max_diff(words(perturbed), words(plain)), 1e-12) << guidance.name;
    EXPECT_GT(max_diff(picture(perturbed), picture(plain)), 0.1) << guidance.name;
  }
}

// Without the option PAG takes all tokens for the picture's; the others need a grid.
TEST_P(JointAttention, IsPerturbedAsAWholeByPagWithoutTheOption) {
  const auto at = call(4);
  const auto x = latent();
  const Formula formula(text(), at.prompts);
  const auto by_pag = evaluate(pag().apply(model(), {}), x, at);
  const auto wanted = formula.cfg(x, 4) + formula.perturbed(x, all_identity);
  EXPECT_LT(max_diff(by_pag.denoised, wanted), 1e-9);
  EXPECT_GT(max_diff(formula.perturbed(x, all_identity), formula.perturbed(x, identity)), 1e-3);
  for (const auto& guidance : {sag_guidance(), seg(1)})
    EXPECT_THAT(evaluate(guidance.apply(model(), {}), x, at).notes.at(0).reason,
                HasSubstr("the option tokens says which are the picture's"));
}

}  // namespace
}  // namespace sag

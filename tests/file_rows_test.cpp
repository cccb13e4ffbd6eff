// Files with a number of rows written into them, and files that want timesteps in a form of their
// own.
#include <limits>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/passes/freeze_module.h>
#include <torch/torch.h>

#include "sag/attention_scope.h"
#include "sag/cfg_guider.h"
#include "sag/cuda_graph_unet.h"
#include "sag/model_patcher.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "sag/step_context.h"
#include "sag/torchscript_unet.h"
#include "support/error.h"
#include "support/files.h"
#include "support/torchscript_fixture.h"

namespace sag {
namespace {

using test::error_of;
using test::make_torchscript_unet;
using test::one_sentence;
using test::TorchScriptFixture;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using torch::jit::Module;

UNetInput input(std::int64_t rows, double timestep = 500) {
  torch::manual_seed(2);
  return {.x = torch::randn({rows, 4, 6, 5}),
          .timesteps = torch::full({rows}, timestep),
          .context = torch::randn({rows, 3, test::kContextWidth})};
}

// As torch.jit.trace and torch.jit.save leave a module: with what it was traced with.
Module traced(const TorchScriptFixture& fixture, std::int64_t rows,
              const torch::Tensor& timesteps = {}) {
  auto module = make_torchscript_unet(fixture);
  const auto example = input(rows);
  module.store_traced_inputs(
      "forward", {example.x, timesteps.defined() ? timesteps : example.timesteps, example.context});
  return module;
}

std::shared_ptr<TorchScriptUNet> load(const Module& module,
                                      const TorchScriptUNetOptions& options = {}) {
  const test::TemporaryFile file("unet.ts");
  module.save(file.path());
  return TorchScriptUNet::load(file.path(), options);
}

torch::Tensor plain_result(const UNetInput& given) {
  return TorchScriptUNet::from_module(make_torchscript_unet())->forward(given);
}

// What a trace can have written into it. Each works for two rows; `silent` ones also run for others
// and give numbers.
struct Baked {
  std::string name;
  TorchScriptFixture fixture;
};

const std::vector<Baked>& baked() {
  const std::string attention =
                        "    t = t + block(self.input_blocks).attn1.forward(t, t)\n"
                        "    t = t + block(self.input_blocks).attn2.forward(t, context)\n",
                    middle = "    t = t + block(self.middle_block).attn1.forward(t, t)\n";
  static const std::vector<Baked> all = {
      // Broadcasts to two rows for one, and fails for three.
      {"sum", {.result = "out + torch.zeros([2, 1, 1, 1])"}},
      // Fails for every other number.
      {"cat", {.result = "torch.cat([out, torch.zeros([2, 1, 6, 5])], 1)[:, :4]"}},
      // Silent: one row attends in halves, four rows in pairs.
      {"reshape",
       {.body = attention + "    size = t.size()\n    t = torch.reshape(t, [2, -1, t.size(2)])\n" +
                middle + "    t = torch.reshape(t, size)\n"}},
      // Silent for four rows: the first two are taken twice.
      {"select",
       {.body =
            attention + "    if t.size(0) > 2:\n        t = torch.cat([t[:2], t[:2]])\n" + middle}},
  };
  return all;
}

class BakedRows : public testing::TestWithParam<Baked> {};

TEST_P(BakedRows, RunInCallsOfTheTracedNumber) {
  const auto unet = load(traced(GetParam().fixture, 2));
  EXPECT_EQ(unet->evaluated_rows({2, 4, 6, 5}), 2);
  for (const std::int64_t rows : {2, 4, 1, 3, 2, 5}) {
    const auto given = input(rows);
    EXPECT_TRUE(torch::allclose(unet->forward(given), plain_result(given), 1e-4, 1e-5)) << rows;
    EXPECT_EQ(unet->evaluated_rows(given.x.sizes()), rows == 2 ? 2 : (rows + 1) / 2 * 2) << rows;
  }
}

// Although the first call gives all rows one context.
TEST(FileRows, AreComparedWithContextsThatDiffer) {
  const TorchScriptFixture takes_the_first = {
      .body =
          "    context = context[0:1].expand([t.size(0), -1, -1])\n" + TorchScriptFixture().body};
  const auto unet = load(traced(takes_the_first, 1));
  auto given = input(2);
  given.context = given.context.narrow(0, 0, 1).expand({2, -1, -1});
  EXPECT_TRUE(torch::allclose(unet->forward(given), plain_result(given), 1e-4, 1e-5));
  given = input(2);
  EXPECT_TRUE(torch::allclose(unet->forward(given), plain_result(given), 1e-4, 1e-5));
}

TEST_P(BakedRows, RunWithTheNumberThatTheCallerNames) {
  for (const auto& unet :
       {TorchScriptUNet::from_module(make_torchscript_unet(GetParam().fixture), 2),
        load(make_torchscript_unet(GetParam().fixture), {.rows = 2})}) {
    for (const std::int64_t rows : {1, 2, 5}) {
      const auto given = input(rows);
      EXPECT_TRUE(torch::allclose(unet->forward(given), plain_result(given), 1e-4, 1e-5)) << rows;
      EXPECT_EQ(unet->evaluated_rows(given.x.sizes()), (rows + 1) / 2 * 2);
    }
  }
}

struct Run {
  torch::Tensor samples;
  GuiderReport report;
};

Run guided_run(const std::shared_ptr<const UNet>& unet, std::int64_t images,
               std::int64_t max_rows = 0, bool one_pass = false) {
  const ModelPatcher model(unet, ModelSampling::discrete());
  const auto guided = apply_self_attention_guidance(model, {.scale = 1.0, .one_pass = one_pass});
  torch::manual_seed(4);
  const auto noise = torch::randn({images, 4, 7, 6}).to(unet->device());
  const Conditioning prompt{.context = torch::randn({1, 5, test::kContextWidth})},
      negative{.context = torch::randn({1, 5, test::kContextWidth})};
  CfgGuider guider(guided, {prompt}, {negative}, {.cond_scale = 3.0, .max_rows = max_rows});
  const auto sigmas = get_sigmas("karras", model.model_sampling(), 3);
  guider.begin_run(sigmas);
  auto x = noise * sigmas.front();
  for (std::size_t i = 0; i + 1 < sigmas.size(); ++i) {
    const auto denoised = guider(x, sigmas[i]);
    x = denoised + (x - denoised) / sigmas[i] * sigmas[i + 1];
  }
  return {x, guider.report()};
}

// Relative to the largest value.
double difference(const torch::Tensor& a, const torch::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

// SAG's maps are those of the rows that were asked for, whatever fills their calls up.
TEST_P(BakedRows, GuideAsAFileWithoutThem) {
  if (GetParam().name == "cat") GTEST_SKIP() << "it has the latent's size written into it, too";
  const auto free = TorchScriptUNet::from_module(make_torchscript_unet());
  for (const bool one_pass : {false, true}) {
    for (const std::int64_t images : {1, 2, 3}) {
      const auto unet = std::make_shared<CudaGraphUNet>(load(traced(GetParam().fixture, 2)));
      const auto run = guided_run(unet, images, 0, one_pass);
      const auto expected = guided_run(free, images, 0, one_pass);
      EXPECT_EQ(run.report.guided(), 3);
      EXPECT_LT(difference(run.samples, expected.samples), 1e-4) << images << one_pass;
      for (std::size_t i = 0; i < 3; ++i)
        EXPECT_TRUE(run.report.evaluations[i].guidances[0].mask.equal(
            expected.report.evaluations[i].guidances[0].mask));
      EXPECT_EQ(run.report.unet_rows() - run.report.filler_rows(), expected.report.unet_rows());
      // "select" takes one row as it is.
      const bool fills_up =
          images % 2 == 1 && (GetParam().name != "select" || images > 1 || one_pass);
      EXPECT_EQ(run.report.filler_rows() > 0, fills_up) << images << one_pass;
      EXPECT_EQ(expected.report.filler_rows(), 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(FileRows, BakedRows, testing::ValuesIn(baked()),
                         [](const auto& info) { return info.param.name; });

// Trying happens while a graph is warmed up, and the split calls are captured.
TEST(FileRows, AreFoundUnderCudaGraphs) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "this machine has no CUDA device";
  const auto unet = std::make_shared<CudaGraphUNet>(
      load(traced(baked()[2].fixture, 2), {.device = torch::kCUDA}));
  const auto run = guided_run(unet, 1),
             expected = guided_run(TorchScriptUNet::from_module(make_torchscript_unet()), 1);
  EXPECT_EQ(unet->report().failure, "");
  EXPECT_GT(unet->report().replays, 0);
  EXPECT_EQ(run.report.guided(), 3);
  EXPECT_GT(run.report.filler_rows(), 0);
  EXPECT_LT(difference(run.samples.cpu(), expected.samples), 1e-2);
}

// One row and seven, so that a call has up to six rows that nobody asked for.
TEST(FileRows, OfOtherNumbersAreFilledUpToo) {
  const auto free = TorchScriptUNet::from_module(make_torchscript_unet());
  for (const std::int64_t fixed : {1, 3, 7}) {
    const auto sum = c10::str("out + torch.zeros([", fixed, ", 1, 1, 1])");
    const auto unet = load(traced({.result = sum}, fixed));
    const auto run = guided_run(unet, 2), expected = guided_run(free, 2);
    EXPECT_LT(difference(run.samples, expected.samples), 1e-4) << fixed;
    // One row fits any number: it is added to all.
    if (fixed > 1) {
      EXPECT_EQ(run.report.unet_rows() % fixed, 0);
    }
  }
}

TEST(FileRows, HooksAreToldWhichRowsFillACallUp) {
  const auto unet = TorchScriptUNet::from_module(make_torchscript_unet(), 4);
  StepContext step(1.0, 0, 6, 5);
  const Pass pass{.groups = {{.count = 2, .branch = Branch::uncond},
                             {.begin = 2, .count = 3, .branch = Branch::cond}},
                  .step = &step};
  std::vector<std::string> seen;
  const auto look = [&](const AttentionCall& call, const Pass& of_call, const NextAttention& next) {
    EXPECT_EQ(of_call.size(), call.q.size(0));
    std::string text;
    for (const auto& group : of_call.groups)
      text += c10::str(text.empty() ? "" : ", ", group.owner.name(), " ", group.count, " of image ",
                       group.image);
    seen.push_back(text);
    return next(call);
  };
  run_hooked({{"middle.0.0", look, {}}}, pass, [&] { return unet->forward(input(5)); });
  EXPECT_THAT(seen, ElementsAre("main 2 of image 0, main 2 of image 0",
                                "main 1 of image 2, filler 3 of image 2"));
  // The exception of a hook arrives unchanged.
  const auto fail = [](const AttentionCall&, const Pass&, const NextAttention&) -> torch::Tensor {
    throw std::out_of_range("mine");
  };
  EXPECT_THROW(
      run_hooked({{"middle.0.0", fail, {}}}, pass, [&] { return unet->forward(input(5)); }),
      std::out_of_range);
}

TEST(FileRows, SizesOfSitesDoNotCountFillers) {
  const auto fixed = TorchScriptUNet::from_module(make_torchscript_unet(), 4),
             free = TorchScriptUNet::from_module(make_torchscript_unet());
  const auto of_fixed = probe_attention_sites(*fixed, input(1)),
             of_free = probe_attention_sites(*free, input(1));
  ASSERT_EQ(of_fixed.size(), of_free.size());
  for (std::size_t i = 0; i < of_free.size(); ++i) {
    EXPECT_EQ(of_fixed[i].heads, of_free[i].heads);
    EXPECT_EQ(of_fixed[i].tokens, of_free[i].tokens);
  }
}

// Trying costs neither hooks nor random numbers of the process, and is done once.
TEST(FileRows, TracesThatTakeAnyNumberAreLeftAlone) {
  const auto unet = load(traced({}, 2));
  StepContext step(1.0, 0, 6, 5);
  int calls = 0;
  const auto count = [&calls](const AttentionCall& call, const Pass&, const NextAttention& next) {
    ++calls;
    return next(call);
  };
  const auto given = input(3);
  const auto state = torch::randn({4});
  torch::manual_seed(2);
  const auto out =
      run_hooked({{"middle.0.0", count, {}}}, {.groups = {{.count = 3}}, .step = &step},
                 [&] { return unet->forward(given); });
  const auto drawn = torch::randn({4});
  torch::manual_seed(2);
  EXPECT_TRUE(drawn.equal(torch::randn({4})));
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(out.equal(plain_result(given)));
  EXPECT_EQ(unet->evaluated_rows(given.x.sizes()), 3);
}

TEST(FileRows, AreFoundOnceByManyThreads) {
  const auto unet = load(traced(baked()[2].fixture, 2));
  std::vector<std::thread> threads;
  std::vector<torch::Tensor> results(6);
  std::vector<UNetInput> given;
  for (std::int64_t i = 0; i < 6; ++i) given.push_back(input(i % 4 + 1));
  for (std::size_t i = 0; i < 6; ++i)
    threads.emplace_back([&, i] { results[i] = unet->forward(given[i]); });
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < 6; ++i)
    EXPECT_TRUE(torch::allclose(results[i], plain_result(given[i]), 1e-4, 1e-5)) << i;
}

// A frozen module has lost what it was traced with.
TEST(FileRows, WhereNothingTellsThemTheErrorSaysWhatToDo) {
  const auto note = HasSubstr("TorchScriptUNetOptions::rows, sag-sample: --unet-rows");
  const auto frozen = [](const TorchScriptFixture& fixture) {
    return torch::jit::freeze_module(traced(fixture, 2));
  };
  for (const auto& of : {baked()[0], baked()[1]}) {
    const auto unet = load(frozen(of.fixture));
    EXPECT_NO_THROW(unet->forward(input(2)));
    EXPECT_THAT(error_of([&] { unet->forward(input(1)); }), AllOf(one_sentence(), note));
    EXPECT_THAT(error_of([&] { unet->forward(input(3)); }), AllOf(one_sentence(), note));
  }
  // What fails for another reason says that reason.
  auto other = input(3);
  other.context = torch::randn({3, 3, test::kContextWidth + 1});
  EXPECT_THAT(error_of([&] { load(traced({}, 2))->forward(other); }),
              AllOf(one_sentence(), HasSubstr("mat1"), Not(note)));
  EXPECT_THROW(load(make_torchscript_unet(), {.rows = -1}), c10::ValueError);
  EXPECT_THROW(TorchScriptUNet::from_module(make_torchscript_unet(), -1), c10::ValueError);
}

// ---- timesteps

constexpr const char* kSin = "torch.linear(torch.sin(torch.unsqueeze(";
constexpr const char* kOf = ", 1) * self.frequencies), self.time)";

TorchScriptFixture with_time(const std::string& type, const std::string& rows) {
  return {.arguments = "x: Tensor, timesteps: " + type + ", context: Tensor",
          .time = kSin + rows + kOf};
}

TEST(FileTimesteps, MayBeOneNumber) {
  const std::string
      filled = "torch.full([x.size(0)], float(timesteps))",
      given = "torch.full([x.size(0)], float(timesteps) if timesteps is not None else 0.0)";
  for (const auto& fixture :
       {with_time("int", filled), with_time("float", filled), with_time("Optional[int]", given),
        with_time("Optional[float]", given)}) {
    const auto unet = load(make_torchscript_unet(fixture));
    for (const std::int64_t rows : {1, 3})
      EXPECT_TRUE(torch::allclose(unet->forward(input(rows)), plain_result(input(rows))))
          << fixture.arguments;
  }
  const auto whole = load(make_torchscript_unet(with_time("int", filled))),
             fraction = load(make_torchscript_unet(with_time("float", filled)));
  EXPECT_TRUE(torch::allclose(whole->forward(input(2, 500.4)), plain_result(input(2, 500))));
  EXPECT_TRUE(torch::allclose(whole->forward(input(2, 499.6)), plain_result(input(2, 500))));
  EXPECT_TRUE(torch::allclose(fraction->forward(input(2, 0.4)), plain_result(input(2, 0.4))));
  EXPECT_THAT(error_of<c10::ValueError>([&] { whole->forward(input(2, 0.4)); }),
              AllOf(one_sentence(), HasSubstr("whole numbers"), HasSubstr("0.4")));
}

TEST(FileTimesteps, MayBeOneForAllRows) {
  // As diffusers' UNets are traced with a scheduler's timestep.
  const auto fixture = with_time("Tensor", "torch.unsqueeze(timesteps, 0).expand([x.size(0)])");
  const auto none = load(traced(fixture, 2, torch::tensor(981.0)));
  const auto one = load(traced(with_time("Tensor", "torch.repeat_interleave(timesteps, x.size(0))"),
                               2, torch::tensor({981})));
  for (const auto& unet : {none, one}) {
    for (const std::int64_t rows : {1, 2, 3})
      EXPECT_TRUE(torch::allclose(unet->forward(input(rows)), plain_result(input(rows))));
    auto unequal = input(2);
    unequal.timesteps[1] = 3;
    EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(unequal); }),
                AllOf(one_sentence(), HasSubstr("one for all rows"), HasSubstr("3 to 500")));
  }
  EXPECT_EQ(guided_run(none, 2, 0, true).report.guided(), 3);
}

TEST(FileTimesteps, MayBeIndices) {
  const std::string table = "torch.reshape(torch.arange(8000.0), [1000, 8]) / 8000";
  const std::vector<std::string> lookups = {
      "torch.embedding(" + table + ", timesteps)",
      "torch.embedding(" + table + ", torch.reshape(timesteps, [-1, 1]))[:, 0]",
      "(" + table + ")[timesteps]", "torch.index_select(" + table + ", 0, timesteps)",
      // Would cut fractions off.
      "(" + table + ")[torch.to(timesteps, 4)]"};
  for (const auto& lookup : lookups) {
    const auto unet = load(traced({.time = lookup}, 2));
    const auto out = unet->forward(input(2));
    EXPECT_TRUE(out.isfinite().all().item<bool>());
    EXPECT_FALSE(torch::allclose(out, unet->forward(input(2, 501)))) << lookup;
    EXPECT_TRUE(out.equal(unet->forward(input(2, 499.7)))) << lookup;
    EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(input(2, 0.25)); }),
                HasSubstr("0.25"));
    EXPECT_EQ(guided_run(unet, 1).report.guided(), 3);
  }
}

// The trace of code that reads a number.
TEST(FileTimesteps, MustNotBeWrittenIntoATrace) {
  const std::string of_rows = "torch.zeros([x.size(0), 8]) + 500",
                    of_shape = "torch.zeros([timesteps.size(0), 8]) + 500",
                    of_likeness =
                        "torch.full_like(timesteps.clone(), 500.0)"
                        ".unsqueeze(1).repeat([1, 8])";
  for (const auto& time : {of_rows, of_shape, of_likeness}) {
    const TorchScriptFixture fixture = {.time = time};
    EXPECT_THAT(
        error_of<c10::ValueError>([&] { load(traced(fixture, 2)); }),
        AllOf(one_sentence(), HasSubstr("must compute with its timesteps"), HasSubstr("script")));
    EXPECT_NO_THROW(load(make_torchscript_unet(fixture))) << "nothing says that it is a trace";
  }
}

// Its own arithmetic keeps fractions, whatever it was traced with.
TEST(FileTimesteps, KeepTheirFractionsWhereTheFileDoesNotNeedWholeNumbers) {
  for (const auto dtype : {torch::kLong, torch::kInt, torch::kHalf, torch::kDouble}) {
    const auto unet = load(traced({}, 2, torch::full({2}, 500, dtype)));
    EXPECT_TRUE(torch::allclose(unet->forward(input(2, 499.7)), plain_result(input(2, 499.7))));
  }
}

TEST(FileTimesteps, OfAHalfPrecisionFileRunInBothPrecisions) {
  auto half = traced({}, 2, torch::full({2}, 500, torch::kHalf));
  half.to(torch::kHalf);
  auto rounded = make_torchscript_unet();
  rounded.to(torch::kHalf);
  rounded.to(torch::kFloat);
  const auto given = input(3);
  const auto expected = TorchScriptUNet::from_module(rounded)->forward(given);
  EXPECT_TRUE(torch::allclose(load(half)->forward(given), expected, 0.05, 0.05));
  auto narrow = given;
  narrow.x = given.x.to(torch::kHalf);
  narrow.context = given.context.to(torch::kHalf);
  const auto out = load(half, {.dtype = torch::kHalf})->forward(narrow);
  EXPECT_TRUE(torch::allclose(out.to(torch::kFloat), expected, 0.05, 0.05));
}

}  // namespace
}  // namespace sag

// Compiled UNets. The packages are written by aoti_fixture.py, which ctest runs first.
#include "sag/aoti_unet.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <thread>

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "sag/attention_map.h"
#include "sag/attention_scope.h"
#include "sag/cfg_guider.h"
#include "sag/cuda_graph_unet.h"
#include "sag/model_patcher.h"
#include "sag/normalized_attention_guidance.h"
#include "sag/samplers.h"
#include "sag/self_attention_guidance.h"
#include "sag/step_context.h"
#include "sag/torchscript_unet.h"
#include "support/device.h"
#include "support/error.h"
#include "support/files.h"
#include "support/toy_unet.h"

namespace sag {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::fill;
using test::one_sentence;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kPackages = SAG_PACKAGES "/";
constexpr const char* kMiddle = "middle_block.1.transformer_blocks.0.attn1";

std::shared_ptr<AotiUNet> load(const std::string& name) {
  return AotiUNet::load(kPackages + name);
}
std::shared_ptr<TorchScriptUNet> reference(torch::Device device = torch::kCPU) {
  return TorchScriptUNet::load(kPackages + "unet.ts", {.device = device});
}

UNetInput make_input(std::int64_t rows = 2, std::int64_t height = 12, std::int64_t width = 16,
                     torch::Device device = torch::kCPU) {
  torch::manual_seed(3);
  return {.x = torch::randn({rows, 4, height, width}).to(device),
          .timesteps = torch::linspace(1, 900, rows).to(device),
          .context = torch::randn({rows, 3, 6}).to(device),
          .y = torch::randn({rows, 5}).to(device)};
}

// The largest difference, relative to the largest value.
double difference(const torch::Tensor& a, const torch::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

torch::Tensor with_hooks(const UNet& unet, const UNetInput& input,
                         const std::vector<std::string>& sites, const AttentionHook& hook) {
  StepContext step(1.0, 0, input.x.size(2), input.x.size(3));
  Pass pass;
  pass.step = &step;
  std::vector<InstalledHook> hooks;
  for (const auto& site : sites)
    hooks.push_back({resolve_attention_site(unet, AttentionSite(site)), hook, {}});
  return run_hooked(hooks, pass, [&] { return unet.forward(input); });
}

// What a hook at the middle block sees.
AttentionCall middle_call(const UNet& unet, const UNetInput& input) {
  AttentionCall seen;
  int runs = 0;
  with_hooks(unet, input, {"middle.0.0"},
             [&](const AttentionCall& call, const Pass&, const NextAttention& next) {
               ++runs;
               // Copies: compiled code reuses the memory.
               seen = {.q = call.q.clone(), .k = call.k.clone(), .v = call.v.clone()};
               return next(call);
             });
  EXPECT_EQ(runs, 1);
  return seen;
}

torch::Tensor returns_v(const AttentionCall& call, const Pass&, const NextAttention&) {
  return call.v;
}

struct Run {
  torch::Tensor latent;
  std::int64_t guided;
};

// A guided run; every evaluation has calls of 2 rows and of 1.
Run sample(const std::shared_ptr<const UNet>& unet, const SelfAttentionGuidanceOptions& options,
           std::int64_t height = 12, std::int64_t width = 16) {
  const auto device = unet->device();
  // No random numbers: threads share LibTorch's generator.
  const auto prompt = [&](double phase) {
    return Conditioning{.context = fill({1, 3, 6}, 0.7, phase, 1.0).to(device),
                        .y = fill({1, 5}, 0.3, phase, 1.0).to(device)};
  };
  const auto model = apply_self_attention_guidance({unet, ModelSampling::discrete()}, options);
  const std::vector<double> sigmas = {10, 4, 1.5, 0.5, 0};
  CfgGuider guider(model, {prompt(0.1)}, {prompt(0.8)}, {.cond_scale = 3.0});
  guider.begin_run(sigmas);
  const auto x = fill({1, 4, height, width}, 0.7, 0.3, 15.0).to(device);
  const auto latent = sample_euler(std::ref(guider), x, sigmas);
  return {latent, guider.report().guided()};
}

// ---- values

TEST(AotiUNet, GivesWhatPyTorchGave) {
  const auto bytes = test::read_bytes(kPackages + "call.pt");
  const auto call = torch::pickle_load({bytes.begin(), bytes.end()}).toGenericDict();
  const auto tensor = [&](const char* name) { return call.at(name).toTensor(); };
  const UNetInput input{.x = tensor("x"),
                        .timesteps = tensor("timesteps"),
                        .context = tensor("context"),
                        .y = tensor("y")};
  EXPECT_LT(difference(load("unet.pt2")->forward(input), tensor("out")), 2e-5);
  EXPECT_LT(difference(load("folder")->forward(input), tensor("out")), 2e-5);
}

TEST(AotiUNet, TakesEveryRowCountAndSizeOfItsRanges) {
  const auto unet = load("unet.pt2");
  const auto expected = reference();
  for (const std::int64_t rows : {1, 2, 3, 4})
    for (const auto& [height, width] : {std::pair{6, 6}, {6, 24}, {14, 10}, {24, 22}, {12, 16}}) {
      const auto input = make_input(rows, height, width);
      EXPECT_LT(difference(unet->forward(input), expected->forward(input)), 2e-5)
          << rows << " rows of " << height << " x " << width;
    }
}

TEST(AotiUNet, TellsWhereItRunsAndInWhat) {
  const auto unet = load("unet.pt2");
  EXPECT_EQ(unet->device(), torch::kCPU);
  EXPECT_EQ(unet->dtype(), torch::kFloat);
  EXPECT_EQ(load("plain.pt2")->dtype(), torch::kBFloat16);
  EXPECT_NO_THROW(AotiUNet::load(kPackages + "unet.pt2", {.device = torch::kCPU}));
}

TEST(AotiUNet, TakesInputsInEveryLayout) {
  const auto unet = load("unet.pt2");
  const auto input = make_input();
  const auto expected = unet->forward(input);
  auto other = input;
  other.x = input.x.contiguous(at::MemoryFormat::ChannelsLast);
  other.context = input.context.transpose(1, 2).contiguous().transpose(1, 2);
  other.y = torch::cat({input.y, input.y}, 1).slice(1, 0, 5);
  // Begins one element after its storage, as rows of a larger tensor may.
  other.timesteps = torch::cat({torch::ones({1}), input.timesteps}).slice(0, 1);
  EXPECT_TRUE(unet->forward(other).equal(expected));

  auto expanded = input;
  expanded.x = input.x.slice(0, 0, 1).expand({2, 4, 12, 16});
  expanded.context = input.context.slice(0, 0, 1).expand({2, 3, 6});
  auto copied = expanded;
  copied.x = expanded.x.clone();
  copied.context = expanded.context.clone();
  EXPECT_TRUE(unet->forward(expanded).equal(unet->forward(copied)));
}

TEST(AotiUNet, GivesOrdinaryTensorsOfTheirOwn) {
  const auto unet = load("unet.pt2");
  const auto input = make_input();
  torch::Tensor first;
  {
    const c10::InferenceMode inference;
    first = unet->forward(input);
  }
  EXPECT_FALSE(first.is_inference());
  EXPECT_TRUE(first.is_contiguous());
  EXPECT_FALSE(first.requires_grad());
  const auto before = first.clone();
  auto other = input;
  other.x = input.x * 2;
  EXPECT_FALSE(unet->forward(other).equal(before));
  EXPECT_TRUE(first.equal(before));
}

// ---- hooks

TEST(AotiUNet, ListsTheSitesThatWereMarked) {
  const auto expected = reference()->attention_sites();
  for (const char* name : {"unet.pt2", "folder"}) {
    const auto sites = load(name)->attention_sites();
    ASSERT_EQ(sites.size(), expected.size());
    for (std::size_t i = 0; i < sites.size(); ++i) {
      EXPECT_EQ(sites[i].name, expected[i].name);
      EXPECT_EQ(sites[i].path, expected[i].path);
      EXPECT_EQ(sites[i].ordinal, expected[i].ordinal);
    }
  }
  EXPECT_TRUE(load("plain.pt2")->attention_sites().empty());
}

TEST(AotiUNet, HooksSeeWhatATorchScriptUNetsHooksSee) {
  const auto input = make_input(3, 14, 10);
  const auto seen = middle_call(*load("unet.pt2"), input);
  const auto expected = middle_call(*reference(), input);
  EXPECT_EQ(seen.q.sizes(), expected.q.sizes());
  EXPECT_LT(difference(seen.q, expected.q), 2e-5);
  EXPECT_LT(difference(seen.k, expected.k), 2e-5);
  EXPECT_LT(difference(seen.v, expected.v), 2e-5);
  EXPECT_LT(difference(attention_map(seen.q, seen.k), attention_map(expected.q, expected.k)), 2e-5);
}

TEST(AotiUNet, HooksReplaceTheAttentionOfTheirSite) {
  const auto unet = load("unet.pt2");
  const auto expected = reference();
  const auto input = make_input();
  const auto plain = unet->forward(input);
  for (const char* site : {"middle.0.0", "input.1.0", "#2", kMiddle}) {
    const auto replaced = with_hooks(*unet, input, {site}, returns_v);
    EXPECT_GT(difference(replaced, plain), 1e-3) << site;
    EXPECT_LT(difference(replaced, with_hooks(*expected, input, {site}, returns_v)), 2e-5) << site;
  }
  const auto both = with_hooks(*unet, input, {"middle.0.0", "input.1.0"}, returns_v);
  EXPECT_LT(difference(both, with_hooks(*expected, input, {"middle.0.0", "input.1.0"}, returns_v)),
            2e-5);
  EXPECT_TRUE(unet->forward(input).equal(plain));
}

TEST(AotiUNet, AHooksExceptionArrivesAsItself) {
  struct Mine : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  const auto unet = load("unet.pt2");
  const auto input = make_input();
  const auto plain = unet->forward(input);
  const AttentionHook raising = [](const auto&, const auto&, const auto&) -> torch::Tensor {
    throw Mine("no attention today");
  };
  EXPECT_THROW(with_hooks(*unet, input, {"middle.0.0"}, raising), Mine);
  const AttentionHook wrong = [](const auto& call, const auto&, const auto&) {
    return call.v.slice(2, 1);
  };
  EXPECT_THROW(with_hooks(*unet, input, {"middle.0.0"}, wrong), c10::ValueError);
  EXPECT_TRUE(unet->forward(input).equal(plain));
  EXPECT_GT(difference(with_hooks(*unet, input, {"middle.0.0"}, returns_v), plain), 1e-3);
}

TEST(AotiUNet, AHookMayCallTheUNetItself) {
  const auto unet = load("unet.pt2");
  const auto input = make_input();
  const auto plain = unet->forward(input);
  torch::Tensor inner;
  const auto out =
      with_hooks(*unet, input, {"middle.0.0"},
                 [&](const AttentionCall& call, const Pass&, const NextAttention& next) {
                   StepContext step(1.0, 0, 12, 16);
                   Pass pass;
                   pass.step = &step;
                   const AttentionScope none({}, pass);
                   inner = unet->forward(input);
                   return next(call);
                 });
  EXPECT_TRUE(inner.equal(plain));
  EXPECT_TRUE(out.equal(plain));
}

TEST(AotiUNet, SaysHowToGetASiteThatWasNotMarked) {
  const auto unet = load("foreign/one_site.pt2");
  const auto message = error_of<c10::ValueError>([&] {
    resolve_attention_site(*unet, {"input", 1, 0});
  });
  EXPECT_THAT(message, AllOf(HasSubstr("middle.0.0"), HasSubstr("--site")));
  EXPECT_THAT(error_of<c10::ValueError>([&] {
                resolve_attention_site(CudaGraphUNet(unet), {"input", 1, 0});
              }),
              HasSubstr("--site"));
  const AttentionHook hook = returns_v;
  StepContext step(1.0, 0, 12, 16);
  Pass pass;
  pass.step = &step;
  const AttentionScope scope({{"input.1.0", hook, {}}}, pass);
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(make_input()); }),
              AllOf(one_sentence(), HasSubstr("got \"input.1.0\"."), HasSubstr("middle.0.0")));
}

// ---- folders

TEST(AotiUNet, AFoldersPackagesGiveTheSameValues) {
  const auto folder = load("folder");
  const auto expected = reference();
  // 2 rows of 12 x 16 have a package of their own.
  for (const std::int64_t rows : {1, 2, 4})
    for (const std::int64_t height : {12, 14}) {
      const auto input = make_input(rows, height, 16);
      EXPECT_LT(difference(folder->forward(input), expected->forward(input)), 2e-5)
          << rows << " rows, height " << height;
      EXPECT_LT(difference(with_hooks(*folder, input, {"middle.0.0"}, returns_v),
                           with_hooks(*expected, input, {"middle.0.0"}, returns_v)),
                2e-5);
    }
}

using Links = std::map<std::string, std::string>;

// A folder with links to some of the fixture's files, deleted at the end of the test.
class Folder : public test::TemporaryFolder {
 public:
  explicit Folder(const Links& links) {
    for (const auto& [name, target] : links)
      fs::create_symlink(fs::absolute(kPackages + target), path(name));
  }
};

TEST(AotiUNet, TheMostSpecificPackageOfAFolderRuns) {
  // The package for 2 rows of 12 x 16 takes its weights from the file, which holds others.
  const Folder folder(Links{
      {"a.pt2", "unet.pt2"}, {"b.pt2", "folder/rows_2.pt2"}, {"weights.pt", "folder/doubled.pt"}});
  const auto unet = AotiUNet::load(folder.path());
  const auto expected = reference();
  const auto other = make_input(3), fixed = make_input(2);
  EXPECT_LT(difference(unet->forward(other), expected->forward(other)), 2e-5);
  EXPECT_GT(difference(unet->forward(fixed), expected->forward(fixed)), 0.1);
  EXPECT_THAT(
      error_of<c10::ValueError>([&] { unet->forward(make_input(2, 13)); }),
      AllOf(one_sentence(), HasSubstr("x [2, 4, 12, 16]"), HasSubstr("; or x [1-4, 4, 6-24")));
}

TEST(AotiUNet, RefusesFoldersWhosePackagesDoNotBelongTogether) {
  const Folder dtypes(Links{{"a.pt2", "unet.pt2"}, {"b.pt2", "plain.pt2"}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(dtypes.path()); }),
              AllOf(one_sentence(), HasSubstr("inputs and dtypes"), HasSubstr("b.pt2")));
}

// A package that was left there, of the same architecture but with other weights.
TEST(AotiUNet, RefusesFoldersOfDifferentNetworks) {
  const Folder networks(Links{{"a.pt2", "unet.pt2"}, {"b.pt2", "foreign/other_model.pt2"}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(networks.path()); }),
              AllOf(one_sentence(), HasSubstr("network and weights"), HasSubstr("b.pt2")));
}

TEST(AotiUNet, RefusesFoldersWithDifferentSites) {
  const Folder sites(Links{{"a.pt2", "unet.pt2"}, {"b.pt2", "foreign/one_site.pt2"}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(sites.path()); }),
              AllOf(one_sentence(), HasSubstr("attention sites"), HasSubstr("b.pt2")));
}

TEST(AotiUNet, RefusesFoldersWithoutPackages) {
  const Folder empty(Links{{"weights.pt", "folder/weights.pt"}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(empty.path()); }),
              AllOf(one_sentence(), HasSubstr("*.pt2")));
}

TEST(AotiUNet, RefusesWeightsThatAreNotThePackages) {
  struct Case {
    const char *file, *says;
  };
  for (const auto& [file, says] :
       {Case{"lacking.pt", "must hold \"middle_block.1.transformer_blocks.0.attn1.to_q.weight\""},
        Case{"small.pt", "float32 16,16 16,1, got float32 3,3 3,1"},
        Case{"half.pt", "got float16 16,16 16,1"}, Case{"turned.pt", "got float32 16,16 1,16"},
        Case{"list.pt", "which holds something else"}, Case{"rows_2.pt2", "cannot be read"}}) {
    const Folder folder(
        {{"a.pt2", "folder/rows_2.pt2"}, {"weights.pt", c10::str("folder/", file)}});
    EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(folder.path()); }),
                AllOf(one_sentence(), HasSubstr("weights.pt"), HasSubstr(says)))
        << file;
  }
  const Folder none(Links{{"a.pt2", "folder/rows_2.pt2"}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(none.path()); }),
              AllOf(one_sentence(), HasSubstr("weights.pt"), HasSubstr("does not exist")));
}

TEST(AotiUNet, SharedWeightsAreFreedWithTheUNet) {
  const auto resident = [] {
    std::ifstream file("/proc/self/statm");
    std::int64_t total = 0, pages = 0;
    file >> total >> pages;
    return pages * ::getpagesize() >> 20;
  };
  // 64 MiB of weights.
  const Folder folder(Links{{"a.pt2", "folder/rows_2.pt2"}, {"weights.pt", "folder/heavy.pt"}});
  AotiUNet::load(folder.path())->forward(make_input());
  const auto before = resident();
  for (int i = 0; i < 3; ++i) AotiUNet::load(folder.path())->forward(make_input());
  EXPECT_LT(resident() - before, 32);
}

// ---- weights from memory

using GivenWeights = decltype(AotiUNetOptions::weights);

std::map<std::string, torch::Tensor> stored_weights(const std::string& name = "folder/weights.pt") {
  const auto bytes = test::read_bytes(kPackages + name);
  std::map<std::string, torch::Tensor> weights;
  for (const auto& entry : torch::pickle_load({bytes.begin(), bytes.end()}).toGenericDict())
    weights.emplace(entry.key().toStringRef(), entry.value().toTensor());
  return weights;
}

GivenWeights giving(const std::map<std::string, torch::Tensor>& weights) {
  GivenWeights given;
  for (const auto& [name, t] : weights) given.emplace(name, [t = t] { return t; });
  return given;
}

std::shared_ptr<AotiUNet> load_with(const std::map<std::string, torch::Tensor>& weights,
                                    const std::string& name = "skeleton") {
  return AotiUNet::load(kPackages + name, {.weights = giving(weights)});
}

TEST(AotiUNet, TakesWeightsFromMemory) {
  const auto weights = stored_weights();
  for (const char* name : {"folder", "skeleton"}) {
    const auto given = load_with(weights, name);
    const auto expected = load("folder");
    // 2 rows of 12 x 16 have a package of their own.
    for (const std::int64_t rows : {2, 3})
      EXPECT_TRUE(given->forward(make_input(rows)).equal(expected->forward(make_input(rows))));
    EXPECT_LT(difference(with_hooks(*given, make_input(), {"middle.0.0"}, returns_v),
                         with_hooks(*reference(), make_input(), {"middle.0.0"}, returns_v)),
              2e-5);
  }
  const auto expected = stored_weights("folder/doubled.pt");
  const Folder doubled(Links{{"a.pt2", "folder/rows_2.pt2"}, {"weights.pt", "folder/doubled.pt"}});
  EXPECT_TRUE(load_with(expected)
                  ->forward(make_input())
                  .equal(AotiUNet::load(doubled.path())->forward(make_input())));
}

TEST(AotiUNet, AsksForEachWeightOnce) {
  std::map<std::string, int> calls;
  GivenWeights given;
  for (const auto& [name, t] : stored_weights())
    given.emplace(name, [&calls, name = name, t = t] {
      ++calls[name];
      return t;
    });
  const auto unet = AotiUNet::load(kPackages + "skeleton", {.weights = given});
  EXPECT_EQ(calls.size(), given.size());
  for (const auto& [name, count] : calls) EXPECT_EQ(count, 1) << name;
}

// Halves are exact in every other dtype here, so that the results are equal.
TEST(AotiUNet, ConvertsWeightsOfOtherDtypesAndStrides) {
  auto weights = stored_weights();
  for (auto& [name, t] : weights) t = t.to(torch::kHalf).to(torch::kFloat);
  const auto expected = load_with(weights)->forward(make_input());
  const auto with = [&](const std::function<torch::Tensor(const torch::Tensor&)>& change) {
    auto changed = weights;
    for (auto& [name, t] : changed) t = change(t);
    return load_with(changed)->forward(make_input());
  };
  EXPECT_TRUE(with([](const auto& t) { return t.to(torch::kHalf); }).equal(expected));
  EXPECT_TRUE(with([](const auto& t) { return t.to(torch::kDouble); }).equal(expected));
  EXPECT_TRUE(with([](const auto& t) {
                return t.dim() == 4
                           ? t.to(torch::kHalf, false, false, at::MemoryFormat::ChannelsLast)
                           : t.t().contiguous().t();
              }).equal(expected));
  // Begins one element after its storage, as a tensor of a mapped file may.
  EXPECT_TRUE(with([](const auto& t) {
                return torch::cat({torch::ones({1}), t.flatten()}).slice(0, 1).view(t.sizes());
              }).equal(expected));
}

TEST(AotiUNet, SharesWeightsThatLieAsItNeedsThem) {
  auto weights = stored_weights();
  const auto unet = load_with(weights);
  const auto before = unet->forward(make_input());
  weights.at("out.weight").mul_(2);
  EXPECT_FALSE(unet->forward(make_input()).equal(before));
  auto halves = stored_weights();
  halves.at("out.weight") = halves.at("out.weight").to(torch::kHalf);
  const auto copied = load_with(halves);
  const auto once = copied->forward(make_input());
  halves.at("out.weight").mul_(2);
  EXPECT_TRUE(copied->forward(make_input()).equal(once));
}

TEST(AotiUNet, RefusesWeightsFromMemoryThatAreNotThePackages) {
  const std::string name = "middle_block.1.transformer_blocks.0.attn1.to_q.weight";
  const auto message = [&](const std::function<void(std::map<std::string, torch::Tensor>&)>& change,
                           const char* package = "skeleton") {
    auto weights = stored_weights();
    change(weights);
    return error_of<c10::ValueError>([&] { load_with(weights, package); });
  };
  const auto with = [&](const torch::Tensor& t) {
    return message([&](auto& weights) { weights.at(name) = t; });
  };
  EXPECT_THAT(message([&](auto& weights) { weights.erase(name); }),
              AllOf(one_sentence(), HasSubstr("1 are missing"), HasSubstr(name)));
  EXPECT_THAT(message([](auto& weights) { weights["further.bias"] = torch::ones(2); }),
              AllOf(one_sentence(), HasSubstr("1 others"), HasSubstr("\"further.bias\"")));
  EXPECT_THAT(with(torch::ones({3, 3})),
              AllOf(one_sentence(), HasSubstr(name), HasSubstr("float32 16,16 16,1"),
                    HasSubstr("got float32 3,3 3,1")));
  EXPECT_THAT(with(torch::ones({16, 16}, torch::kInt)),
              AllOf(one_sentence(), HasSubstr("got int32 16,16 16,1")));
  EXPECT_THAT(with(torch::ones({256})), HasSubstr("got float32 256 1"));
  EXPECT_THAT(with(torch::Tensor()), AllOf(one_sentence(), HasSubstr("got no dense tensor")));
  EXPECT_THAT(with(torch::ones({16, 16}).to_sparse()), HasSubstr("got no dense tensor"));
  EXPECT_THAT(with(torch::ones({16, 16}, torch::kMeta)),
              AllOf(one_sentence(), HasSubstr("on the CPU or on cpu"), HasSubstr("on meta")));
  EXPECT_THAT(with(torch::full({16, 16}, NAN)),
              AllOf(one_sentence(), HasSubstr("finite"), HasSubstr(name)));
  // Beyond fp32, the packages' dtype.
  EXPECT_THAT(with(torch::full({16, 16}, 1e300, torch::kDouble)), HasSubstr("finite"));
  EXPECT_THAT(message([](auto&) {}, "unet.pt2"),
              AllOf(one_sentence(), HasSubstr("unet.pt2"), HasSubstr("holds its own")));
}

TEST(AotiUNet, AnExceptionOfWhatGivesAWeightArrivesAsItself) {
  struct Mine : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  auto given = giving(stored_weights());
  given.begin()->second = []() -> torch::Tensor { throw Mine("no weight today"); };
  EXPECT_THROW(AotiUNet::load(kPackages + "skeleton", {.weights = given}), Mine);
}

TEST(AotiUNet, ASkeletonsPackagesNeedACheckpoint) {
  for (const char* name : {"skeleton", "skeleton/rows_2.pt2"})
    EXPECT_THAT(error_of<c10::ValueError>([&] { load(name); }),
                AllOf(one_sentence(), HasSubstr("--checkpoint"), HasSubstr("those of toy")));
  EXPECT_EQ(AotiUNet::skeleton(kPackages + "skeleton"), "toy");
  EXPECT_EQ(AotiUNet::skeleton(kPackages + "folder"), "");
  EXPECT_THAT(error_of<c10::ValueError>([] { AotiUNet::skeleton(kPackages + "unet.ts"); }),
              one_sentence());
  const Folder mixed(Links{{"a.pt2", "folder/a_range.pt2"}, {"b.pt2", "skeleton/rows_2.pt2"}});
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(mixed.path()); }),
              HasSubstr("network and weights"));
}

// ---- rows

// A call of other rows is filled up and split; hooks and reports see what was asked for.
TEST(AotiUNet, APackageForOneNumberOfRowsTakesAny) {
  const Folder folder(Links{{"a.pt2", "folder/rows_2.pt2"}, {"weights.pt", "folder/weights.pt"}});
  const auto fixed = AotiUNet::load(folder.path());
  const auto expected = reference();
  for (const std::int64_t rows : {1, 2, 3, 5}) {
    const auto input = make_input(rows);
    EXPECT_LT(difference(fixed->forward(input), expected->forward(input)), 2e-5) << rows;
    EXPECT_LT(difference(with_hooks(*fixed, input, {"middle.0.0"}, returns_v),
                         with_hooks(*expected, input, {"middle.0.0"}, returns_v)),
              2e-5);
    EXPECT_EQ(fixed->evaluated_rows(input.x.sizes()), (rows + 1) / 2 * 2);
  }
  const auto run = sample(fixed, {.scale = 1.0}), plain = sample(expected, {.scale = 1.0});
  EXPECT_EQ(run.guided, 4);
  EXPECT_LT(difference(run.latent, plain.latent), 1e-4);
  // The range takes every number up to its highest.
  const auto range = load("unet.pt2");
  EXPECT_EQ(range->evaluated_rows({3, 4, 12, 16}), 3);
  EXPECT_LT(difference(range->forward(make_input(5)), expected->forward(make_input(5))), 2e-5);
}

// ---- inputs that do not fit

TEST(AotiUNet, RefusesInputsThatDoNotFit) {
  const auto unet = load("unet.pt2");
  const auto with = [&](const std::function<void(UNetInput&)>& change) {
    return [&unet, change] {
      auto input = make_input();
      change(input);
      unet->forward(input);
    };
  };
  const auto value_error = [&](const std::function<void(UNetInput&)>& change) {
    return error_of<c10::ValueError>(with(change));
  };
  const std::string takes = "x [1-4, 4, 6-24 in steps of 2, 6-24 in steps of 2], timesteps [1-4]";
  EXPECT_THAT(value_error([](auto& in) { in = make_input(2, 13, 16); }),
              AllOf(one_sentence(), HasSubstr(takes), HasSubstr("got x of shape [2, 4, 13, 16]")));
  EXPECT_THAT(value_error([](auto& in) { in = make_input(2, 4, 16); }), HasSubstr(takes));
  EXPECT_THAT(value_error([](auto& in) { in = make_input(2, 12, 26); }), HasSubstr(takes));
  EXPECT_THAT(value_error([](auto& in) {
                in = make_input(5);
                in.context = torch::ones({4, 3, 6});
              }),
              HasSubstr("as many rows as x"));
  EXPECT_THAT(value_error([](auto& in) { in = make_input(0); }), HasSubstr("[0, 4, 12, 16]"));
  EXPECT_THAT(value_error([](auto& in) { in.x = torch::ones({2, 3, 12, 16}); }), HasSubstr(takes));
  EXPECT_THAT(value_error([](auto& in) {
                in.context = torch::ones({2, 4, 6});
              }),
              HasSubstr("context of shape [2, 4, 6]"));
  EXPECT_THAT(value_error([](auto& in) {
                in.context = torch::ones({1, 3, 6});
              }),
              AllOf(one_sentence(), HasSubstr("context"), HasSubstr("as many rows as x")));
  EXPECT_THAT(value_error([](auto& in) { in.timesteps = torch::ones({1}); }),
              HasSubstr("as many rows as x"));
  EXPECT_THAT(value_error([](auto& in) { in.timesteps = torch::tensor(1.f); }),
              HasSubstr("timesteps must have 1 dimensions"));
  EXPECT_THAT(value_error([](auto& in) { in.x = in.x[0]; }), HasSubstr("4 dimensions"));
  EXPECT_THAT(value_error([](auto& in) { in.x = torch::Tensor(); }),
              HasSubstr("got an undefined tensor"));
  EXPECT_THAT(value_error([](auto& in) { in.timesteps = torch::Tensor(); }),
              HasSubstr("input \"timesteps\" must be given, got nothing"));
  EXPECT_THAT(value_error([](auto& in) { in.context = torch::Tensor(); }),
              AllOf(one_sentence(), HasSubstr("input \"context\" must be given, got nothing")));
  EXPECT_THAT(value_error([](auto& in) { in.y = torch::Tensor(); }),
              HasSubstr("input \"y\" must be given, got nothing"));
  EXPECT_THAT(value_error([](auto& in) { in.extra["control"] = torch::ones({2}); }),
              AllOf(one_sentence(), HasSubstr("must be one of the package's"),
                    HasSubstr("got \"control\".")));
  EXPECT_THAT(value_error([](auto& in) { in.x = in.x.to(torch::kMeta); }), HasSubstr("device"));
  const auto type_error = [&](const std::function<void(UNetInput&)>& change) {
    return error_of<c10::TypeError>(with(change));
  };
  EXPECT_THAT(type_error([](auto& in) { in.x = in.x.to(torch::kHalf); }),
              AllOf(one_sentence(), HasSubstr("x must be Float, got Half")));
  EXPECT_THAT(type_error([](auto& in) { in.timesteps = in.timesteps.to(torch::kLong); }),
              HasSubstr("timesteps must be Float"));
  EXPECT_NO_THROW(unet->forward(make_input()));
}

TEST(AotiUNet, RunsInTheDtypeItWasCompiledForAndTakesInputsByName) {
  const auto unet = load("plain.pt2");
  const UNetInput input{.x = torch::randn({2, 4, 8, 8}).to(torch::kBFloat16),
                        .timesteps = torch::ones({2}),
                        .extra = {{"strength", torch::ones({2}, torch::kBFloat16)}}};
  const auto out = unet->forward(input);
  EXPECT_EQ(out.scalar_type(), torch::kBFloat16);
  EXPECT_GT(out.abs().max().item<double>(), 0.0);
  auto twice = input;
  twice.extra["strength"] = input.extra.at("strength") * 2;
  EXPECT_TRUE(unet->forward(twice).equal(out * 2));
  auto wide = input;
  wide.x = input.x.to(torch::kFloat);
  EXPECT_THAT(error_of<c10::TypeError>([&] { unet->forward(wide); }),
              HasSubstr("x must be BFloat16, got Float"));
  auto more = input;
  more.context = torch::ones({2, 3, 6}, torch::kBFloat16);
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(more); }),
              AllOf(HasSubstr("must be one of the package's"), HasSubstr("got \"context\".")));
  auto less = input;
  less.extra.clear();
  EXPECT_THAT(error_of<c10::ValueError>([&] { unet->forward(less); }),
              AllOf(one_sentence(), HasSubstr("input \"strength\" must be given, got nothing")));
}

// ---- files that do not fit

struct Foreign {
  const char *file, *says;
};

class ForeignFile : public ::testing::TestWithParam<Foreign> {};

TEST_P(ForeignFile, IsRefusedInOneSentence) {
  const auto path = kPackages + GetParam().file;
  EXPECT_THAT(error_of<c10::ValueError>([&] { AotiUNet::load(path); }),
              AllOf(one_sentence(), HasSubstr(path), HasSubstr(GetParam().says)));
}

INSTANTIATE_TEST_SUITE_P(
    AotiUNet, ForeignFile,
    ::testing::Values(Foreign{"foreign/bare.pt2", "not written by sag's exporter"},
                      Foreign{"foreign/format_2.pt2", "format 2, but only format 1"},
                      Foreign{"foreign/torch_2_6.pt2", "compiled by PyTorch 2.6.0"},
                      Foreign{"foreign/ppc.pt2", "compiled for ppc64le"},
                      Foreign{"foreign/no_inputs.pt2", "no \"sag.inputs\""},
                      Foreign{"foreign/odd_inputs.pt2", "\"six\" in place of a number"},
                      Foreign{"foreign/odd_cross_sites.pt2", "cross-attentions that make no sense"},
                      Foreign{"foreign/truncated.pt2", "truncated or damaged"},
                      Foreign{"foreign/zip.pt2", "cannot be read as one"},
                      Foreign{"foreign/tensors.pt2", "a file of torch.save"},
                      Foreign{"foreign/exported.pt2", "not compiled"},
                      Foreign{"unet.ts", "TorchScript archive"},
                      Foreign{"no_such.pt2", "does not exist"}),
    [](const auto& info) {
      std::string name = fs::path(info.param.file).filename().string();
      std::replace_if(
          name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
      return name;
    });

TEST(AotiUNet, RefusesADeviceItWasNotCompiledFor) {
  EXPECT_THAT(error_of<c10::ValueError>([] {
                AotiUNet::load(kPackages + "unet.pt2", {.device = torch::Device(torch::kCUDA)});
              }),
              AllOf(one_sentence(), HasSubstr("was compiled for"), HasSubstr("got cuda")));
  const auto on_cpu = [] {
    AotiUNet::load(kPackages + "foreign/cuda.pt2", {.device = torch::kCPU});
  };
  EXPECT_THAT(error_of<c10::ValueError>(on_cpu), AllOf(one_sentence(), HasSubstr("got cpu")));
  if (torch::cuda::is_available()) return;
  EXPECT_THAT(error_of<c10::ValueError>([] { load("foreign/cuda.pt2"); }),
              AllOf(one_sentence(), HasSubstr("one of the 0 CUDA devices")));
}

// The unpacked libraries that this process has loaded. Some stay mapped when they are closed, as
// files that are deleted.
std::set<std::string> unpacked() {
  std::set<std::string> found;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find("/data/aotinductor/") != std::string::npos && !line.ends_with(" (deleted)"))
      found.insert(line.substr(line.find('/')));
  return found;
}

TEST(AotiUNet, LeavesNothingUnpackedBehind) {
  std::set<std::string> files;
  {
    const auto unet = load("unet.pt2");
    const auto folder = load("folder");
    unet->forward(make_input());
    files = unpacked();
    EXPECT_EQ(files.size(), 3u);
  }
  // The folder of each file, /tmp/XXXXXX.
  for (const auto& file : files) {
    const auto root = file.substr(0, file.find('/', std::string("/tmp/").size()));
    EXPECT_FALSE(fs::exists(root)) << root;
  }
}

// ---- guidance, threads

TEST(AotiUNet, SelfAttentionGuidanceGivesATorchScriptUNetsRun) {
  for (const bool one_pass : {false, true}) {
    const SelfAttentionGuidanceOptions options{.scale = 0.75, .one_pass = one_pass};
    const auto expected = sample(reference(), options);
    EXPECT_EQ(expected.guided, 4);
    for (const char* name : {"unet.pt2", "folder"}) {
      const auto got = sample(load(name), options);
      EXPECT_EQ(got.guided, 4);
      EXPECT_LT(difference(got.latent, expected.latent), 2e-5) << name << ' ' << one_pass;
    }
    const auto unguided = sample(reference(), {.scale = 0});
    EXPECT_GT(difference(unguided.latent, expected.latent), 1e-3);
  }
}

TEST(AotiUNet, NormalizedAttentionGuidanceGivesATorchScriptUNetsRun) {
  const auto listed = load("cross.pt2")->cross_attention_sites(),
             expected_sites = reference()->cross_attention_sites();
  ASSERT_EQ(listed.size(), 2u);
  for (std::size_t i = 0; i < listed.size(); ++i) {
    EXPECT_EQ(listed[i].name, expected_sites[i].name);
    EXPECT_EQ(listed[i].path, expected_sites[i].path);
    EXPECT_EQ(listed[i].ordinal, expected_sites[i].ordinal);
  }
  const auto prompt = [](double phase) {
    return Conditioning{.context = fill({1, 3, 6}, 0.7, phase, 1.0),
                        .y = fill({1, 5}, 0.3, phase, 1.0)};
  };
  const auto x = fill({1, 4, 12, 16}, 0.7, 0.3, 15.0);
  const auto denoise = [&](const std::shared_ptr<const UNet>& unet, double cond_scale) {
    const auto model = apply_normalized_attention_guidance({unet, ModelSampling::discrete()});
    CfgGuider guider(model, {prompt(0.1)}, {prompt(0.8)}, {.cond_scale = cond_scale});
    const auto denoised = guider(x, 4);
    EXPECT_EQ(guider.report().guided(), 1);
    return denoised;
  };
  for (const double cond_scale : {1.0, 3.0})
    EXPECT_LT(difference(denoise(load("cross.pt2"), cond_scale), denoise(reference(), cond_scale)),
              2e-5);
  EXPECT_THAT(error_of<c10::ValueError>([&] { denoise(load("unet.pt2"), 1); }),
              HasSubstr("--cross-attention for all cross-attentions"));
}

TEST(AotiUNet, ServesSeveralThreads) {
  for (const char* name : {"unet.pt2", "folder"}) {
    const auto unet = load(name);
    const SelfAttentionGuidanceOptions options{.scale = 0.75};
    std::vector<torch::Tensor> expected, got(4);
    for (const std::int64_t width : {16, 14, 16, 22})
      expected.push_back(sample(unet, options, 12, width).latent);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < got.size(); ++i)
      threads.emplace_back([&, i] {
        const std::int64_t widths[] = {16, 14, 16, 22};
        got[i] = sample(unet, options, 12, widths[i]).latent;
      });
    for (auto& thread : threads) thread.join();
    for (std::size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i].equal(expected[i])) << i;
  }
}

TEST(AotiUNet, LoadsInSeveralThreads) {
  std::vector<std::shared_ptr<AotiUNet>> unets(4);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < unets.size(); ++i)
    threads.emplace_back([&, i] { unets[i] = load(i % 2 ? "unet.pt2" : "folder"); });
  for (auto& thread : threads) thread.join();
  for (const auto& unet : unets) EXPECT_EQ(unet->attention_sites().size(), 2u);
}

// ---- CUDA

class AotiCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    SAG_SKIP_WITHOUT_CUDA(torch::Device(torch::kCUDA));
    if (!fs::exists(kPackages + "cuda"))
      GTEST_SKIP() << "the packages were written where there was no CUDA device";
  }
  static torch::Device device() { return {torch::kCUDA, 0}; }
};

TEST_F(AotiCuda, GivesATorchScriptUNetsValues) {
  const auto unet = load("cuda");
  EXPECT_EQ(unet->device(), device());
  const auto expected = reference(device());
  for (const std::int64_t rows : {1, 2, 4})
    for (const std::int64_t height : {12, 14}) {
      const auto input = make_input(rows, height, 16, device());
      EXPECT_LT(difference(unet->forward(input), expected->forward(input)), 2e-5)
          << rows << " rows, height " << height;
      EXPECT_LT(difference(with_hooks(*unet, input, {"middle.0.0"}, returns_v),
                           with_hooks(*expected, input, {"middle.0.0"}, returns_v)),
                2e-5);
    }
  auto shifted = make_input(1, 12, 16, device());
  const auto plain = unet->forward(shifted);
  shifted.x = torch::cat({torch::ones({1}, device()), shifted.x.flatten()})
                  .slice(0, 1)
                  .view({1, 4, 12, 16});
  EXPECT_TRUE(unet->forward(shifted).equal(plain));
}

TEST_F(AotiCuda, TakesWeightsFromTheCpuAndFromTheDevice) {
  const auto expected = load("cuda")->forward(make_input(2, 12, 16, device()));
  auto weights = stored_weights();
  const auto with = [&] {
    return AotiUNet::load(kPackages + "cuda", {.weights = giving(weights)})
        ->forward(make_input(2, 12, 16, device()));
  };
  EXPECT_TRUE(with().equal(expected));
  for (auto& [name, t] : weights) t = t.to(torch::kDouble);
  EXPECT_TRUE(with().equal(expected));
  for (auto& [name, t] : weights) t = t.to(device());
  EXPECT_TRUE(with().equal(expected));
}

TEST_F(AotiCuda, RunsInsideCudaGraphs) {
  const auto unet = load("cuda");
  const SelfAttentionGuidanceOptions options{.scale = 0.75};
  for (const std::int64_t width : {16, 14}) {
    const auto graphs = std::make_shared<CudaGraphUNet>(unet);
    const auto expected = sample(unet, options, 12, width);
    const auto got = sample(graphs, options, 12, width);
    EXPECT_EQ(got.guided, 4);
    EXPECT_TRUE(got.latent.equal(expected.latent));
    const auto report = graphs->report();
    EXPECT_EQ(report.failure, "");
    EXPECT_EQ(report.captures, 2);
    EXPECT_EQ(report.replays, 8);
    EXPECT_TRUE(report.eager.empty());
    EXPECT_LT(difference(got.latent, sample(reference(device()), options, 12, width).latent), 2e-5);
  }
}

TEST_F(AotiCuda, ServesThreadsWithStreamsOfTheirOwn) {
  const auto unet = load("cuda");
  const SelfAttentionGuidanceOptions options{.scale = 0.75};
  const auto expected = sample(unet, options);
  std::vector<torch::Tensor> got(3);
  std::vector<std::thread> threads;
  for (auto& latent : got)
    threads.emplace_back([&] {
      const c10::Stream stream = c10::impl::VirtualGuardImpl(torch::kCUDA).getNewStream(device());
      const c10::StreamGuard on(stream);
      latent = sample(unet, options).latent;
      stream.synchronize();
    });
  for (auto& thread : threads) thread.join();
  for (const auto& latent : got) EXPECT_TRUE(latent.equal(expected.latent));
}

}  // namespace
}  // namespace sag

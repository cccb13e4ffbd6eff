// A sampling step with and without guidance, and the UNet alone, on any UNet, TorchScript or
// compiled:
//
//   step_benchmark --unet=sd15.ts --height=64 --width=64 --context_width=768
//   step_benchmark --unet=sdxl.ts --height=128 --width=128 --context_width=2048 --y=1286
//
//   step_benchmark --unet=compiled/unet.pt2 …, or a folder of packages: --dtype and channels_last
//   are its own
//
// Time is per call of the UNet or per step, over a whole run without a pause in between. "host_ms"
// is how long the host was busy, "MiB" what the run allocates at its peak. --cudnn_benchmark=1 lets
// cuDNN try its kernels out. --reference=FILE first compares the output and the attention map with
// another program's, and stops where token sums differ by 1e-3 (bf16: 8e-3) or the output by 5 %.
// Further options are Google Benchmark's.

#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <string>

#include <c10/core/DeviceGuard.h>

#include "device.h"
#include "reference.h"
#include "sag/adaptive_projected_guidance.h"
#include "sag/aoti_unet.h"
#include "sag/cfg_guider.h"
#include "sag/cuda_graph_unet.h"
#include "sag/normalized_attention_guidance.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/rescale_cfg.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/self_attention_guidance.h"
#include "sag/skip_layer_guidance.h"
#include "sag/smoothed_energy_guidance.h"
#include "sag/token_perturbation_guidance.h"
#include "sag/torchscript_unet.h"

namespace {

using namespace sag;

struct Settings {
  std::map<std::string, std::string> values = {
      {"unet", ""},
      {"device", torch::cuda::is_available() ? "cuda" : "cpu"},
      {"dtype", ""},
      {"channels", "4"},
      {"height", "64"},
      {"width", "64"},
      {"tokens", "77"},
      {"context_width", "768"},
      {"y", "0"},
      {"steps", "20"},
      {"cudnn_benchmark", "0"},
      {"reference", ""},
      {"cfg", "7"}};

  const std::string& text(const std::string& key) const { return values.at(key); }
  std::int64_t number(const std::string& key) const { return std::stoll(text(key)); }
  torch::Device device() const { return torch::Device(text("device")); }
  std::optional<torch::ScalarType> dtype() const {
    static const std::map<std::string, torch::ScalarType> known = {
        {"fp32", torch::kFloat}, {"fp16", torch::kHalf}, {"bf16", torch::kBFloat16}};
    if (text("dtype").empty()) return std::nullopt;
    const auto found = known.find(text("dtype"));
    TORCH_CHECK_VALUE(found != known.end(), "--dtype must be fp32, fp16 or bf16, got '",
                      text("dtype"), "'");
    return found->second;
  }

  // Takes what is ours from the arguments and leaves the rest.
  void parse(int& argc, char** argv) {
    int kept = 1;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const auto equals = argument.find('=');
      const auto key = argument.starts_with("--") ? argument.substr(2, equals - 2) : "";
      if (equals != std::string::npos && values.contains(key))
        values[key] = argument.substr(equals + 1);
      else
        argv[kept++] = argv[i];
    }
    argc = kept;
  }
};

void synchronize(torch::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize();
}

// Runs `work`, which does `count` things, until the benchmark has seen enough of it.
void measure_run(benchmark::State& state, torch::Device device, std::int64_t count,
                 const std::function<void()>& work) {
  const torch::NoGradGuard no_grad;
  work();  // plans, captures, the allocator's cache
  synchronize(device);
  state.counters["MiB"] = bench::peak_mib(device, work);
  double host = 0, total = 0;
  for (auto _ : state) {
    synchronize(device);
    double launched = 0;
    const auto seconds = bench::seconds_of_host([&] {
      launched = bench::seconds_of_host(work);
      synchronize(device);
    });
    state.SetIterationTime(seconds / static_cast<double>(count));
    host += launched;
    total += static_cast<double>(count);
  }
  state.counters["host_ms"] = host / total * 1e3;
}

class Model {
 public:
  explicit Model(const Settings& settings) : settings_(settings) {}

  // A compiled UNet has the layout that it was compiled with.
  bool compiled() const { return AotiUNet::is_package(settings_.text("unet")); }

  // The file is loaded once per layout.
  std::shared_ptr<const UNet> unet(bool graph, bool channels_last) {
    auto& file = files_[channels_last];
    if (!file && compiled()) {
      file = AotiUNet::load(settings_.text("unet"), {.device = settings_.device()});
    } else if (!file) {
      TorchScriptUNetOptions options{.device = settings_.device(), .channels_last = channels_last};
      options.dtype = settings_.dtype();
      file = TorchScriptUNet::load(settings_.text("unet"), options);
    }
    if (!graph) return file;
    auto& captured = graphs_[channels_last];
    if (!captured) captured = std::make_shared<CudaGraphUNet>(file);
    return captured;
  }

  torch::Tensor latent(std::int64_t rows) const {
    return torch::randn(
        {rows, settings_.number("channels"), settings_.number("height"), settings_.number("width")},
        settings_.device());
  }
  Conditioning prompt() const {
    const auto device = settings_.device();
    Conditioning cond;
    if (settings_.number("context_width") > 0)
      cond.context =
          torch::randn({1, settings_.number("tokens"), settings_.number("context_width")}, device);
    if (settings_.number("y") > 0) cond.y = torch::randn({1, settings_.number("y")}, device);
    return cond;
  }
  const Settings& settings() const { return settings_; }

 private:
  const Settings& settings_;
  std::map<bool, std::shared_ptr<const UNet>> files_;
  std::map<bool, std::shared_ptr<const UNet>> graphs_;
};

void measure_unet(benchmark::State& state, Model& model, const UNet& unet, std::int64_t rows) {
  const auto cond = model.prompt();
  const auto given = [&](const torch::Tensor& t) {
    if (!t.defined()) return t;
    auto sizes = t.sizes().vec();
    sizes[0] = rows;
    return t.expand(sizes).to(unet.dtype()).contiguous();
  };
  const UNetInput input{.x = model.latent(rows).to(unet.dtype()),
                        .timesteps = torch::full({rows}, 500.0, model.settings().device()),
                        .context = given(cond.context),
                        .y = given(cond.y)};
  const auto calls = model.settings().number("steps");
  measure_run(state, unet.device(), calls, [&] {
    for (std::int64_t i = 0; i < calls; ++i) unet.forward(input);
  });
}

using Guide = std::function<ModelPatcher(const ModelPatcher&)>;

Guide sag_with(const SelfAttentionGuidanceOptions& options) {
  return [options](const ModelPatcher& model) {
    return apply_self_attention_guidance(model, options);
  };
}

// By the names of their steps.
std::vector<std::pair<const char*, Guide>> guidances() {
  return {
      {"cfg", [](const ModelPatcher& model) { return model; }},
      {"sag", sag_with({})},
      {"sag_one_pass", sag_with({.one_pass = true})},
      {"sag_interval_2", sag_with({.scale = 1.0, .interval = 2})},
      {"sag_one_pass_interval_2", sag_with({.scale = 1.0, .interval = 2, .one_pass = true})},
      {"pag", [](const ModelPatcher& model) { return apply_perturbed_attention_guidance(model); }},
      {"seg", [](const ModelPatcher& model) { return apply_smoothed_energy_guidance(model); }},
      {"seg_10",
       [](const ModelPatcher& model) {
         return apply_smoothed_energy_guidance(model, {.blur_sigma = 10});
       }},
      {"tpg", [](const ModelPatcher& model) { return apply_token_perturbation_guidance(model); }},
      {"slg",
       [](const ModelPatcher& model) { return apply_skip_layer_guidance(model, {.window = {}}); }},
      {"nag", [](const ModelPatcher& model) { return apply_normalized_attention_guidance(model); }},
      {"apg_rescale", [](const ModelPatcher& model) {
         return apply_rescale_cfg(apply_adaptive_projected_guidance(model));
       }}};
}

void measure_step(benchmark::State& state, Model& model, const std::shared_ptr<const UNet>& unet,
                  const Guide& guide) {
  const auto sampling = ModelSampling::discrete();
  const auto patched = guide({unet, sampling});
  const auto steps = model.settings().number("steps");
  auto sigmas = get_sigmas("karras", sampling, steps + 1);
  sigmas.pop_back();
  const auto positive = model.prompt(), negative = model.prompt();
  const auto x = model.latent(1) * sigmas.front();
  const double cfg = std::stod(model.settings().text("cfg"));
  double rows = 0;
  measure_run(state, unet->device(), steps, [&] {
    CfgGuider guider(patched, {positive}, {negative}, {.cond_scale = cfg});
    guider.begin_run(sigmas);
    sample_euler(std::ref(guider), x, sigmas);
    rows = static_cast<double>(guider.report().unet_rows());
  });
  state.counters["rows"] = rows / static_cast<double>(steps);
}

void add_benchmarks(Model& model) {
  const bool cuda = model.settings().device().is_cuda();
  struct Way {
    const char* name;
    bool graph, channels_last;
  };
  std::vector<Way> ways = {{"eager", false, false}};
  if (cuda) {
    ways.push_back({"graph", true, false});
    if (!model.compiled()) ways.push_back({"graph_channels_last", true, true});
  }
  const auto add = [](const std::string& name, auto function) {
    benchmark::RegisterBenchmark(name.c_str(), function)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond)
        ->Iterations(5);
  };
  for (const auto& way : ways) {
    for (const std::int64_t rows : {1, 2, 3})
      add("unet/" + std::string(way.name) + "/rows:" + std::to_string(rows),
          [&model, way, rows](benchmark::State& state) {
            measure_unet(state, model, *model.unet(way.graph, way.channels_last), rows);
          });
    for (const auto& [name, guide] : guidances())
      add("step/" + std::string(way.name) + "/" + name,
          [&model, way, guide = guide](benchmark::State& state) {
            measure_step(state, model, model.unet(way.graph, way.channels_last), guide);
          });
  }
}

// Throws where the UNet is not what the reference says.
void check(Model& model) {
  const auto& path = model.settings().text("reference");
  if (path.empty()) return;
  const torch::NoGradGuard no_grad;
  const bench::ReferenceFile file(path);
  for (const bool graph : {false, true}) {
    if (graph && !model.settings().device().is_cuda()) break;
    for (const bool channels_last : {false, true}) {
      if (channels_last && model.compiled()) break;
      const auto unet = model.unet(graph, channels_last);
      const auto off = bench::compare_with_reference(*unet, file);
      std::cout << "reference, " << (graph ? "graph" : "eager")
                << (channels_last ? ", channels last" : "") << ": token sums differ by up to "
                << off.token_sums << ", the map of the same q and k by " << off.map
                << ", the output by " << off.output << " of its largest value\n";
      TORCH_CHECK(off.map < 1e-3, "attention_map differs from its plain form");
      // Other kernels round other bits of q and k; bf16 has three fewer.
      const bool is_bf16 = unet->dtype() == torch::kBFloat16;
      TORCH_CHECK_VALUE(off.token_sums < (is_bf16 ? 8e-3 : 1e-3) && off.output < 5e-2,
                        "the UNet differs from ", path);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  settings.parse(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  if (settings.text("unet").empty()) {
    std::cerr << "step_benchmark: --unet=FILE is needed; tools/make_benchmark_unet.py makes one.\n";
    return 1;
  }
  try {
    at::globalContext().setBenchmarkCuDNN(settings.number("cudnn_benchmark") != 0);
    c10::OptionalDeviceGuard on;  // all that measures asks the current device
    if (settings.device().has_index()) on.reset_device(settings.device());
    Model model(settings);
    check(model);
    add_benchmarks(model);
    benchmark::RunSpecifiedBenchmarks();
  } catch (const c10::Error& error) {
    std::cerr << "step_benchmark: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "step_benchmark: " << error.what() << '\n';
    return 1;
  }
  benchmark::Shutdown();
}

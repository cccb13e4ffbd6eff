#include "options.h"

#include <array>
#include <charconv>
#include <string_view>

#include <fmt/format.h>
#include <torch/cuda.h>

#include "errors.h"
#include "guidance_rows.h"
#include "guidances.h"
#include "sag/samplers.h"
#include "sag/schedules.h"

namespace sag_sample {
namespace {

constexpr const char* kModel = "Model (one of --checkpoint, --model and --unet)";
constexpr const char* kPictures = "Pictures (T is FILE or FILE:KEY, of torch.save or safetensors)";
constexpr const char* kSampling = "Sampling";
constexpr const char* kDevice = "Device";

constexpr Range<std::int64_t> kSide = whole(1, 65536);

torch::Device parse_device(const std::string& name) {
  if (name == "cpu") return torch::kCPU;
  int index = 0;
  bool known = name == "cuda";
  if (name.starts_with("cuda:")) {
    const char* end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(name.data() + 5, end, index);
    known = error == std::errc() && stop == end && index >= 0;
  }
  if (!known) throw UsageError(fmt::format("--device must be cpu, cuda or cuda:N, got {}.", name));
  const auto devices = torch::cuda::device_count();
  if (devices == 0) {
    throw UsageError(
        fmt::format("--device {}: there is no CUDA device that this LibTorch can use; without "
                    "--device, or with "
                    "--device cpu, the CPU computes.",
                    name));
  }
  if (index >= devices) {
    throw UsageError(
        fmt::format("--device {}: the last CUDA device is cuda:{}.", name, devices - 1));
  }
  return {torch::kCUDA, static_cast<torch::DeviceIndex>(index)};
}

Row<UNetFileOptions> device() {
  return {{"--device", "", "cpu|cuda[:N]", "Where to compute"},
          [](UNetFileOptions& o, const Given& given) { o.device = parse_device(read_text(given)); },
          [](const UNetFileOptions&) { return Value(); }};
}

Row<UNetFileOptions> dtype() {
  static constexpr std::array<std::string_view, 3> kNames = {"fp32", "fp16", "bf16"};
  return choice<UNetFileOptions>(
      "--dtype", "", kNames, "Precision of the UNet",
      [](UNetFileOptions& o, const std::string& name) {
        o.dtype = name == "fp16" ? torch::kHalf : name == "bf16" ? torch::kBFloat16 : torch::kFloat;
      },
      [](const UNetFileOptions&) { return Value(); });
}

Row<UNetFileOptions> channels_last() {
  static constexpr std::array<std::string_view, 3> kNames = {"auto", "on", "off"};
  return choice<UNetFileOptions>(
      "--channels-last", "", kNames, "Layout of the UNet's convolutions",
      [](UNetFileOptions& o, const std::string& name) {
        o.channels_last = name == "auto" ? std::nullopt : std::optional(name == "on");
      },
      [](const UNetFileOptions&) { return Value("auto"); });
}

Row<PictureOptions> prompt_weights() {
  static constexpr std::array<std::string_view, 2> kNames = {"on", "off"};
  return choice<PictureOptions>(
      "--prompt-weights", "prompt_weights", kNames,
      "on: (red:1.3) in a prompt gives red the weight 1.3, (red) 1.1, and \\( is a parenthesis, as "
      "in ComfyUI; off: parentheses are text",
      [](PictureOptions& o, const std::string& name) { o.prompt_weights = name == "on"; },
      [](const PictureOptions& o) { return Value(o.prompt_weights ? "on" : "off"); });
}

}  // namespace

const OptionTable<SourceOptions>& source_options() {
  using S = SourceOptions;
  static const OptionTable<S> table(
      kModel,
      {text("--checkpoint", "checkpoint", &S::checkpoint, "FILE",
            "Checkpoint of Stable Diffusion 1, 2 or XL as it is downloaded, one .safetensors file"),
       text("--model", "model", &S::model, "DIR",
            "Directory with model.json and the files that it names"),
       text("--unet", "", &S::unet, "FILE",
            "TorchScript UNet, compiled package (*.pt2) or folder of packages, to be used with "
            "tensors"),
       flag("--list-sites", "", &S::list_sites,
            "Print the UNet's attentions and transformer blocks that guidances can look into, and "
            "exit; with sizes where the text encoder or --cond tells how to run it"),
       flag("--describe", "", &S::describe, "Print what --checkpoint is, and exit")});
  return table;
}

const OptionTable<CheckpointFiles>& checkpoint_options() {
  using C = CheckpointFiles;
  static const OptionTable<C> table(
      "Beside --checkpoint",
      {several(
           "--lora", "lora", &C::loras, "FILE[:X]",
           "LoRA to merge into it, X times as strong, a .safetensors file; may be given several "
           "times"),
       several("--embedding", "embedding", &C::embeddings, "NAME=FILE",
               "Textual inversion, a .safetensors file that NAME in prompts stands for; may be "
               "given several times"),
       text("--vae", "vae", &C::vae, "FILE", "VAE to use in place of the checkpoint's own"),
       text("--skeleton", "skeleton", &C::skeleton, "DIR",
            "Networks of the checkpoint's family, for families that sag does not bring"),
       text("--compiled", "compiled", &C::compiled, "DIR",
            "Run the UNet on packages that sag-export --skeleton compiled for its family")});
  return table;
}

const OptionTable<NetworkOptions>& network_options() {
  using N = NetworkOptions;
  static const OptionTable<N> table(
      kModel,
      {choice("--prediction", "prediction", &N::prediction, sag::prediction_names(),
              "What the UNet predicts. eps, v and x0 use Stable Diffusion's noise table")
           .from_model(),
       text("--site", "site", &N::site, "SITE",
            "Self-attention to watch: middle, which is found, middle.0.0, a dotted path, or "
            "#ordinal")
           .from_model(),
       number("", "latent_scale", &N::latent_scale, kPositive, "X",
              "Latents are multiplied by it on entry and divided by it in the end")
           .from_model(),
       number("--unet-rows", "unet_rows", &N::unet_rows, whole(0, 65536), "N",
              "The UNet's file works with N rows only: calls are split and filled up to N; 0: find "
              "it out where the file tells what it was traced with")
           .from_model()});
  return table;
}

const OptionTable<sag::EdmSamplingOptions>& edm_options() {
  using E = sag::EdmSamplingOptions;
  static const OptionTable<E> table(
      kModel,
      {number("", "sigma_data", &E::sigma_data, kPositive, "X", "Spread of the data").from_model(),
       number("--sigma-min", "sigma_min", &E::sigma_min, kPositive, "X",
              "edm: lowest noise level of schedules")
           .from_model(),
       number("--sigma-max", "sigma_max", &E::sigma_max, kPositive, "X",
              "edm: highest noise level of schedules")
           .from_model()});
  return table;
}

const OptionTable<sag::FlowSamplingOptions>& flow_options() {
  using F = sag::FlowSamplingOptions;
  static const OptionTable<F> table(kModel, {number("--shift", "shift", &F::shift, kPositive, "X",
                                                    "flow: shift of the noise levels")
                                                 .from_model(),
                                             number("", "timestep_multiplier", &F::multiplier,
                                                    kPositive, "X", "Timestep of noise level 1")
                                                 .from_model()});
  return table;
}

const OptionTable<sag::DiscreteSamplingOptions>& discrete_options() {
  using D = sag::DiscreteSamplingOptions;
  static const OptionTable<D> table(
      kModel,
      {number("", "beta_start", &D::beta_start, kPositive, "X", "First beta").from_model(),
       number("", "beta_end", &D::beta_end, kPositive, "X", "Last beta").from_model(),
       choice<D>(
           "", "beta_schedule", sag::beta_schedule_names(), "How the betas rise",
           [](D& d, const std::string& name) { d.beta_schedule = sag::parse_beta_schedule(name); },
           [](const D& d) { return Value(std::string(sag::to_string(d.beta_schedule))); })
           .from_model(),
       number("", "timesteps", &D::timesteps, whole(1, 1000000), "N", "Entries of the noise table")
           .from_model(),
       flag("", "zero_terminal_snr", &D::zero_terminal_snr,
            "Rescale the noise table so that it ends in pure noise")
           .from_model()});
  return table;
}

const OptionTable<LatentSize>& latent_size_options() {
  using L = LatentSize;
  static const OptionTable<L> table(
      kPictures,
      {number("--channels", "", &L::channels, kSide, "N", "Channels of the latent").from_model(),
       number("--height", "", &L::height, kSide, "N",
              "Height of the latent, in its cells (Stable Diffusion: pixels / 8)")
           .from_model(),
       number("--width", "", &L::width, kSide, "N", "Width, likewise").from_model()});
  return table;
}

const OptionTable<PictureOptions>& picture_options() {
  using P = PictureOptions;
  static const OptionTable<P> table(
      kPictures,
      {texts("--prompt", &P::prompts, "TEXT",
             "Draw this; may be given several times. An empty text draws an unconditional picture"),
       any_text("--negative", "negative", &P::negative, "TEXT",
                "What the prompts are guided away from")
           .by_default("an empty text"),
       prompt_weights(),
       number("--clip-skip", "clip_skip", &P::clip_skip, whole(1, 1024), "N",
              "Take the context from the text encoder's N-th layer from the end: 1 is the last, as "
              "in A1111 (in ComfyUI -1); diffusers' clip_skip is N - 1, for SD 2 and SDXL N - 2")
           .from_model()
           .by_default("1; SD 2 and SDXL: 2"),
       number("--unconditional", "", &P::unconditional, whole(0, 4096), "N",
              "Draw N pictures of no prompt, with the seeds from --seed on"),
       number("--batch", "", &P::batch, whole(1, 4096), "N",
              "Pictures per prompt, each with the next seed; all depend on their own seed only")
           .by_default("1"),
       number("--seed", "", &P::seed, kSeed, "N",
              "Seed of the first picture; the same noise on every device"),
       text("--cond", "", &P::cond, "T", "Conditional context, [1 or images, tokens, width]"),
       text("--uncond", "", &P::uncond, "T", "Unconditional context"),
       text("--cond-y", "", &P::cond_y, "T", "Conditional vector (SDXL), [1 or images, features]"),
       text("--uncond-y", "", &P::uncond_y, "T", "Unconditional vector"),
       text("--noise", "", &P::noise, "T",
            "Start noise, unit Gaussian, [images, channels, height, width]")
           .by_default("from --seed"),
       text("--latent", "", &P::latent, "T", "Start image, a clean latent"),
       text("--image", "", &P::image, "FILE.png", "Start image, for models with an encoder"),
       text("--mask", "", &P::mask, "FILE.png|T",
            "Where to repaint --latent or --image: white in a picture of --image's size, or 1 in a "
            "tensor with a number per latent cell"),
       text("--inpaint-noise", "", &P::inpaint_noise, "T", "Noise for what is kept")
           .by_default("the start noise; ddim: of the next seed"),
       text("--sigmas", "", &P::sigmas, "T",
            "Noise levels, used as they are, the last 0 included, in place of a schedule")});
  return table;
}

const OptionTable<sag::SampleOptions>& sampling_options() {
  using S = sag::SampleOptions;
  constexpr Range<double> kDenoise = {0.0, 1.0, "a number greater than 0 and at most 1", true};
  static const OptionTable<S> table(
      kSampling,
      {listed_choice("--sampler", "sampler", &S::sampler, sag::sampler_names(),
                     "Sampler; --sampler help lists them")
           .from_model(),
       listed_choice("--schedule", "schedule", &S::schedule, sag::schedule_names(),
                     "Schedule of the noise levels; --schedule help lists them")
           .from_model(),
       number("--steps", "steps", &S::steps, whole(1, 10000), "N", "Steps").from_model(),
       number("--denoise", "denoise", &S::denoise, kDenoise, "X",
              "How much of --latent or --image to noise over, 1: all; --steps run from there"),
       number("--eta", "eta", &S::eta, kShare, "X",
              "Share of fresh noise in ancestral and SDE samplers, 0 ... 1"),
       number("--s-noise", "s_noise", &S::s_noise, kNotNegative, "X", "Factor on fresh noise")});
  return table;
}

const OptionTable<sag::CfgGuiderOptions>& guider_options() {
  using G = sag::CfgGuiderOptions;
  using W = sag::GuidanceWindow;
  static const OptionTable<G> table(
      kSampling,
      {number("--cfg", "cfg", &G::cond_scale, kFinite, "X", "Scale of classifier-free guidance")
           .from_model()
           .and_by_default("; 1 without an unconditional prediction"),
       bound("--cfg-start", "cfg_start", &G::cfg_window, &W::sigma_start, kSigma, "SIGMA",
             "With this scale from this noise level on, before with 1, which takes one row")
           .from_model(),
       bound("--cfg-end", "cfg_end", &G::cfg_window, &W::sigma_end, kSigma, "SIGMA",
             "With this scale down to this noise level, then with 1")
           .from_model(),
       bound("--cfg-start-percent", "cfg_start_percent", &G::cfg_window, &W::start_percent, kShare,
             "X", "The same as a share of the model's timesteps, 0 ... 1"),
       bound("--cfg-end-percent", "cfg_end_percent", &G::cfg_window, &W::end_percent, kShare, "X",
             "The same as a share of the model's timesteps, 0 ... 1"),
       number("--max-rows", "max_rows", &G::max_rows, whole(0, 65536), "N",
              "At most N rows (a picture takes two with cfg) go through the UNet at a time; 0: no "
              "limit")},
      {.cond_scale = 7.5, .max_rows = 16});
  return table;
}

const OptionTable<FurtherOptions>& further_options() {
  using F = FurtherOptions;
  constexpr Range<std::int64_t> kLabel = whole(0, 1000000);
  static const OptionTable<F> table(
      "Further inputs (of the networks that take them)",
      {number("--class", "class", &F::label, kLabel, "N", "Class to draw"),
       number("--uncond-class", "uncond_class", &F::uncond_label, kLabel, "N",
              "Class of the unconditional prediction, often one more than the last")
           .by_default("none, or with a prompt the same class"),
       text("--concat", "concat", &F::concat, "T",
            "Channels after those of the latent, [1 or images, channels, height, width]")
           .by_default("made of --image and --mask, for inpainting and editing"),
       number("--image-cfg", "image_cfg", &F::image_cfg, kFinite, "X",
              "Editing: scale of guidance towards --image, beside --cfg towards the prompt; 1: "
              "both predictions of --cfg see it")
           .from_model(),
       number("--embedded-guidance", "embedded_guidance", &F::embedded_guidance, kFinite, "X",
              "Scale of the guidance that was distilled into the network (LCM)")
           .from_model()
           .by_default(fmt::format("{:g}", kEmbeddedGuidance))});
  return table;
}

const OptionTable<UNetFileOptions>& unet_options() {
  static const OptionTable<UNetFileOptions> table(
      kDevice, {device().by_default("cuda if there is one; a compiled UNet's own"),
                dtype().by_default("fp32 on the CPU, the file's on CUDA; a compiled UNet's own"),
                channels_last()});
  return table;
}

const OptionTable<DeviceOptions>& device_options() {
  using D = DeviceOptions;
  static const OptionTable<D> table(
      kDevice, {number("--threads", "", &D::threads, whole(1, 4096), "N", "CPU threads")
                    .by_default("LibTorch's"),
                flag("--no-cuda-graph", "", &D::no_cuda_graph,
                     "Launch every kernel of the UNet instead of replaying CUDA graphs"),
                flag("--tf32", "", &D::tf32, "Let CUDA round fp32 to TF32: faster, less exact")});
  return table;
}

const OptionTable<OutputOptions>& output_options() {
  using O = OutputOptions;
  static const OptionTable<O> table(
      "Output (at least one file)",
      {text("--out", "", &O::out, "FILE.png", "The picture, or a sheet of the pictures"),
       flag("--compare", "compare", &O::compare,
            "Sample without guidance too and show unguided | guided | attention mask"),
       number("--columns", "", &O::columns, whole(1, 64), "N", "Columns of the sheet")
           .by_default("as it looks right"),
       number("--zoom", "", &O::zoom, whole(1, 64), "N",
              "Factor by which small pictures are enlarged")
           .by_default("to 128 pixels or more; 1 for a single picture"),
       text("--save-latent", "", &O::save_latent, "FILE",
            "The final latents, one fp32 tensor for torch.load"),
       text("--json", "", &O::json, "FILE", "Report of the run"),
       flag("--quiet", "", &O::quiet, "Print nothing but errors")});
  return table;
}

const OptionGroup& noise_level_options(const std::string& prediction) {
  if (prediction == "edm") return edm_options();
  if (prediction == "flow") return flow_options();
  return discrete_options();
}

std::span<const OptionGroup* const> all_options() {
  static const std::vector<const OptionGroup*> all = [] {
    std::vector<const OptionGroup*> groups = {
        &source_options(),   &checkpoint_options(), &network_options(), &edm_options(),
        &flow_options(),     &discrete_options(),   &picture_options(), &latent_size_options(),
        &sampling_options(), &guider_options(),     &further_options()};
    groups.push_back(&guidance_options());
    for (const auto& kind : guidance_kinds()) {
      if (kind.off) groups.push_back(kind.options);
    }
    groups.insert(groups.end(), {&unet_options(), &device_options(), &output_options()});
    return groups;
  }();
  return all;
}

}  // namespace sag_sample

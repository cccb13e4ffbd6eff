#include "sag/checkpoint.h"

#include <filesystem>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/module.h>

#include "checkpoint/embedding.h"
#include "checkpoint/family.h"
#include "checkpoint/lora.h"
#include "checkpoint/names.h"
#include "checkpoint/skeletons.h"
#include "sag/safetensors.h"
#include "unet/archive.h"
#include "unet/module_conversion.h"

namespace sag {
namespace {

namespace fs = std::filesystem;

constexpr const char* kVae = "first_stage_model.";

// What diffusers calls a parameter of a VAE's skeleton, and what it called it before 2023.
std::vector<StoredTensor> diffusers_names(const std::string& parameter) {
  constexpr std::pair<std::string_view, const char*> kOld[] = {{".to_q.", ".query."},
                                                               {".to_k.", ".key."},
                                                               {".to_v.", ".value."},
                                                               {".to_out.0.", ".proj_attn."}};
  const auto name = parameter.substr(parameter.find('.') + 1);
  std::vector<StoredTensor> tensors = {{.key = name}};
  for (const auto& [now, old] : kOld)
    if (const auto at = name.find(now); at != std::string::npos)
      tensors.push_back({.key = std::string(name).replace(at, now.size(), old)});
  return tensors;
}

// The names of a VAE in a file of its own: LDM's, with the prefix or without it, or diffusers'.
SkeletonNames alone(SkeletonNames names, const Safetensors& file) {
  const bool is_diffusers = file.tensors().contains("decoder.mid_block.resnets.0.conv1.weight");
  for (auto& [name, parameter] : names.parameters)
    if (is_diffusers) parameter.tensors = diffusers_names(name);
  names.spellings.emplace_back(kVae, "");
  for (std::size_t i = names.unneeded.size(); i-- > 0;)
    if (names.unneeded[i].starts_with(kVae))
      names.unneeded.push_back(names.unneeded[i].substr(std::string(kVae).size()));
  return names;
}

// The dtype to run in where nobody says: that of the file, if networks can be computed in it.
torch::ScalarType usual_dtype(torch::ScalarType stored) {
  if (stored == torch::kDouble) return torch::kFloat;
  return c10::elementSize(stored) == 1 ? torch::kHalf : stored;
}

// What LoRAs call a parameter; nothing: they do not change it.
std::optional<LoraTarget> target_of(const std::string& name, const StoredParameter& stored) {
  constexpr std::string_view kWeight = ".weight";
  // The parts of a model, by what the parameters' names begin with in its skeleton.
  constexpr std::pair<std::string_view, const char*> kParts[] = {
      {"unet.", "unet"},
      {"clip.states.model.", "text_encoder"},
      {"clip_2.states.model.", "text_encoder_2"}};
  const auto& usual = stored.tensors.front();
  if (stored.shape.size() < 2 || !name.ends_with(kWeight)) return std::nullopt;
  const auto without = [&](const std::string& text) {
    return text.ends_with(kWeight) ? text.substr(0, text.size() - kWeight.size()) : text;
  };
  for (const auto& [prefix, part] : kParts)
    if (name.starts_with(prefix))
      return LoraTarget{.part = part,
                        .path = without(name.substr(prefix.size())),
                        .key = usual.rows ? "" : without(usual.key)};
  return std::nullopt;
}

std::string folder_name(const std::string& folder) {
  std::error_code error;
  return (fs::canonical(folder, error) / "").parent_path().filename().string();
}

// Files of LDM hold their noise table, which nobody reads: it is always the same.
bool has_another_noise_table(const Safetensors& file, bool zero_terminal_snr) {
  constexpr const char* kTable = "alphas_cumprod";
  const auto found = file.tensors().find(kTable);
  if (found == file.tensors().end()) return false;
  const auto own =
      ModelSampling::discrete(Prediction::eps, {.zero_terminal_snr = zero_terminal_snr});
  const auto sigmas = at::tensor(own.sigmas(), torch::kDouble);
  if (sigmas.sizes() != found->second.sizes || !c10::isFloatingType(found->second.dtype))
    return true;
  const auto table = file.tensor(kTable).to(torch::kDouble);
  // As far as half precision tells.
  constexpr double kTolerance = 2e-3;
  // Not so for NaN.
  const bool is_same = (table - 1 / (1 + sigmas * sigmas)).abs().max().item<double>() <= kTolerance;
  return !is_same;
}

void check_prediction(const std::optional<Prediction>& prediction) {
  TORCH_CHECK_VALUE(
      !prediction || (*prediction != Prediction::edm && *prediction != Prediction::flow),
      "[Checkpoint::open] prediction must be eps, v or x0, got ",
      prediction ? to_string(*prediction) : "", ".");
}

}  // namespace

struct Checkpoint::State {
  State(std::string from, CheckpointOptions chosen);

  std::string part(const char* name) const { return (fs::path(skeleton) / name).string(); }
  StoredNetwork stored(const char* name, const Safetensors& in, const NamedFile& from) const;
  void find_networks(const std::optional<Safetensors>& vae);
  void use_vae(const Safetensors& vae);
  void describe(const CheckpointKind& kind);
  void read_loras();
  std::map<std::string, std::int64_t> text_widths() const;
  void read_embeddings();
  torch::Tensor value(const StoredNetwork& network, const std::string& parameter) const;
  WeightSource values_of(const StoredNetwork& network) const;
  torch::jit::Module filled(const char* name, const StoredNetwork& network,
                            torch::Device device) const;
  void check_has(bool has, const char* what) const;

  std::string path;
  CheckpointOptions options;
  Safetensors file;
  std::string skeleton;
  CheckpointInfo info = {};
  std::optional<StoredNetwork> unet = {}, text = {}, decoder = {}, encoder = {};
  std::vector<Lora> loras = {};
  std::vector<TextEmbedding> embeddings = {};
};

Checkpoint::State::State(std::string from, CheckpointOptions chosen)
    : path(std::move(from)), options(std::move(chosen)), file(Safetensors::open(path)) {
  check_prediction(options.prediction);
  const auto vae =
      options.vae.empty() ? std::nullopt : std::optional(Safetensors::open(options.vae));
  const bool own = !options.skeleton.empty();
  const auto kind = own ? read_kind(file, skeleton_prediction(options.skeleton), path)
                        : recognise_checkpoint(file, path);
  skeleton = own ? options.skeleton : find_skeleton(kind.family, options.skeletons);
  info.family = own ? folder_name(skeleton) : kind.family;
  find_networks(vae);
  read_loras();
  read_embeddings();
  describe(kind);
}

void Checkpoint::State::find_networks(const std::optional<Safetensors>& vae) {
  const NamedFile from = {path};
  unet = stored("unet.ts", file, from);
  if (!unet->is_there())
    refuse_checkpoint(from, "which has none of the tensors of the skeleton's UNet");
  text = stored("text_encoder.ts", file, from);
  if (vae) {
    use_vae(*vae);
    // Whatever the file's own is like.
    info.skipped = check_all_used(file, {&*unet, &*text}, from, {std::string(kVae) + "*"});
  } else {
    decoder = stored("decoder.ts", file, from);
    encoder = stored("encoder.ts", file, from);
    info.skipped = check_all_used(file, {&*unet, &*text, &*decoder, &*encoder}, from);
  }
}

// Of the token embeddings, by the text encoder's part of a model.
std::map<std::string, std::int64_t> Checkpoint::State::text_widths() const {
  std::map<std::string, std::int64_t> widths;
  for (const auto& [name, stored] : text->names().parameters)
    if (const auto target = target_of(name, stored);
        target && target->path.ends_with("token_embedding") && text->is_there())
      widths[target->part] = stored.shape[1];
  return widths;
}

void Checkpoint::State::read_embeddings() {
  const auto widths = text_widths();
  for (const auto& [name, from_file] : options.embeddings) {
    check_has(text->is_there(), "a text encoder for textual inversions");
    for (const auto& known : embeddings)
      TORCH_CHECK_VALUE(known.name != name,
                        "[Checkpoint::open] embeddings must have names of "
                        "their own, got \"",
                        name, "\" twice.");
    embeddings.push_back(read_embedding(name, from_file));
    for (const auto& [part, vectors] : embeddings.back().vectors) {
      const auto width = widths.find(part);
      TORCH_CHECK_VALUE(width != widths.end() && width->second == vectors.size(1),
                        "[Checkpoint::open] embeddings must fit the text encoder, but \"",
                        from_file, "\" has vectors of ", vectors.size(1), " for ",
                        width == widths.end() ? c10::str("a ", part, ", which there is not")
                                              : c10::str("one of ", width->second),
                        ".");
    }
  }
}

void Checkpoint::State::read_loras() {
  std::vector<LoraTarget> targets;
  for (const auto* network : {&*unet, &*text})
    for (const auto& [name, stored] : network->names().parameters)
      if (const auto target = target_of(name, stored); target && network->is_there())
        targets.push_back(*target);
  for (const auto& [from_file, strength] : options.loras) {
    loras.push_back(Lora::open(from_file, strength));
    loras.back().check_targets(targets);
  }
}

torch::Tensor Checkpoint::State::value(const StoredNetwork& network,
                                       const std::string& parameter) const {
  auto value = network.value(parameter);
  if (loras.empty()) return value;
  if (const auto target = target_of(parameter, network.names().parameters.at(parameter)))
    for (const auto& lora : loras) value = lora.merged(*target, value);
  return value;
}

// An archive that the skeleton does not have is one that no tensor belongs to.
StoredNetwork Checkpoint::State::stored(const char* name, const Safetensors& in,
                                        const NamedFile& from) const {
  const auto archive = part(name);
  std::error_code error;
  return {fs::exists(archive, error) ? read_skeleton_names(archive) : SkeletonNames(), in, from};
}

void Checkpoint::State::use_vae(const Safetensors& vae) {
  const NamedFile from = {options.vae, "vae", "a VAE of " + info.family};
  const auto other = [&](const char* name) {
    return StoredNetwork(alone(read_skeleton_names(part(name)), vae), vae, from);
  };
  decoder = other("decoder.ts");
  encoder = other("encoder.ts");
  if (!decoder->is_there()) refuse_checkpoint(from, "which has no tensor of its decoder");
  static_cast<void>(check_all_used(vae, {&*decoder, &*encoder}, from));
}

void Checkpoint::State::describe(const CheckpointKind& kind) {
  info.recognised = !kind.family.empty();
  info.prediction = options.prediction.value_or(kind.prediction);
  info.prediction_reason = options.prediction ? "chosen by the caller" : kind.reason;
  info.zero_terminal_snr = kind.zero_terminal_snr;
  info.in_channels = kind.in_channels;
  info.notes = kind.notes;
  info.dtype = unet->dtype();
  info.unet_parameters = unet->elements();
  info.text_parameters = text->elements();
  info.vae_parameters = decoder->elements() + encoder->elements();
  info.has_text_encoder = text->is_there();
  info.has_decoder = decoder->is_there();
  info.has_encoder = encoder->is_there();
  if (has_another_noise_table(file, info.zero_terminal_snr))
    info.notes.emplace_back(
        "its noise table, alphas_cumprod, is another one than Stable Diffusion's, which is used");
}

// Gives the values one after the other. Whoever asks for the next one has copied the last one, or
// reads it from the file again: never is the whole file in memory beside its copy.
WeightSource Checkpoint::State::values_of(const StoredNetwork& network) const {
  return [this, &network, last = std::string()](const std::string& parameter) mutable {
    if (!last.empty()) network.forget(last);
    last = parameter;
    return value(network, parameter);
  };
}

// In fp32: some VAEs give NaN in half precision, and text encoders run on the CPU.
torch::jit::Module Checkpoint::State::filled(const char* name, const StoredNetwork& network,
                                             torch::Device device) const {
  auto module = read_archive(part(name), "Checkpoint::open");
  fill_parameters(module, values_of(network), device, torch::kFloat, "Checkpoint::load");
  return module;
}

void Checkpoint::State::check_has(bool has, const char* what) const {
  TORCH_CHECK_VALUE(has, "[Checkpoint::load] the checkpoint must have ", what, ", got \"", path,
                    "\", which has none.");
}

Checkpoint::Checkpoint(std::shared_ptr<const State> state) : state_(std::move(state)) {}

Checkpoint Checkpoint::open(const std::string& path, const CheckpointOptions& options) {
  return Checkpoint(std::make_shared<const State>(path, options));
}

const CheckpointInfo& Checkpoint::info() const {
  return state_->info;
}

const std::string& Checkpoint::skeleton() const {
  return state_->skeleton;
}

ModelSampling Checkpoint::model_sampling() const {
  const auto& info = state_->info;
  return ModelSampling::discrete(info.prediction, {.zero_terminal_snr = info.zero_terminal_snr});
}

std::shared_ptr<TorchScriptUNet> Checkpoint::load_unet(
    const TorchScriptUNetOptions& options) const {
  TORCH_CHECK_VALUE(!options.weights,
                    "[Checkpoint::load_unet] weights must be empty: they are the checkpoint's.");
  auto filled = options;
  filled.weights = state_->values_of(*state_->unet);
  if (!options.dtype && !options.device.is_cpu()) filled.dtype = usual_dtype(state_->info.dtype);
  return TorchScriptUNet::load(state_->part("unet.ts"), filled);
}

std::shared_ptr<AotiUNet> Checkpoint::load_compiled_unet(
    const std::string& path, std::optional<torch::Device> device) const {
  const auto skeleton = AotiUNet::skeleton(path);
  TORCH_CHECK_VALUE(skeleton == state_->info.family,
                    "[Checkpoint::load_compiled_unet] path must name packages that were compiled "
                    "from the skeleton of ",
                    state_->info.family, ", got \"", path, "\", which are of ",
                    skeleton.empty() ? "one model with its own weights" : skeleton, ".");
  AotiUNetOptions options = {.device = device};
  const auto values = std::make_shared<WeightSource>(state_->values_of(*state_->unet));
  for (const auto& parameter : state_->unet->names().parameters)
    options.weights[parameter.first] = [values, name = parameter.first] { return (*values)(name); };
  return AotiUNet::load(path, options);
}

TextEncoder Checkpoint::load_text_encoder() const {
  state_->check_has(state_->info.has_text_encoder, "a text encoder");
  auto module = state_->filled("text_encoder.ts", *state_->text, torch::kCPU);
  for (const auto& embedding : state_->embeddings) add_embedding(module, embedding);
  return TextEncoder::from_module(module, "the text encoder of \"" + state_->path + "\"");
}

PictureNetwork Checkpoint::load_decoder(torch::Device device) const {
  state_->check_has(state_->info.has_decoder, "a VAE");
  return PictureNetwork::from_module(state_->filled("decoder.ts", *state_->decoder, device),
                                     "the decoder of \"" + state_->path + "\"", device);
}

PictureNetwork Checkpoint::load_encoder(torch::Device device) const {
  state_->check_has(state_->info.has_encoder, "a VAE with an encoder");
  return PictureNetwork::from_module(state_->filled("encoder.ts", *state_->encoder, device),
                                     "the encoder of \"" + state_->path + "\"", device);
}

LoadedCheckpoint load_checkpoint(const std::string& path, const CheckpointOptions& options,
                                 const TorchScriptUNetOptions& unet) {
  const auto checkpoint = Checkpoint::open(path, options);
  const auto& info = checkpoint.info();
  LoadedCheckpoint loaded = {.unet = checkpoint.load_unet(unet),
                             .model_sampling = checkpoint.model_sampling(),
                             .info = info};
  if (info.has_text_encoder) loaded.text_encoder = checkpoint.load_text_encoder();
  if (info.has_decoder) loaded.decoder = checkpoint.load_decoder(unet.device);
  if (info.has_encoder) loaded.encoder = checkpoint.load_encoder(unet.device);
  return loaded;
}

}  // namespace sag

#include "file_problem.h"

#include <filesystem>
#include <fstream>

#include "plain_message.h"

namespace sag {
namespace {

// A safetensors file begins with the size of its header, which is JSON: the names of the tensors.
bool is_safetensors(const std::string& head) {
  return head.size() > 8 && head[8] == '{' && head.compare(4, 4, std::string(4, '\0')) == 0;
}

std::string safetensors_problem(const std::string& head) {
  const auto mentions = [&head](const char* text) { return head.find(text) != std::string::npos; };
  if (mentions(".lora_") || mentions("lora_unet_") || mentions("lora_down.weight"))
    return "which is a LoRA, a change to a model: sag-sample merges it into a checkpoint "
           "(--checkpoint FILE --lora FILE); for sag-export, fuse it into its model in diffusers "
           "(load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained).";
  if (mentions("\"latent_tensor\"")) return "which is a latent that ComfyUI saved, not a UNet.";
  return std::string("which is a safetensors file, ") + kWeightsAlone;
}

// What a file is that is no zip archive.
std::string format_problem(const std::string& head, const std::string& path) {
  if (is_safetensors(head)) return safetensors_problem(head);
  if (head.starts_with("GGUF")) return std::string("which is a GGUF file, ") + kWeightsAlone;
  if (path.ends_with(".onnx"))
    return "which is an ONNX model, which cannot be read here: sag-export makes a UNet's file of a "
           "diffusers folder or a torch.nn.Module.";
  if (path.ends_with(".ckpt") || head.starts_with("\x80\x02"))
    return std::string("which is a checkpoint of an old torch.save, ") + kWeightsAlone;
  return "which is not a zip archive.";
}

}  // namespace

const char* const kWeightsAlone =
    "weights without their network: Checkpoint (sag-sample --checkpoint FILE) reads a checkpoint "
    "of "
    "Stable Diffusion in one .safetensors file, and sag-export makes a UNet's file of a diffusers "
    "folder.";

std::string folder_problem(const std::string& path) {
  namespace fs = std::filesystem;
  const auto has = [folder = fs::path(path)](const char* name) {
    std::error_code error;
    return fs::exists(folder / name, error);
  };
  if (has("model_index.json") || has("config.json"))
    return "a diffusers folder: sag-export makes a UNet's file of it";
  if (has("adapter_config.json") || has("pytorch_lora_weights.safetensors"))
    return "the folder of a LoRA: fuse it into its model in diffusers, and give that folder to "
           "sag-export";
  if (has("model.json")) return "a model directory: name its UNet's file, or use it as one";
  return "";
}

std::string zip_problem(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return "which does not exist.";
  if (std::filesystem::is_directory(status)) {
    const auto kind = folder_problem(path);
    return "which is " + (kind.empty() ? "a directory" : kind) + ".";
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return "which cannot be opened.";
  // Enough for the names in a LoRA's header.
  std::string head(65536, '\0');
  file.read(head.data(), static_cast<std::streamsize>(head.size()));
  head.resize(static_cast<std::size_t>(file.gcount()));
  if (head.empty()) return "which is empty.";
  // LibTorch could read one, but trusts its offsets: a damaged file can end the process.
  if (head.size() >= 8 && head.compare(4, 4, "PTMF") == 0)
    return "which is a flatbuffer (.ff): save the module with torch.jit.save instead.";
  if (!head.starts_with("PK\x03\x04")) return format_problem(head, path);
  return "";
}

std::string read_problem(const std::exception& error) {
  const auto message = plain_message(error);
  return message.find("central directory") != std::string::npos
             ? "which is truncated or damaged."
             : "which cannot be read as one: " + message;
}

}  // namespace sag

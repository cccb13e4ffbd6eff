#include "archive.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <map>

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/version.h>

namespace sag {
namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  C10_THROW_ERROR(ValueError,
                  c10::str("[TorchScriptUNet::load] path must name a TorchScript archive, got '",
                           path, "', ", what));
}

void check_holds_code(const std::string& path) {
  std::string problem;
  try {
    caffe2::serialize::PyTorchStreamReader reader(path);
    if (reader.hasRecord("constants.pkl")) return;
    problem = reader.hasRecord("data.pkl")
                  ? "which holds tensors but no code (a file of torch.save)"
                  : "which holds no TorchScript code";
  } catch (const std::exception& error) {
    const auto message = plain_message(error);
    problem = message.find("central directory") != std::string::npos
                  ? "which is truncated or damaged"
                  : "which cannot be read as one: " + message;
  }
  refuse(path, problem);
}

// The op that a loader's message says nobody registered, or an empty text.
std::string unknown_op(const std::string& message) {
  const std::string before = "Unknown builtin op: ";
  const auto found = message.find(before);
  if (found == std::string::npos) return {};
  const auto begin = found + before.size();
  auto op = message.substr(begin, message.find_first_of(" \n", begin) - begin);
  while (op.ends_with('.')) op.pop_back();
  return op;
}

[[noreturn]] void refuse_op(const std::string& path, const std::string& op) {
  const auto is_in = [&op](const char* part) { return op.find(part) != std::string::npos; };
  const char* way_out = "load the library that registers it first, or export the model without it";
  if (op.starts_with("aten::") || op.starts_with("prim::"))
    way_out = "save the model with PyTorch " TORCH_VERSION;
  else if (is_in("xformers") || is_in("attention") || is_in("attn"))
    way_out =
        "export the model with scaled_dot_product_attention (diffusers: "
        "unet.set_attn_processor(AttnProcessor2_0()); ComfyUI: --use-pytorch-cross-attention)";
  refuse(path, c10::str("which uses ", op, ", an op that this program does not have: ", way_out));
}

// "RuntimeError: " at the start of a line: what the interpreter puts in front of a message.
bool starts_message(const std::string& text, std::size_t line, std::size_t& begin) {
  begin = text.find(": ", line);
  if (begin == std::string::npos) return false;
  const auto name = text.substr(line, begin - line);
  begin += 2;
  const bool is_name = std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '.';
  });
  return is_name && (name.ends_with("Error") || name.ends_with("Exception"));
}

}  // namespace

std::string zip_problem(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return "which does not exist";
  if (std::filesystem::is_directory(status)) return "which is a directory";
  std::ifstream file(path, std::ios::binary);
  if (!file) return "which cannot be opened";
  char head[8] = {};
  file.read(head, sizeof head);
  if (file.gcount() == 0) return "which is empty";
  // LibTorch could read it, but trusts its offsets: a damaged one was seen to end the process.
  if (std::string(head + 4, 4) == "PTMF")
    return "which is a flatbuffer (.ff): save the module with torch.jit.save instead";
  if (std::string(head, 4) != "PK\x03\x04") return "which is no zip archive";
  return "";
}

std::string plain_message(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
  // Tracebacks nest where graphs fork; the last message is the innermost.
  std::size_t message = 0, begin = 0;
  for (std::size_t line = 0; line != std::string::npos && line < text.size();) {
    if (starts_message(text, line, begin)) message = begin;
    line = text.find('\n', line);
    if (line != std::string::npos) ++line;
  }
  text = text.substr(message);
  // What follows shows C++ frames, or code of the archive.
  for (const char* appendix : {"\nException raised from", ":\n  File \"", "\n  File \""}) {
    text = text.substr(0, text.find(appendix));
  }
  const auto is_space = [](unsigned char c) { return std::isspace(c) != 0; };
  text.erase(std::find_if_not(text.rbegin(), text.rend(), is_space).base(), text.end());
  text.erase(text.begin(), std::find_if_not(text.begin(), text.end(), is_space));
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

torch::jit::Module read_archive(const std::string& path) {
  if (const auto problem = zip_problem(path); !problem.empty()) refuse(path, problem);
  check_holds_code(path);
  // What a caller's InferenceMode would make here could never be used outside of it.
  c10::InferenceMode ordinary_tensors(false);
  try {
    // Onto the CPU whatever the file says, and without debug records: they hold the exporter's
    // paths.
    auto module = torch::jit::load(path, torch::kCPU, /*load_debug_files=*/false);
    module.eval();
    return module;
  } catch (const std::exception& error) {
    const auto message = plain_message(error);
    if (const auto op = unknown_op(message); !op.empty()) refuse_op(path, op);
    refuse(path, "which cannot be loaded: " + message);
  }
}

torch::Device numbered_device(const char* caller, torch::Device device) {
  if (!device.is_cuda()) return device;
  const auto devices = at::hasCUDA() ? at::detail::getCUDAHooks().deviceCount() : 0;
  TORCH_CHECK_VALUE(std::max<int>(device.index(), 0) < devices, "[", caller,
                    "] device must be one of the ", devices, " CUDA devices here, got ", device);
  if (!device.has_index()) device.set_index(at::detail::getCUDAHooks().getCurrentDevice());
  return device;
}

void convert_module(torch::jit::Module& module, torch::Device device,
                    std::optional<torch::ScalarType> dtype) {
  torch::NoGradGuard no_grad;
  c10::InferenceMode ordinary_tensors(false);
  for (torch::Tensor t : module.parameters()) {
    t.set_data(t.to(device, dtype && t.is_floating_point() ? *dtype : t.scalar_type()));
  }
  for (torch::Tensor t : module.buffers()) {
    const bool wider = dtype && t.is_floating_point() &&
                       c10::elementSize(*dtype) > c10::elementSize(t.scalar_type());
    t.set_data(t.to(device, wider ? *dtype : t.scalar_type()));
  }
}

void use_channels_last(torch::jit::Module& module) {
  torch::NoGradGuard no_grad;
  c10::InferenceMode ordinary_tensors(false);
  for (torch::Tensor t : module.parameters())
    if (t.dim() == 4) t.set_data(t.contiguous(at::MemoryFormat::ChannelsLast));
}

double convolution_share(const torch::jit::Module& module) {
  double convolutions = 0, all = 0;
  for (const torch::Tensor& t : module.parameters()) {
    const auto elements = static_cast<double>(t.numel());
    all += elements;
    if (t.dim() == 4) convolutions += elements;
  }
  return all > 0 ? convolutions / all : 0.0;
}

std::optional<torch::ScalarType> parameters_dtype(const torch::jit::Module& module) {
  std::map<torch::ScalarType, std::int64_t> elements;
  for (const torch::Tensor& t : module.parameters()) {
    if (t.is_floating_point()) elements[t.scalar_type()] += t.numel();
  }
  if (elements.empty()) return std::nullopt;
  return std::max_element(elements.begin(), elements.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

}  // namespace sag

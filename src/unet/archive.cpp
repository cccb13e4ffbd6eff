#include "archive.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/types.h>
#include <torch/version.h>

#include "file_problem.h"
#include "plain_message.h"

namespace sag {
namespace {

// The file, and who reads it.
struct Reading {
  const std::string& path;
  const char* caller;

  [[noreturn]] void refuse(const std::string& what) const {
    C10_THROW_ERROR(ValueError,
                    c10::str("[", caller, "] path must name a TorchScript archive, got \"", path,
                             "\", ", what));
  }
};

void check_holds_code(const Reading& reading) {
  std::string problem;
  try {
    caffe2::serialize::PyTorchStreamReader reader(reading.path);
    if (reader.hasRecord("constants.pkl")) return;
    problem = reader.hasRecord("data.pkl")
                  ? std::string("which is a file of torch.save, ") + kWeightsAlone
                  : "which holds no TorchScript code.";
  } catch (const std::exception& error) {
    problem = read_problem(error);
  }
  reading.refuse(problem);
}

// The op that is not registered, as the loader's message names it; empty if it says something else.
std::string unknown_op(const std::string& message) {
  const std::string before = "Unknown builtin op: ";
  const auto found = message.find(before);
  if (found == std::string::npos) return {};
  const auto begin = found + before.size();
  auto op = message.substr(begin, message.find_first_of(" \n", begin) - begin);
  while (op.ends_with('.')) op.pop_back();
  return op;
}

[[noreturn]] void refuse_op(const Reading& reading, const std::string& op) {
  const auto mentions = [&op](const char* part) { return op.find(part) != std::string::npos; };
  const char* way_out = "load the library that registers it first, or export the model without it";
  if (op.starts_with("aten::") || op.starts_with("prim::"))
    way_out = "save the model with PyTorch " TORCH_VERSION;
  else if (mentions("xformers") || mentions("attention") || mentions("attn"))
    way_out =
        "export the model with scaled_dot_product_attention (diffusers: "
        "unet.set_attn_processor(AttnProcessor2_0()); ComfyUI: --use-pytorch-cross-attention)";
  reading.refuse(
      c10::str("which uses ", op, ", an op that this program does not have: ", way_out, "."));
}

// torch.jit.load reads what a trace was made with only to write it into the graph.
void restore_traced_inputs(torch::jit::Module& module, const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  if (!reader.hasRecord("traced_inputs.pkl")) return;
  const auto by_method =
      torch::jit::readArchiveAndTensors("traced_inputs", "", "", {}, {}, torch::kCPU, reader);
  for (const auto& entry : by_method.toGenericDict())
    module.store_traced_inputs(entry.key().toStringRef(), entry.value().toListRef().vec());
}

}  // namespace

torch::jit::Module read_archive(const std::string& path, const char* caller) {
  const Reading reading{path, caller};
  if (const auto problem = zip_problem(path); !problem.empty()) reading.refuse(problem);
  check_holds_code(reading);
  // Tensors made in a caller's InferenceMode could not be used outside of it.
  c10::InferenceMode ordinary_tensors(false);
  try {
    // Onto the CPU, whatever the file says. Debug records hold the exporter's paths.
    auto module = torch::jit::load(path, torch::kCPU, /*load_debug_files=*/false);
    module.eval();
    restore_traced_inputs(module, path);
    return module;
  } catch (const std::exception& error) {
    const auto message = plain_message(error);
    if (const auto op = unknown_op(message); !op.empty()) refuse_op(reading, op);
    reading.refuse("which cannot be loaded: " + message);
  }
}

}  // namespace sag

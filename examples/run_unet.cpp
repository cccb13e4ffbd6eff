// Calls a UNet on given inputs, without a sampler.
//
//   run_unet unet.ts|unet.pt2|folder calls.pt out.pt [device]
//
// calls.pt: a list of dicts of tensors (x, timesteps, context, y …), as torch.save writes it.
// out.pt: all outputs one after the other, as one flat fp32 tensor for torch.load.
#include <fstream>
#include <iostream>
#include <iterator>

#include <torch/torch.h>

#include <sag/sag.h>

namespace {

std::shared_ptr<const sag::UNet> load(const std::string& path, torch::Device device) {
  if (sag::AotiUNet::is_package(path)) return sag::AotiUNet::load(path, {.device = device});
  return sag::TorchScriptUNet::load(path, {.device = device});
}

c10::IValue read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK_VALUE(file, "[run_unet] calls must be a file that can be read, got '", path, "'");
  return torch::pickle_load(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
}

sag::UNetInput input_of(const c10::IValue& call, const sag::UNet& unet) {
  sag::UNetInput input;
  for (const auto& entry : call.toGenericDict()) {
    const auto& name = entry.key().toStringRef();
    const auto t = entry.value().toTensor().to(unet.device());
    auto& place = name == "x"           ? input.x
                  : name == "timesteps" ? input.timesteps
                  : name == "context"   ? input.context
                  : name == "y"         ? input.y
                                        : input.extra[name];
    place = name == "timesteps" || !t.is_floating_point() ? t : t.to(unet.dtype());
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4 && argc != 5)
    return std::cerr << "usage: run_unet UNET CALLS.pt OUT.pt [DEVICE]\n", 1;
  const torch::NoGradGuard no_grad;
  const auto unet = load(argv[1], torch::Device(argc == 5 ? argv[4] : "cpu"));
  const auto calls = read(argv[2]);
  std::vector<torch::Tensor> outputs;
  for (const c10::IValue& call : calls.toListRef())
    outputs.push_back(unet->forward(input_of(call, *unet)).cpu().to(torch::kFloat).flatten());
  const auto bytes = torch::pickle_save(torch::cat(outputs));
  std::ofstream(argv[3], std::ios::binary).write(bytes.data(), std::ssize(bytes));
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

#include "numbered_device.h"

#include <algorithm>

#include <ATen/Context.h>
#include <c10/util/Exception.h>

namespace sag {

torch::Device numbered_device(torch::Device device, const char* caller) {
  if (!device.is_cuda()) return device;
  const auto devices = at::hasCUDA() ? at::detail::getCUDAHooks().deviceCount() : 0;
  TORCH_CHECK_VALUE(std::max<int>(device.index(), 0) < devices, "[", caller,
                    "] device must be one of the ", devices, " CUDA devices here, got ", device,
                    ".");
  if (!device.has_index()) device.set_index(at::detail::getCUDAHooks().getCurrentDevice());
  return device;
}

}  // namespace sag

#pragma once

#include <cstdint>

#include <ATen/Tensor.h>

namespace sag {

/// Whether a tensor begins at an address from which kernels can read several elements at once, as
/// compiled code assumes.
inline bool is_aligned(const at::Tensor& t) {
  constexpr std::uintptr_t kAlignment = 16;
  return reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % kAlignment == 0;
}

}  // namespace sag

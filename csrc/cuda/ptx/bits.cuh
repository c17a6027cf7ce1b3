// Bits.
#pragma once

#include <cstdint>

namespace convops::cuda::ptx {

// `count` ones from bit `first` on, as far as there are bits; neither is negative.
__device__ __forceinline__ uint32_t bit_mask(uint32_t first, uint32_t count) {
  uint32_t mask;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(mask) : "r"(first), "r"(count));
  return mask;
}

}  // namespace convops::cuda::ptx

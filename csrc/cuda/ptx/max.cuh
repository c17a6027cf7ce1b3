// The maximum of floats.
#pragma once

namespace convops::cuda::ptx {

// NaN where one of them is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
}

}  // namespace convops::cuda::ptx

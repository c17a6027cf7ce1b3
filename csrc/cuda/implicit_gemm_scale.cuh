// How implicit_gemm makes fp16 of numbers: by a power of two for all that share a scale, and in two
// parts.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace convops::cuda::implicit_gemm {

// Scaled, the largest magnitude m has 2^14 ≤ m < 2^15.
constexpr int kLargestExponent = 14;
// What 1 stands for where the largest magnitude is 1 to 2.
constexpr float kHalfUnit = 0x1p-14f;

struct Scale {
  float factor;     // what numbers are multiplied with
  float magnitude;  // the power of two just under the largest, or one of the next kStep - 1
  bool fits;
};

// From the bits of the largest magnitude; those of NaN and Inf are larger than any number's.
// Exponents are rounded up to the last of kStep (a power of two), so that what is of a similar size
// has the same scale; the largest is then scaled to less, to 2^(15 - kStep) at least.
template <int kStep = 1>
__device__ __forceinline__ Scale choose_scale(uint32_t largest) {
  if (largest == 0) return {1, 1, true};
  constexpr int kBias = 127, kMantissaBits = 23;
  // Products of two scales and sums of products stay within float32.
  constexpr int kLeast = -99, kMost = 109;
  int exponent = int(largest >> kMantissaBits) - kBias;
  if (exponent > kMost || exponent < kLeast) return {0, 0, false};
  exponent |= kStep - 1;
  return {__uint_as_float(unsigned(kBias + kLargestExponent - exponent) << kMantissaBits),
          __uint_as_float(unsigned(kBias + exponent) << kMantissaBits), true};
}

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __half2 halves = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&halves);
}

// What rounding left over.
__device__ __forceinline__ uint32_t pack_rest(float a, float b, uint32_t rounded) {
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&rounded));
  return pack(a - high.x, b - high.y);
}

}  // namespace convops::cuda::implicit_gemm

// How implicit_gemm brings numbers into fp16's range: by a power of two for all that share a scale.
#pragma once

#include <cstdint>

namespace convops::cuda::implicit_gemm {

// Scaled, the largest magnitude m has 2^14 ≤ m < 2^15.
constexpr int kLargestExponent = 14;

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

}  // namespace convops::cuda::implicit_gemm

// Floats as TF32 parts: what tensor cores multiply, in one product, or in three as exactly as
// float32.
#pragma once

#include <cstdint>

#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/truncation.h"

namespace convops::cuda {

// Both operands of a product are multiplied by this, so that the parts of the smallest subnormal
// number are normal numbers; sums by its square less, and by what chains of so many additions lose
// more.
constexpr float kTf32Scale = 0x1p23f;
constexpr float unscale(int additions) {
  return (1 + ptx::lost_by(float(additions))) / (kTf32Scale * kTf32Scale);
}

// A number as TF32 parts: rounded, or rounded and the rest, of which the instruction cuts off what
// is below the 13th bit. By floating-point operations: those of integers run at half the rate, and
// what is infinite or NaN has to stay one of them.
template <int kProducts>
struct Tf32Parts {
  static constexpr int kCount = kProducts > 1 ? 2 : 1;
  uint32_t part[kCount];

  __device__ __forceinline__ static Tf32Parts of(float x) {
    // Veltkamp: a number taken from one so much larger, and that back from it, loses 13 bits.
    constexpr float kMore = 0x1p13f + 1;
    const float more = x * (kTf32Scale * kMore);
    const float high = more - fmaf(x, -kTf32Scale, more);
    if constexpr (kProducts == 1) {
      return {__float_as_uint(high)};
    } else {
      const float low = fmaf(x, kTf32Scale, -high);
      // All four products are for sums so short that the low part is rounded as well.
      return {__float_as_uint(high),
              kProducts == 4 ? ptx::round_to_tf32(low) : __float_as_uint(low)};
    }
  }
  // The same in registers of its own (and no -0): fragments that share an element would be copied.
  __device__ __forceinline__ Tf32Parts again() const {
    Tf32Parts copy;
    for (int k = 0; k < kCount; ++k) copy.part[k] = __float_as_uint(__uint_as_float(part[k]) + 0.f);
    return copy;
  }
};

// The registers of an instruction's operand, in parts.
template <int kProducts, int kRegisters>
struct Tf32Operand {
  uint32_t part[Tf32Parts<kProducts>::kCount][kRegisters];

  __device__ __forceinline__ void set(int place, float x) {
    const auto parts = Tf32Parts<kProducts>::of(x);
#pragma unroll
    for (int i = 0; i < Tf32Parts<kProducts>::kCount; ++i) part[i][place] = parts.part[i];
  }
};

}  // namespace convops::cuda

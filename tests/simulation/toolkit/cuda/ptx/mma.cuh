// Stands for csrc/cuda/ptx/mma.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "fragments.h"

namespace convops::cuda::ptx {

inline void load_matrices(uint32_t (&d)[4], uint32_t row) { simulation::load_matrices(d, row); }
inline void load_transposed(uint32_t (&d)[4], uint32_t row) { simulation::load_transposed(d, row); }
inline void store_transposed(uint32_t column, const uint32_t (&d)[4]) {
  simulation::store_transposed(column, d);
}
inline void store_matrices(uint32_t row, const uint32_t (&d)[4]) {
  simulation::store_matrices(row, d);
}

template <typename T>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  simulation::multiply(d, {a0, a1, a2, a3}, {b0, b1},
                       kHalf ? simulation::Elements::kHalf : simulation::Elements::kBFloat16);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simulation::multiply(d, a, b, simulation::Elements::kTf32);
}
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fffffff;
  return isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

}  // namespace convops::cuda::ptx

// mma.sync and ldmatrix, as csrc/cuda/ptx/mma.cuh describes them: a warp multiplies matrices whose
// fragments its lanes have in registers.
#pragma once

#include <cstdint>

namespace simulation {

enum class Elements { kHalf, kBFloat16, kTf32 };

// D (16 × 8) += A (16 × depth) · B (depth × 8): depth 16 of halves, 8 of TF32, of which the last 13
// bits are ignored. All lanes meet, then everything is done. Sums are exact and rounded once.
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Elements elements);

// Four 8×8 matrices of 16-bit elements; `row`: the address of row lane % 8 of matrix lane / 8.
void load_matrices(uint32_t (&d)[4], uint32_t row);
void load_transposed(uint32_t (&d)[4], uint32_t row);
void store_transposed(uint32_t column, const uint32_t (&d)[4]);
void store_matrices(uint32_t row, const uint32_t (&d)[4]);

}  // namespace simulation

// Stands for csrc/cuda/ptx/wgmma.cuh.
#pragma once

#include "tensor_cores.h"

namespace convops::cuda::ptx {

// The lower word of a descriptor, as there.
struct Matrix {
  uint32_t low;

  Matrix operator+(int rows) const { return {low + rows}; }
};
inline Matrix matrix(uint32_t address, uint32_t plane) {
  return {(address & 0x3ffff) >> 4 | plane >> 4 << 16};
}

struct LaidMatrix {
  uint32_t low, high;
};

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}

template <int kRegisters>
void wgmma(float (&d)[kRegisters], Matrix a, Matrix b, int accumulate) {
  simulation::multiply(d, 2 * kRegisters, a.low, b.low, accumulate != 0, false);
}
template <int kRegisters>
void wgmma(float (&d)[kRegisters], Matrix a, LaidMatrix b, int accumulate) {
  simulation::multiply(d, 2 * kRegisters, a.low, b.low, accumulate != 0, false, b.high);
}
template <int kRegisters>
void wgmma_bf16(float (&d)[kRegisters], Matrix a, LaidMatrix b, int accumulate) {
  simulation::multiply(d, 2 * kRegisters, a.low, b.low, accumulate != 0, true, b.high);
}

inline LaidMatrix boxes(uint32_t address, uint32_t box) {
  return {(address & 0x3ffff) >> 4 | box >> 4 << 16, 1u << 30 | 1024 >> 4};
}
template <bool kTurned>
LaidMatrix skip(LaidMatrix matrix, int k) {
  return {matrix.low + uint32_t(k * (kTurned ? 128 : 2) / 16), matrix.high};
}
template <bool kTurnedA, bool kTurnedB, int kRegisters>
void wgmma_boxes(float (&d)[kRegisters], LaidMatrix a, LaidMatrix b, int accumulate) {
  simulation::multiply_boxes(d, 2 * kRegisters, {a.low, a.high, kTurnedA},
                             {b.low, b.high, kTurnedB}, accumulate != 0, false);
}
template <bool kTurnedA, bool kTurnedB, int kRegisters>
void wgmma_boxes_bf16(float (&d)[kRegisters], LaidMatrix a, LaidMatrix b, int accumulate) {
  simulation::multiply_boxes(d, 2 * kRegisters, {a.low, a.high, kTurnedA},
                             {b.low, b.high, kTurnedB}, accumulate != 0, true);
}

template <int kRegisters>
void wgmma_tf32(float (&d)[kRegisters], const uint32_t (&a)[4], LaidMatrix b, int accumulate) {
  simulation::multiply_tf32(d, 2 * kRegisters, a, b.low, b.high, accumulate != 0);
}

// The words of a descriptor, as there.
struct Cells {
  uint32_t low, high;

  Cells operator+(int cells) const { return {low + cells, high}; }
};
inline Cells cells(uint32_t address, uint32_t plane) {
  return {(address & 0x3ffff) >> 4 | 128 >> 4 << 16, plane >> 4};
}
template <int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], Cells b, int accumulate) {
  simulation::multiply_cells(d, 2 * kRegisters, a, b.low, b.high, accumulate != 0, false);
}
template <int kRegisters>
void wgmma_bf16(float (&d)[kRegisters], const uint32_t (&a)[4], Cells b, int accumulate) {
  simulation::multiply_cells(d, 2 * kRegisters, a, b.low, b.high, accumulate != 0, true);
}

}  // namespace convops::cuda::ptx

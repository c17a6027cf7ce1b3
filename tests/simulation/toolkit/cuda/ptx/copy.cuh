// Stands for csrc/cuda/ptx/copy.cuh.
#pragma once

#include <cuda.h>

#include "async_copies.h"
#include "barrier.h"
#include "copy_engine.h"
#include "libcudacxx.h"

namespace convops::cuda::ptx {

inline void copy_float(uint32_t destination, const float* source, bool inside) {
  simulation::copy_async(destination, source, 4, inside ? 4 : 0);
}
template <int kBytes>
void copy_bytes(uint32_t destination, const void* source, bool inside = true) {
  simulation::copy_async(destination, source, kBytes, inside ? kBytes : 0);
}
template <int kBytes>
void copy_bytes_or_zeros(uint32_t destination, const void* source, uint32_t inside) {
  copy_bytes<kBytes>(destination, source, inside != 0);
}
inline void copy_commit() { simulation::commit_copies(); }
template <int kPending>
void copy_wait() {
  simulation::wait_copies(kPending);
}
inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  simulation::expect_bytes(barrier, bytes);
}
inline void copy_bulk(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
  simulation::expect_bytes(barrier, bytes);
  simulation::arrive(barrier);
  simulation::load_bulk(destination, source, bytes);
  simulation::complete_bytes(barrier, bytes);
}
inline void copy_box(void* destination, const CUtensorMap* map, const int32_t (&place)[4],
                     uint64_t* barrier) {
  simulation::complete_bytes(barrier, simulation::load_box(destination, *map, place));
}
inline void copy_pixels(void* destination, const CUtensorMap* map, const int32_t (&place)[4],
                        const uint16_t (&shift)[2], uint64_t* barrier) {
  simulation::complete_bytes(barrier, simulation::load_pixels(destination, *map, place, shift));
}
inline void store_bulk(void* destination, const void* source, uint32_t bytes) {
  simulation::store_bulk(destination, source, bytes);
}
inline void store_box(const CUtensorMap* map, const int32_t (&place)[5], const void* source) {
  simulation::store_box(*map, place, source);
}
inline void store_commit() { simulation::commit_stores(); }
template <int kPending>
void store_wait_read() {
  static_assert(kPending == 0);
  simulation::wait_stores();
}
inline void store_wait() { simulation::wait_stores(); }

}  // namespace convops::cuda::ptx

// Stands for libcu++'s <cuda/ptx>: what the kernels use of it directly. (Here that is the name of a
// folder.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "barrier.h"
#include "block.h"

namespace cuda::ptx {

enum Space { space_shared };
inline void fence_proxy_async(Space) {}

inline void mbarrier_init(uint64_t* barrier, uint32_t threads) {
  simulation::init_barrier(barrier, threads);
}

// Bits begin, ..., begin + count - 1, those there are.
inline uint32_t bmsk_clamp(int begin, int count) {
  if (begin < 0 || count < 0) simulation::fail("bmsk of negative numbers");
  const auto below = [](int bit) { return (uint64_t{1} << std::min(bit, 32)) - 1; };
  return uint32_t(below(begin + count) & ~below(begin));
}

}  // namespace cuda::ptx

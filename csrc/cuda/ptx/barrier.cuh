// Barriers in shared memory (mbarrier), barriers of some of a block's warps, and register budgets.
#pragma once

#include <cstdint>
#include <cuda/ptx>

namespace convops::cuda::ptx {

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}
__device__ __forceinline__ bool barrier_passed(uint64_t* barrier, uint32_t parity) {
  return ::cuda::ptx::mbarrier_test_wait_parity(barrier, parity);
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  ::cuda::ptx::mbarrier_arrive(barrier);
}

// Barrier `name` (1 to 15; 0 is __syncthreads) of kThreads threads, that is of whole warps.
template <int kThreads>
__device__ __forceinline__ void sync_threads(int name) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(kThreads) : "memory");
}
// The same for threads that come from different places of the program: synccheck takes bar.sync
// for one place.
__device__ __forceinline__ void sync_threads(int name, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// The same as the first, and whether `value` holds for all of these threads.
template <int kThreads>
__device__ __forceinline__ bool sync_threads_and(int name, bool value) {
  int all;
  asm volatile(
      "{ .reg .pred mine, all; setp.ne.s32 mine, %3, 0;\n"
      "  bar.red.and.pred all, %1, %2, mine; selp.s32 %0, 1, 0, all; }"
      : "=r"(all)
      : "r"(name), "n"(kThreads), "r"(int(value))
      : "memory");
  return all != 0;
}

// Registers a thread of this warpgroup has from here on; all its warps must come by.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace convops::cuda::ptx

// Which thread runs.
#pragma once

namespace convops::cuda::ptx {

// threadIdx.x, read anew wherever it is used: what the compiler derives from that one ahead of a
// loop may be more than a thread's registers hold.
__device__ __forceinline__ int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Has a value computed here and now, not anew wherever it is used.
template <typename T>
__device__ __forceinline__ void keep(T& value) {
  asm volatile("" : "+r"(value));
}

}  // namespace convops::cuda::ptx

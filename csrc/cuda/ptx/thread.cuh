// What a thread is.
#pragma once

namespace convops::cuda::ptx {

// threadIdx.x, read anew at every call: of that, the compiler keeps what it derives from it.
__device__ __forceinline__ int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

}  // namespace convops::cuda::ptx

// Kernels that follow each other in a stream (programmatic dependent launch, sm_90 and later): the
// second one's blocks may come onto the device, and wait there, while the first one's still run.
#pragma once

namespace convops::cuda::ptx {

// Lets the next kernel's blocks come as soon as every block of this one has called it, or ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Until the kernel before has ended, and what it wrote is there.
__device__ __forceinline__ void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace convops::cuda::ptx

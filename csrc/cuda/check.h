// Every CUDA and cuBLAS call goes through these; a failure throws with the call and CUDA's own
// words.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace convops::cuda {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed call must not fail the next one's check
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error) + " (" + call +
                           ')');
}

}  // namespace convops::cuda

#define CONVOPS_CUDA_CHECK(call) ::convops::cuda::check_cuda((call), #call)
// Right after every <<<>>>.
#define CONVOPS_LAUNCH_CHECK(kernel) ::convops::cuda::check_cuda(cudaGetLastError(), kernel)

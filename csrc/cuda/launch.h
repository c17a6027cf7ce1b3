// Launches that say more than <<<>>> can.
#pragma once

#include "algorithm.h"
#include "cuda/check.h"

namespace convops::cuda {

// Launches a kernel that calls ptx::wait_for_prerequisites() before it reads what the kernel before
// it wrote: its blocks may come onto the device while those of that one end, which saves 2 µs. On
// Hopper: what later architectures run is compiled from the oldest's PTX (setup.py), and cannot
// wait.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int shared_bytes,
                  const Execution& execution, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(execution.stream);
  config.attrs = &early;
  config.numAttrs = execution.device->compute_capability == 90 ? 1 : 0;
  CONVOPS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace convops::cuda

// The main kernel of implicit_gemm for float32: three products or one.
#include "cuda/implicit_gemm_kernel.cuh"

namespace convops::cuda {

void multiply_float(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands,
                    int processors, void* stream) {
  if (g.products == 3)
    implicit_gemm::launch_tile<float, 3>(g, t, operands, processors, stream);
  else
    implicit_gemm::launch_tile<float, 1>(g, t, operands, processors, stream);
}

}  // namespace convops::cuda

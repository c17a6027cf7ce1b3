// The main kernel of implicit_gemm for float16.
#include "cuda/implicit_gemm_kernel.cuh"

namespace convops::cuda {

void multiply_half(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands,
                   int processors, void* stream) {
  implicit_gemm::launch_tile<__half, 1>(g, t, operands, processors, stream);
}

}  // namespace convops::cuda

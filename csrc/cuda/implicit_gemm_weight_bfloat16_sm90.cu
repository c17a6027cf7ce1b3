// The kernels of implicit_gemm_weight for bfloat16.
#include "cuda/implicit_gemm_weight_kernel.cuh"

namespace convops::cuda {

void sum_weight_parts_bfloat16(const WeightGemm& gemm, const WeightTile& tile, int,
                               const WeightOperands& operands, const Tensor4& grad, void* stream) {
  implicit_gemm_weight::sum_parts<__nv_bfloat16, 1>(gemm, tile, operands, grad, stream);
}

}  // namespace convops::cuda

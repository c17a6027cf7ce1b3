// The kernels of implicit_gemm_weight for float16.
#include "cuda/implicit_gemm_weight_kernel.cuh"

namespace convops::cuda {

void sum_weight_parts_half(const WeightGemm& gemm, const WeightTile& tile, int,
                           const WeightOperands& operands, const Tensor4& grad, void* stream) {
  implicit_gemm_weight::sum_parts<__half, 1>(gemm, tile, operands, grad, stream);
}

}  // namespace convops::cuda

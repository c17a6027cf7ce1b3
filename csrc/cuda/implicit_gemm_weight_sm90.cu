// The kernels of implicit_gemm_weight for float32: three products or one.
#include "cuda/implicit_gemm_weight_kernel.cuh"

namespace convops::cuda {

void sum_weight_parts_float(const WeightGemm& gemm, const WeightTile& tile, int products,
                            const WeightOperands& operands, const Tensor4& grad, void* stream) {
  if (products == 3)
    implicit_gemm_weight::sum_parts<float, 3>(gemm, tile, operands, grad, stream);
  else
    implicit_gemm_weight::sum_parts<float, 1>(gemm, tile, operands, grad, stream);
}

}  // namespace convops::cuda

#include "cuda/gemm.h"

#include <cublas_v2.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace convops::cuda {
namespace {

void check_cublas(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("cuBLAS error: ") + cublasGetStatusString(status) + " (" +
                             call + ')');
}
#define CONVOPS_CUBLAS_CHECK(call) check_cublas((call), #call)

// The handle's math mode for one call; torch's own calls must find theirs again.
class MathMode {
 public:
  MathMode(cublasHandle_t handle, cublasMath_t mode) : handle_(handle) {
    CONVOPS_CUBLAS_CHECK(cublasGetMathMode(handle, &saved_));
    CONVOPS_CUBLAS_CHECK(cublasSetMathMode(handle, mode));
  }
  ~MathMode() { cublasSetMathMode(handle_, saved_); }

 private:
  cublasHandle_t handle_;
  cublasMath_t saved_;
};

// How cuBLAS, which is column-major, sees a rows × columns matrix.
struct Operand {
  const void* data;
  cublasOperation_t operation;
  int leading;
  int64_t batch_stride;
};

Operand operand(const Matrix& matrix, int64_t rows, int64_t columns) {
  // The stride along a dimension of size one says nothing and may be anything.
  const bool column_major = matrix.row_stride == 1 || (rows == 1 && matrix.column_stride != 1);
  const int64_t leading = column_major ? (columns == 1 ? rows : matrix.column_stride)
                                       : (rows == 1 ? columns : matrix.row_stride);
  return {matrix.data, column_major ? CUBLAS_OP_N : CUBLAS_OP_T,
          int(std::max(leading, column_major ? rows : columns)), matrix.batch_stride};
}

cudaDataType_t data_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return CUDA_R_64F;
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

}  // namespace

void gemm(DType dtype, DType c_dtype, Precision precision, const GemmSize& size, const Matrix& a,
          const Matrix& b, const Matrix& c, Accumulate accumulate) {
  Operand left = operand(a, size.m, size.k), right = operand(b, size.k, size.n);
  Operand result = operand(c, size.m, size.n);
  int m = int(size.m), n = int(size.n);
  const int k = int(size.k), batch = int(size.batch);
  if (result.operation == CUBLAS_OP_T) {  // row-major: cᵀ = bᵀ · aᵀ
    std::swap(left, right);
    std::swap(m, n);
    for (Operand* factor : {&left, &right})
      factor->operation = factor->operation == CUBLAS_OP_N ? CUBLAS_OP_T : CUBLAS_OP_N;
  }
  void* handle_pointer;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle_pointer));
  const auto handle = static_cast<cublasHandle_t>(handle_pointer);
  const double alpha64 = 1, beta64 = accumulate == Accumulate::kYes ? 1 : 0;
  const float alpha = 1, beta = float(beta64);
  void* out = const_cast<void*>(result.data);

  if (dtype == DType::kFloat64) {
    const MathMode mode(handle, CUBLAS_DEFAULT_MATH);
    CONVOPS_CUBLAS_CHECK(cublasDgemmStridedBatched(
        handle, left.operation, right.operation, m, n, k, &alpha64,
        static_cast<const double*>(left.data), left.leading, left.batch_stride,
        static_cast<const double*>(right.data), right.leading, right.batch_stride, &beta64,
        static_cast<double*>(out), result.leading, result.batch_stride, batch));
  } else if (dtype == DType::kFloat32) {
    const MathMode mode(
        handle, precision == Precision::kTf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH);
    CONVOPS_CUBLAS_CHECK(cublasSgemmStridedBatched(
        handle, left.operation, right.operation, m, n, k, &alpha,
        static_cast<const float*>(left.data), left.leading, left.batch_stride,
        static_cast<const float*>(right.data), right.leading, right.batch_stride, &beta,
        static_cast<float*>(out), result.leading, result.batch_stride, batch));
  } else {
    // Split sums stay float32 as well.
    const MathMode mode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
    CONVOPS_CUBLAS_CHECK(cublasGemmStridedBatchedEx(
        handle, left.operation, right.operation, m, n, k, &alpha, left.data, data_type(dtype),
        left.leading, left.batch_stride, right.data, data_type(dtype), right.leading,
        right.batch_stride, &beta, out, data_type(c_dtype), result.leading, result.batch_stride,
        batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }
}

}  // namespace convops::cuda

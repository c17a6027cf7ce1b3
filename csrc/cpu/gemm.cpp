#include "cpu/gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensor.h"

namespace convops::cpu {
namespace {

// A view of dimensions (batch, rows, columns), without the batch where that is one: torch's product
// of two matrices is quicker than that of two batches of one.
Tensor wrap(DType dtype, int64_t batch, int64_t rows, int64_t columns, const Matrix& matrix) {
  const int64_t sizes[3] = {batch, rows, columns};
  const int64_t strides[3] = {matrix.batch_stride, matrix.row_stride, matrix.column_stride};
  const int skip = batch == 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      matrix.data, 3 - skip, sizes + skip, strides + skip, 0,
      dtype == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

void gemm(DType dtype, const GemmSize& size, const Matrix& a, const Matrix& b, const Matrix& c,
          bool accumulate) {
  const Tensor left = wrap(dtype, size.batch, size.m, size.k, a);
  const Tensor right = wrap(dtype, size.batch, size.k, size.n, b);
  const Tensor result = wrap(dtype, size.batch, size.m, size.n, c);
  const auto multiply = size.batch == 1 ? aoti_torch_cpu_mm_out : aoti_torch_cpu_bmm_out;
  const auto multiply_add = size.batch == 1 ? aoti_torch_cpu_addmm_out : aoti_torch_cpu_baddbmm_out;
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(
        multiply_add(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(multiply(result.get(), left.get(), right.get()));
  }
}

}  // namespace convops::cpu

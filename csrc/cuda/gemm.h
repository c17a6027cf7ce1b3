// Strided-batched matrix product on cuBLAS.
#pragma once

#include "matrix.h"
#include "problem.h"

namespace convops::cuda {

enum class Accumulate : bool { kNo, kYes };

// c = a · b, or c += a · b, on torch's cuBLAS handle and the current stream. a and b have `dtype`,
// c has `dtype` or float32; sums are float32 (float64 for float64) and rounded once. Each matrix
// needs unit stride along rows or columns, and sizes and leading dimensions below 2^31.
void gemm(DType dtype, DType c_dtype, Precision precision, const GemmSize& size, const Matrix& a,
          const Matrix& b, const Matrix& c, Accumulate accumulate);

}  // namespace convops::cuda

// Batched matrix product on torch's BLAS.
#pragma once

#include "matrix.h"
#include "problem.h"

namespace convops::cpu {

// c = a · b, or c += a · b, in float32 or float64.
void gemm(DType dtype, const GemmSize& size, const Matrix& a, const Matrix& b, const Matrix& c,
          bool accumulate);

}  // namespace convops::cpu

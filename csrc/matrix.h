// A batch of matrices anywhere in memory, and the size of a product of two.
#pragma once

#include <cstdint>

#include "problem.h"

namespace convops {

struct Matrix {
  void* data;
  int64_t batch_stride, row_stride, column_stride;

  Matrix transposed() const { return {data, batch_stride, column_stride, row_stride}; }
};

// (m × k) · (k × n), `batch` times.
struct GemmSize {
  int64_t batch, m, n, k;
};

// BLAS libraries count in int.
constexpr int64_t kMaxGemmExtent = int64_t{1} << 30;

// From one pixel of an image to the next, where they are evenly spaced.
inline int64_t pixel_stride(const Tensor4& t) { return t.size[3] > 1 ? t.stride[3] : t.stride[2]; }

// Whether all pixels of an image of the tensor are evenly spaced and one of the strides a GEMM
// needs is 1; `channels` of it form a matrix.
inline bool is_pixel_matrix(const Tensor4& t, int64_t channels) {
  const int64_t pixels = t.size[2] * t.size[3];
  const int64_t step = pixel_stride(t);
  const bool even = t.size[2] == 1 || t.size[3] == 1 || t.stride[2] == t.size[3] * t.stride[3];
  const bool planes = (step == 1 || pixels == 1) &&
                      (channels == 1 || (t.stride[1] >= pixels && t.stride[1] < kMaxGemmExtent));
  const bool vectors = (t.stride[1] == 1 || channels == 1) &&
                       (pixels == 1 || (step >= channels && step < kMaxGemmExtent));
  return even && (planes || vectors);
}

}  // namespace convops

// The column matrix of im2col: where its elements lie, and how a problem is cut into pieces whose
// columns fit a workspace. Shared by the CPU and CUDA algorithms and the public im2col and col2im.
#pragma once

#include <algorithm>
#include <numeric>

#include "problem.h"

namespace convops {

// Images [image, image + images) and output rows [row, row + rows) of each.
struct Chunk {
  int64_t image, images, row, rows;

  CONVOPS_HOST_DEVICE int64_t pixels(const ConvProblem& problem) const {
    return images * rows * problem.output.size[3];
  }
};

// Element (tap, image, pixel) lies at tap * tap_stride + (image - chunk.image) * image_stride +
// pixel * pixel_stride; a tap is (channel, kh, kw), a pixel counts from the chunk's first row.
struct Columns {
  void* data;
  int64_t tap_stride, image_stride, pixel_stride;
  Chunk chunk;
};

// Length of the rows that hold `pixels` pixels each: 16 bytes of the smallest dtype apart, so that
// vector stores and tensor cores find every row aligned.
constexpr int64_t kPixelMultiple = 8;

inline int64_t padded_pixels(int64_t pixels) {
  return (pixels + kPixelMultiple - 1) / kPixelMultiple * kPixelMultiple;
}

// Rows of that many pixels come back to an aligned address after so many rows.
inline int64_t aligned_rows(int64_t width) {
  return kPixelMultiple / std::gcd(width, kPixelMultiple);
}

// Taps × (images · pixels), row by row: what a GEMM reads.
inline Columns packed_columns(void* data, const ConvProblem& problem, const Chunk& chunk) {
  return {data, padded_pixels(chunk.pixels(problem)), chunk.rows * problem.output.size[3], 1,
          chunk};
}

inline Chunk whole(const ConvProblem& problem) {
  return {0, problem.batch(), 0, problem.output_size().h};
}

// Cuts `images` × `rows` into even chunks of at most `budget_rows` rows: whole images, or where one
// has more than that, rows of one image, if possible a multiple of `row_multiple`. Calls f(Chunk)
// in order.
template <typename F>
void for_each_chunk(int64_t images, int64_t rows, int64_t budget_rows, int64_t row_multiple,
                    F&& f) {
  const auto even_step = [](int64_t total, int64_t most) {
    const int64_t chunks = (total + most - 1) / most;
    return (total + chunks - 1) / chunks;
  };
  const int64_t image_step = even_step(images, std::max<int64_t>(1, budget_rows / rows));
  int64_t row_step = even_step(rows, std::clamp<int64_t>(budget_rows, 1, rows));
  if (row_step < rows && budget_rows >= row_multiple) {
    row_step = (row_step + row_multiple - 1) / row_multiple * row_multiple;
    if (row_step > budget_rows) row_step -= row_multiple;
  }
  for (int64_t image = 0; image < images; image += image_step)
    for (int64_t row = 0; row < rows; row += row_step)
      f(Chunk{image, std::min(image_step, images - image), row, std::min(row_step, rows - row)});
}

// The output rows that input rows [first, first + count) take part in; may be empty.
inline Chunk output_rows_of(const ConvProblem& p, const Chunk& input_rows) {
  const auto floor_div = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
  const int64_t reach = (p.kernel().h - 1) * p.dilation.h;
  const int64_t first = -floor_div(-(input_rows.row + p.padding.h - reach), p.stride.h);
  const int64_t last = floor_div(input_rows.row + input_rows.rows - 1 + p.padding.h, p.stride.h);
  const int64_t begin = std::max<int64_t>(0, first);
  const int64_t end = std::min(p.output_size().h, last + 1);
  return {input_rows.image, input_rows.images, begin, std::max<int64_t>(0, end - begin)};
}

// The problems behind the public ops: a convolution of one output channel whose columns are wanted.
// Throw std::runtime_error in the words of F.unfold and F.fold. `arguments.groups` is not read.
ConvProblem im2col_problem(const TensorInfo& input, const std::vector<int64_t>& kernel_size,
                           const ConvArguments& arguments);
// `columns` has size (batch, channels * kernel height * kernel width, blocks).
ConvProblem col2im_problem(const TensorInfo& columns, const std::vector<int64_t>& output_size,
                           const std::vector<int64_t>& kernel_size, const ConvArguments& arguments);

}  // namespace convops

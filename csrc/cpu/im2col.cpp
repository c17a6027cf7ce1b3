#include "cpu/im2col.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/span.h"
#include "cpu/types.h"

namespace convops::cpu {
namespace {

template <typename Input, typename Column>
void im2col_typed(const ConvProblem& p, const Input* input, const Columns& columns) {
  const Pair kernel = p.kernel();
  const int64_t out_w = p.output_size().w;
  const int64_t taps = p.in_channels() * kernel.h * kernel.w;
  const Chunk chunk = columns.chunk;
  parallel_for(taps * chunk.images, chunk.rows * out_w, [&](int64_t index) {
    const int64_t tap = index / chunk.images, image = index % chunk.images;
    const int64_t kw = tap % kernel.w, kh = tap / kernel.w % kernel.h,
                  channel = tap / (kernel.w * kernel.h);
    const Input* plane =
        input + (chunk.image + image) * p.input.stride[0] + channel * p.input.stride[1];
    Column* out = static_cast<Column*>(columns.data) + tap * columns.tap_stride +
                  image * columns.image_stride;
    const int64_t step = columns.pixel_stride;
    const Span span = span_inside(p, kw);
    for (int64_t row = 0; row < chunk.rows; ++row, out += out_w * step) {
      const int64_t h = (chunk.row + row) * p.stride.h - p.padding.h + kh * p.dilation.h;
      if (h < 0 || h >= p.input_size().h) {
        for (int64_t w = 0; w < out_w; ++w) out[w * step] = Column(0);
        continue;
      }
      const int64_t x_step = p.stride.w * p.input.stride[3];
      const Input* x = plane + h * p.input.stride[2] + span.first * p.input.stride[3];
      for (int64_t w = 0; w < span.begin; ++w) out[w * step] = Column(0);
      if (x_step == 1 && step == 1)  // one loop the compiler turns into vectors
        for (int64_t w = span.begin; w < span.end; ++w) out[w] = Column(x[w]);
      else
        for (int64_t w = span.begin; w < span.end; ++w) out[w * step] = Column(x[w * x_step]);
      for (int64_t w = span.end; w < out_w; ++w) out[w * step] = Column(0);
    }
  });
}

template <typename Column, typename Input>
void col2im_typed(const ConvProblem& p, const Columns& columns, const Chunk& rows, Input* input) {
  using Sum = AccumulateType<Input>;
  const Pair kernel = p.kernel();
  const int64_t in_w = p.input_size().w, out_w = p.output_size().w;
  const Chunk chunk = columns.chunk;
  const int64_t channels = p.in_channels();
  parallel_for(rows.images * channels * rows.rows, in_w * kernel.h * kernel.w, [&](int64_t index) {
    const int64_t h = rows.row + index % rows.rows;
    const int64_t channel = index / rows.rows % channels;
    const int64_t image = index / (rows.rows * channels);
    thread_local std::vector<Sum> sums;
    sums.assign(in_w, Sum(0));
    for (int64_t kh = 0; kh < kernel.h; ++kh) {
      const int64_t above = h + p.padding.h - kh * p.dilation.h;
      if (above < 0 || above % p.stride.h != 0) continue;
      const int64_t out_h = above / p.stride.h;
      if (out_h >= p.output_size().h) continue;
      for (int64_t kw = 0; kw < kernel.w; ++kw) {
        const int64_t tap = (channel * kernel.h + kh) * kernel.w + kw;
        const Column* column = static_cast<const Column*>(columns.data) + tap * columns.tap_stride +
                               image * columns.image_stride +
                               (out_h - chunk.row) * out_w * columns.pixel_stride;
        const Span span = span_inside(p, kw);
        if (p.stride.w == 1 && columns.pixel_stride == 1)
          for (int64_t w = span.begin; w < span.end; ++w) sums[w + span.first] += Sum(column[w]);
        else
          for (int64_t w = span.begin; w < span.end; ++w)
            sums[w * p.stride.w + span.first] += Sum(column[w * columns.pixel_stride]);
      }
    }
    Input* out = input + (rows.image + image) * p.input.stride[0] + channel * p.input.stride[1] +
                 h * p.input.stride[2];
    for (int64_t w = 0; w < in_w; ++w) out[w * p.input.stride[3]] = Input(sums[w]);
  });
}

}  // namespace

void im2col(const ConvProblem& problem, const void* input, const Columns& columns,
            DType columns_dtype) {
  dispatch(problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (columns_dtype == problem.dtype)
      im2col_typed<T, T>(problem, static_cast<const T*>(input), columns);
    else
      im2col_typed<T, AccumulateType<T>>(problem, static_cast<const T*>(input), columns);
  });
}

void col2im(const ConvProblem& problem, const Columns& columns, DType columns_dtype,
            const Chunk& input_rows, void* input) {
  dispatch(problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (columns_dtype == problem.dtype)
      col2im_typed<T, T>(problem, columns, input_rows, static_cast<T*>(input));
    else
      col2im_typed<AccumulateType<T>, T>(problem, columns, input_rows, static_cast<T*>(input));
  });
}

}  // namespace convops::cpu

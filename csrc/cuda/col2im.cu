// col2im: input(channel, h, w) = Σ over taps of columns(tap, the output pixel whose tap hits (h,
// w)).
//
// A gather: one thread owns one input element and walks the taps in order, so there is no atomic,
// the order of the sum is fixed and the result is rounded once. Loads are coalesced along W for
// stride 1.
#include "cuda/check.h"
#include "cuda/im2col.h"
#include "cuda/types.cuh"

namespace convops::cuda {
namespace {

constexpr int kThreads = 256;

// Index as in im2col.cu. Registers for 6 blocks a multiprocessor: left alone ptxas spills to fit 8.
template <typename T, typename Column, typename Index>
__global__ void __launch_bounds__(kThreads, 6)
    col2im_kernel(const __grid_constant__ ConvProblem p, const __grid_constant__ Columns columns,
                  const __grid_constant__ Chunk rows, T* __restrict__ input, Index pixels) {
  const Index pixel = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const Index width = Index(p.input.size[3]);
  const Index line = pixel / width, w = pixel % width;
  const Index image = line / Index(rows.rows);
  const int64_t h = rows.row + line % Index(rows.rows);
  const int kernel_h = int(p.weight.size[2]), kernel_w = int(p.weight.size[3]);
  const int64_t taps = int64_t(kernel_h) * kernel_w;
  const int out_h = int(p.output.size[2]), out_w = int(p.output.size[3]);
  const int stride_h = int(p.stride.h), stride_w = int(p.stride.w);
  const Column* image_columns =
      static_cast<const Column*>(columns.data) + image * columns.image_stride;
  T* image_data = input + (rows.image + image) * p.input.stride[0] + h * p.input.stride[2] +
                  w * p.input.stride[3];

  for (int64_t channel = blockIdx.y; channel < p.input.size[1]; channel += gridDim.y) {
    const Column* column = image_columns + channel * taps * columns.tap_stride;
    AccumulateType<T> sum = 0;
    for (int kh = 0; kh < kernel_h; ++kh) {  // coordinates are int: a side has at most 2^30
      const int above = int(h + p.padding.h - kh * p.dilation.h);
      const int oh = above / stride_h;
      const bool row_hit = above >= 0 && oh * stride_h == above && oh < out_h;
#pragma unroll 2
      for (int kw = 0; kw < kernel_w; ++kw, column += columns.tap_stride) {
        const int left = int(w + p.padding.w - kw * p.dilation.w);
        const int ow = left / stride_w;
        if (row_hit && left >= 0 && ow * stride_w == left && ow < out_w)
          sum += convert<AccumulateType<T>>(
              column[((oh - columns.chunk.row) * out_w + ow) * columns.pixel_stride]);
      }
    }
    image_data[channel * p.input.stride[1]] = convert<T>(sum);
  }
}

template <typename T, typename Column>
void launch(const ConvProblem& p, const Columns& columns, const Chunk& rows, void* input,
            cudaStream_t stream) {
  const int64_t pixels = rows.images * rows.rows * p.input_size().w;
  const int64_t blocks = (pixels + kThreads - 1) / kThreads;
  const dim3 grid(unsigned(blocks), channel_blocks(p.in_channels(), blocks));
  T* data = static_cast<T*>(input);
  if (pixels + kThreads <= INT32_MAX)
    col2im_kernel<T, Column, int32_t>
        <<<grid, kThreads, 0, stream>>>(p, columns, rows, data, pixels);
  else
    col2im_kernel<T, Column, int64_t>
        <<<grid, kThreads, 0, stream>>>(p, columns, rows, data, pixels);
  CONVOPS_LAUNCH_CHECK("col2im");
}

}  // namespace

void col2im(const ConvProblem& problem, const Columns& columns, DType columns_dtype,
            const Chunk& input_rows, void* input, void* stream) {
  dispatch(problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto s = static_cast<cudaStream_t>(stream);
    if (columns_dtype == problem.dtype)
      launch<T, T>(problem, columns, input_rows, input, s);
    else
      launch<T, AccumulateType<T>>(problem, columns, input_rows, input, s);
  });
}

}  // namespace convops::cuda

// One element of backward-input by its definition: it sums over the outputs that there are. Kernels
// that multiply the zeros they read outside of grad_output make NaN of an infinite or NaN weight
// there. Those compute again where they found such a weight, or what came out as NaN: the rest is
// right.
#pragma once

#include "cuda/types.cuh"
#include "problem.h"

namespace convops::cuda {

template <typename T>
__device__ __forceinline__ AccumulateType<T> backward_input_element(const ConvProblem& p,
                                                                    const T* grad_output,
                                                                    const T* weight, int64_t image,
                                                                    int64_t channel, int64_t h,
                                                                    int64_t w) {
  using Sum = AccumulateType<T>;
  const int64_t group = channel / p.group_in_channels(), outputs = p.group_out_channels();
  grad_output += image * p.output.stride[0] + group * outputs * p.output.stride[1];
  weight += group * outputs * p.weight.stride[0] +
            (channel - group * p.group_in_channels()) * p.weight.stride[1];
  Sum sum = 0;
#pragma unroll 1
  for (int64_t kh = 0; kh < p.kernel().h; ++kh) {
    const int64_t above = h + p.padding.h - kh * p.dilation.h, oh = above / p.stride.h;
    if (above < 0 || oh * p.stride.h != above || oh >= p.output_size().h) continue;
#pragma unroll 1
    for (int64_t kw = 0; kw < p.kernel().w; ++kw) {
      const int64_t left = w + p.padding.w - kw * p.dilation.w, ow = left / p.stride.w;
      if (left < 0 || ow * p.stride.w != left || ow >= p.output_size().w) continue;
      const T* gradient = grad_output + oh * p.output.stride[2] + ow * p.output.stride[3];
      const T* tap = weight + kh * p.weight.stride[2] + kw * p.weight.stride[3];
#pragma unroll 1
      for (int64_t o = 0; o < outputs; ++o)
        sum += convert<Sum>(gradient[o * p.output.stride[1]]) *
               convert<Sum>(tap[o * p.weight.stride[0]]);
      if (sum != sum) return sum;
    }
  }
  return sum;
}

}  // namespace convops::cuda

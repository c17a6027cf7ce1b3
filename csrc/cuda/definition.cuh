// One element by its definition, for kernels that multiply more than belongs to it and make NaN of
// zeros and what is infinite or NaN. Those compute again where they found such a weight, or what
// came out as NaN: the rest is right.
#pragma once

#include "cuda/types.cuh"
#include "problem.h"

namespace convops::cuda {

// Of forward without its bias; zeros outside of the input are multiplied.
template <typename T>
__device__ __forceinline__ AccumulateType<T> forward_element(const ConvProblem& p, const T* input,
                                                             const T* weight, int64_t image,
                                                             int64_t channel, int64_t h,
                                                             int64_t w) {
  using Sum = AccumulateType<T>;
  const int64_t group = channel / p.group_out_channels(), inputs = p.group_in_channels();
  input += image * p.input.stride[0] + group * inputs * p.input.stride[1];
  weight += channel * p.weight.stride[0];
  Sum sum = 0;
#pragma unroll 1
  for (int64_t kh = 0; kh < p.kernel().h; ++kh) {
    const int64_t ih = h * p.stride.h - p.padding.h + kh * p.dilation.h;
#pragma unroll 1
    for (int64_t kw = 0; kw < p.kernel().w; ++kw) {
      const int64_t iw = w * p.stride.w - p.padding.w + kw * p.dilation.w;
      const bool inside = ih >= 0 && ih < p.input_size().h && iw >= 0 && iw < p.input_size().w;
      const T* const source = input + ih * p.input.stride[2] + iw * p.input.stride[3];
      const T* const tap = weight + kh * p.weight.stride[2] + kw * p.weight.stride[3];
#pragma unroll 1
      for (int64_t c = 0; c < inputs; ++c)
        sum += (inside ? convert<Sum>(source[c * p.input.stride[1]]) : Sum(0)) *
               convert<Sum>(tap[c * p.weight.stride[1]]);
    }
  }
  return sum;
}

// Of backward-input: it sums over the outputs that there are.
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

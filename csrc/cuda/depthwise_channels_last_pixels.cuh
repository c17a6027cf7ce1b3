// What the kernels of forward and backward-input have in common: what they are told, how results
// are stored, and the definition, for weights that the walk's zeros must not meet.
#pragma once

#include "cuda/depthwise_channels_last.cuh"

namespace convops::cuda::depthwise_channels_last {

// What forward and backward-input tell the kernel.
struct Pixels {
  Tiling tiling;
  Source source;
  Image result;
  int channels;
  int source_row, source_column;  // that position 0 reads first
  int result_row, result_column;  // of position 0: 0, or -1 where the padding is odd
  // Of the turned weight, which for forward has negative strides.
  int64_t weight_first, weight_channel, weight_row, weight_column;
  int64_t bias_stride;
  bool skips_outside;  // positions outside of the source do not count, be the weight infinite

  Pixels(const ConvProblem& p, const Operands& operands, const Tiling& tiling_)
      : tiling(tiling_),
        source(from(p), backward(p) ? operands.output : operands.input, p.dtype),
        result(p.result()),
        channels(int(p.in_channels())),
        weight_channel(p.weight.stride[0]),
        bias_stride(p.bias_stride),
        skips_outside(backward(p)) {
    const int64_t kh = p.weight.size[2], kw = p.weight.size[3];
    if (backward(p)) {
      source_row = int(p.padding.h / p.stride.h - (kh - 1) / p.stride.h);
      source_column = int(p.padding.w / p.stride.w - (kw - 1) / p.stride.w);
      result_row = -int(p.padding.h % p.stride.h);
      result_column = -int(p.padding.w % p.stride.w);
      weight_first = 0;
      weight_row = p.weight.stride[2];
      weight_column = p.weight.stride[3];
    } else {
      source_row = -int(p.padding.h);
      source_column = -int(p.padding.w);
      result_row = result_column = 0;
      weight_first = (kh - 1) * p.weight.stride[2] + (kw - 1) * p.weight.stride[3];
      weight_row = -p.weight.stride[2];
      weight_column = -p.weight.stride[3];
    }
  }
  __device__ int64_t weight_place(int channel, int kh, int kw) const {
    return weight_first + channel * weight_channel + kh * weight_row + kw * weight_column;
  }
  static bool backward(const ConvProblem& p) { return p.direction == Direction::kBackwardInput; }
  static const Tensor4& from(const ConvProblem& p) { return backward(p) ? p.output : p.input; }
};

// Whether a thread's channels, of which the first is at `place` and `channels` are left, are one
// vector in every pixel.
template <int kVector, typename T>
__device__ __forceinline__ bool are_vectors(const T* place, const Image& image, int channels) {
  return kVector == 1 ||
         (channels >= kVector && reinterpret_cast<uintptr_t>(place) % (kVector * sizeof(T)) == 0 &&
          image.row_stride % kVector == 0 && image.column_stride % kVector == 0);
}

// Stores one thread's results of a row of positions, which begin at `place`; `first` and `end`
// bound the columns that exist. `together`: all channels of a thread at once.
template <typename W, int kVector, typename T>
__device__ __forceinline__ void store_row(T* place, int64_t column_stride, int first, int end,
                                          int channels, bool together,
                                          const float (&sums)[W::kColumns][kVector]) {
#pragma unroll
  for (int j = 0; j < W::kColumns; ++j, place += column_stride) {
    if (j < first || j >= end) continue;
    struct alignas(kVector * sizeof(T)) Vector {
      T elements[kVector];
    } vector;
#pragma unroll
    for (int v = 0; v < kVector; ++v) vector.elements[v] = convert<T>(sums[j][v]);
    if (together) {
      *reinterpret_cast<Vector*>(place) = vector;
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        if (v < channels) place[v] = vector.elements[v];
    }
  }
}

// A thread's results once more, by the definition: for weights that are not finite, which the walk
// multiplies by the zeros around the source. (With definition.cuh's 64-bit coordinates ptxas spills
// here.)
template <typename W, bool kPadding, typename T, typename F>
__device__ __forceinline__ void store_by_definition(const Pixels& p, const Tile& tile, int column,
                                                    int channel, F&& weight_of, float bias,
                                                    const T* source, T* result) {
  const T* const from = source + tile.image * p.source.image.image_stride + channel;
  T* const to = result + tile.image * p.result.image_stride + channel;
  for (int row = tile.row; row < tile.row + p.tiling.rows; ++row)
    for (int j = column; j < column + W::kColumns; ++j) {
      float sum = bias;
      for (int tap = 0; tap < W::kTaps; ++tap) {
        // Never negative: positions and what is left of the window are not.
        const int h = row * W::kDown + W::kH - 1 - tap / W::kW;
        const int w = j * W::kDown + W::kW - 1 - tap % W::kW;
        const int source_row = h / W::kUp + p.source_row,
                  source_column = w / W::kUp + p.source_column;
        if (h % W::kUp != 0 || w % W::kUp != 0) continue;
        if (unsigned(source_row) < unsigned(p.source.image.height) &&
            unsigned(source_column) < unsigned(p.source.image.width))
          sum += weight_of(tap) *
                 convert<float>(from[source_row * p.source.image.row_stride +
                                     int64_t(source_column) * p.source.image.column_stride]);
        else if (kPadding && !p.skips_outside)
          sum += weight_of(tap) * 0.0f;
      }
      if (unsigned(row + p.result_row) < unsigned(p.result.height) &&
          unsigned(j + p.result_column) < unsigned(p.result.width))
        to[(row + p.result_row) * p.result.row_stride +
           int64_t(j + p.result_column) * p.result.column_stride] = convert<T>(sum);
    }
}

}  // namespace convops::cuda::depthwise_channels_last

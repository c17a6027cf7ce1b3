// What tma_im2col_weight's host code and its kernel share.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/tensor_map.h"
#include "integers.h"

namespace convops::cuda {

// Out channels of a warpgroup, and channels of a slot: what a swizzled box is wide.
inline constexpr int kPixelChannels = map_channels(2);  // of 16 bits
// The tensor cores' sums cut off what float32 has no bits for: of so many pixels they still are far
// better than the result's rounding. More are several blocks'.
inline constexpr int kMostSummedPixels = 1 << 14;

// What a block sums: 64 out channels for each of `warpgroups`, times `slots`, 64 channels of the
// input at a tap each. Both are in shared memory for 64 pixels of grad_output at a time, a stage,
// and every pixel is loaded once for each slot.
inline constexpr int kPixelStage = 64;
inline constexpr int kPixelBoxBytes = kPixelStage * kPixelChannels * 2;
struct PixelTile {
  int warpgroups, slots;

  CONVOPS_HOST_DEVICE constexpr int out_channels() const { return warpgroups * kPixelChannels; }
  CONVOPS_HOST_DEVICE constexpr int stage_bytes() const {
    return (warpgroups + slots) * kPixelBoxBytes;
  }
  constexpr bool operator==(const PixelTile&) const = default;
};

// There is a kernel for each: with four slots, or two warpgroups for one out channel's slots, it
// was at most 1% faster. (The first of those that are as fast by estimate is taken.)
inline constexpr PixelTile kPixelTiles[] = {{2, 3}, {2, 2}, {2, 1}, {1, 3}, {1, 2}, {1, 1}};

// Groups of few channels share boxes: `merged` of them are multiplied as if they were one, and what
// an out channel has of other groups is not stored.
struct WeightPixels {
  int groups, channels, out_channels;  // of a group, that of the weight
  int merged;                          // with as many out channels as channels, else 1
  int kernel_w, taps;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  // Slots are numbered by blocks of 64 channels, then taps: the taps of a block read the same
  // pixels.
  int slots;  // of merged groups
  int out_tiles, slot_tiles, splits;
  int stages;  // of all pixels: what is split
  Divisor by_out_width, by_out_height, by_taps, by_kernel_w, by_channels;

  CONVOPS_HOST_DEVICE int tiles() const {
    return (groups + merged - 1) / merged * out_tiles * slot_tiles;
  }
  CONVOPS_HOST_DEVICE int64_t weights() const {
    return int64_t(groups) * out_channels * taps * channels;
  }
};

// Where sums go, with the strides of out channels, taps and channels: to float32 parts, one behind
// the other (weights()), or at once into a result of the tensors' type.
struct WeightSums {
  void* first;
  bool rounded;
  int64_t out_channel, tap_h, tap_w, channel;
};

struct WeightPixelsOperands {
  CUtensorMap input, grad;
  WeightSums sums;
};

// On the stream, the launch checked. A function for each type.
using SumPixels = void(const WeightPixels& gemm, const PixelTile& tile,
                       const WeightPixelsOperands& operands, void* stream);
SumPixels sum_pixels_half, sum_pixels_bfloat16;

}  // namespace convops::cuda

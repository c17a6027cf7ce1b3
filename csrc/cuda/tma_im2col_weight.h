// What tma_im2col_weight's host code and its kernel share.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/tensor_map.h"
#include "integers.h"

namespace convops::cuda {

// Out channels of a warpgroup, and channels of a slot: what a swizzled box is wide.
inline constexpr int kPixelChannels = kMapChannels;
// The tensor cores' sums cut off what float32 has no bits for: of so many pixels they still are far
// better than the result's rounding. Then they go to the part.
inline constexpr int kMostSummedPixels = 1 << 14;

// What a block sums: 64 out channels for each of `out_groups` warpgroups, times `slots` (64
// channels of the input at a tap each) for each of `slot_groups`. Both are in shared memory for
// `pixels` of grad_output at a time, a stage, and every pixel is loaded once for each slot: tiles
// are as large as registers allow, for loads from L2 are the limit.
struct PixelTile {
  int out_groups, slot_groups, slots, pixels;

  CONVOPS_HOST_DEVICE constexpr int consumers() const { return out_groups * slot_groups; }
  CONVOPS_HOST_DEVICE constexpr int out_channels() const { return out_groups * kPixelChannels; }
  CONVOPS_HOST_DEVICE constexpr int all_slots() const { return slot_groups * slots; }
  CONVOPS_HOST_DEVICE constexpr int box_bytes() const { return pixels * kPixelChannels * 2; }
  CONVOPS_HOST_DEVICE constexpr int stage_bytes() const {
    return (out_groups + all_slots()) * box_bytes();
  }
  constexpr bool operator==(const PixelTile&) const = default;
};

// There is a kernel for each. (The first of those that are as fast by estimate is taken.)
inline constexpr PixelTile kPixelTiles[] = {{2, 1, 4, 64}, {2, 1, 3, 64}, {2, 1, 2, 64},
                                            {2, 1, 1, 64}, {1, 2, 2, 64}, {1, 1, 4, 64},
                                            {1, 1, 3, 64}, {1, 1, 2, 64}, {1, 1, 1, 64}};

struct WeightPixels {
  int groups, channels, out_channels;  // of a group
  int kernel_w, taps;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  // Slots are numbered by blocks of 64 channels, then taps: the taps of a block read the same
  // pixels.
  int slots;  // of a group
  int out_tiles, slot_tiles, splits;
  int stages;  // of all pixels: what is split
  Divisor by_out_width, by_out_height, by_taps, by_kernel_w;

  CONVOPS_HOST_DEVICE int tiles() const { return groups * out_tiles * slot_tiles; }
  CONVOPS_HOST_DEVICE int64_t weights() const {
    return int64_t(groups) * out_channels * taps * channels;
  }
};

// Where sums go, with the strides of out channels, taps and channels: to float32 parts, one behind
// the other (weights()), or at once into a result of the tensors' type.
struct WeightSums {
  void* first;
  bool rounded;
  bool paired;  // two neighbouring channels are two neighbours in memory, aligned
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

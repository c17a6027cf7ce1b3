// What tma_im2col_weight's host code and its kernel share.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "algorithm.h"
#include "cuda/tensor_map.h"
#include "integers.h"

namespace convops::cuda {

// The tensor cores' sums cut off what float32 has no bits for: of so many pixels they still are far
// better than the result's rounding, or TF32's of the operands. More are several blocks'.
inline constexpr int kMostSummedPixels = 1 << 14;

// What a block sums: out channels times slots, as many channels of the input at a tap as a box is
// wide. Both are in shared memory for a stage's pixels of grad_output at a time, a box of them for
// each, and every pixel is loaded once for each slot. Boxes are square: 64 channels of 64 pixels of
// 16 bits, 32 of 32 of float32.
constexpr int box_side(int element_bytes) { return map_channels(element_bytes); }
struct PixelTile {
  int out_boxes, slots, side;

  CONVOPS_HOST_DEVICE constexpr int out_channels() const { return out_boxes * side; }
  CONVOPS_HOST_DEVICE constexpr int box_bytes() const { return side * kMapRowBytes; }
  CONVOPS_HOST_DEVICE constexpr int stage_bytes() const {
    return (out_boxes + slots) * box_bytes();
  }
  constexpr bool operator==(const PixelTile&) const = default;
};

// There is a kernel for each. The first of those that are as fast by estimate is taken. Of 16 bits
// a warpgroup has an out box: with four slots, or two warpgroups for one out channel's slots, it
// was at most 1% faster.
inline constexpr PixelTile kHalfTiles[] = {{2, 3, 64}, {2, 2, 64}, {2, 1, 64},
                                           {1, 3, 64}, {1, 2, 64}, {1, 1, 64}};
// Of float32 two warpgroups have two or four slots each, or three two. (Of two parts, no more sums
// than registers: there are promoted ones, too.)
inline constexpr PixelTile kFloatTiles[] = {
    {4, 8, 32}, {4, 6, 32}, {4, 4, 32}, {2, 8, 32}, {2, 6, 32}};
constexpr int slot_warpgroups(const PixelTile& tile) { return tile.slots == 6 ? 3 : 2; }
constexpr bool float_tile_serves(const PixelTile& tile, int products) {
  return products == 1 || tile.out_boxes * tile.slots <= 16;
}

// Groups of few channels share boxes: `merged` of them are multiplied as if they were one, and what
// an out channel has of other groups is not stored.
struct WeightPixels {
  int groups, channels, out_channels;  // of a group, that of the weight
  int merged;                          // with as many out channels as channels, else 1
  int kernel_w, taps;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  // Slots are numbered by blocks of channels, then taps: the taps of a block read the same pixels.
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

// On the stream, the launch checked. A function for each type, and of float32 precision.
using SumPixels = void(const WeightPixels& gemm, const PixelTile& tile,
                       const WeightPixelsOperands& operands, void* stream);
SumPixels sum_pixels_half, sum_pixels_bfloat16, sum_pixels_tf32, sum_pixels_ieee;

// Sums results of float32 that are not finite again, by their definition.
void sum_again(const ConvProblem& problem, const Operands& operands, const Execution& execution);

}  // namespace convops::cuda

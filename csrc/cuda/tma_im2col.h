// What the kernel of tma_im2col computes: plain data, made on the host and passed by value.
//
//   result(pixel, channel)  =  Σ over taps, k:  source(pixel's window + tap, k) · weight(tap, k)
//
// Pixels are those of a *phase* of the result, every stride-th of an axis, row by row and image by
// image. Forward has one phase: all pixels. Backward-input of stride s has s · s, each a
// convolution of grad_output with a part of the taps, at stride 1. So no dilated tensor is made,
// and no zero of it multiplied.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "algorithm.h"
#include "integers.h"

namespace convops::cuda {

inline constexpr int kMostPhases = 16;

// A block's tile: 64 pixels a warpgroup times so many channels of the result. Where there are two
// teams of warpgroups they take tiles by turns: one multiplies while the other stores.
struct PixelShape {
  int warpgroups, channels, teams;

  constexpr int pixels() const { return 64 * warpgroups; }
};
inline constexpr PixelShape kPixelShapes[] = {{2, 64, 2}, {3, 64, 2}, {2, 128, 2}, {3, 128, 1}};

// Of float32: parts of a number that are multiplied.
inline int float_parts(const ConvProblem& p) { return p.precision == Precision::kTf32 ? 1 : 2; }
inline constexpr PixelShape kFloatPixelShapes[] = {
    {1, 64, 2}, {3, 64, 1}, {2, 128, 1}, {3, 128, 1}};
// Of float32 a warpgroup of producers hands registers on, beyond kProducerRegisters.
inline constexpr int kProducerRegisters = 32;
constexpr int consumer_registers(const PixelShape& shape) {
  const int consumers = 128 * shape.warpgroups * shape.teams, threads = consumers + 128;
  return (65536 / threads / 8 * 8 * threads - 128 * kProducerRegisters) / consumers / 8 * 8;
}
// Whether the registers are enough: for sums, of two parts twice, operands of two stages,
// addresses.
constexpr bool float_shape_serves(const PixelShape& shape, int parts) {
  return shape.channels / 2 * parts + 32 * parts + 32 <= consumer_registers(shape);
}
// A packed weight's sums are in multiples of this.
inline constexpr int kPackedFloatSums = 16;

struct PixelPhase {
  Divisor by_columns, by_pixels;  // of a row's results, and an image's
  int pixels;                     // of all images
  int first_tile;
  int result_h, result_w;  // the first
  int begin_h, begin_w;    // where its window begins
  int taps_h, taps_w;      // of a window
  int weight_h, weight_w;  // the first one's place in the weight
};

// Groups of few channels are multiplied 64 channels at a time, as if those were one group, by a
// weight with zeros between them (pack_groups).
struct PixelGemm {
  int channels, sums;                               // of the result, and what it sums over
  bool merged;                                      // source channels: those of the tile's result
  int phase_count, tiles;                           // tiles: of all phases
  Divisor by_channel_tiles;                         // of a phase's pixels
  int result_step_h, result_step_w;                 // from a phase's result to the next
  int step_h, step_w;                               // from its window to the next
  int shift_h, shift_w;                             // from a window's tap to the next
  int weight_step_h, weight_step_w;                 // the same in the weight
  int64_t image_stride, row_stride, column_stride;  // of the result
  int64_t bias_stride;
  PixelPhase phases[kMostPhases];
};

struct PixelOperands {
  const void *source, *weight, *bias;  // bias: nullptr without
  void* result;
  CUtensorMap weight_map, source_maps[kMostPhases];
};

// Packs a weight of groups that share 64 channels, [out channel][tap][64], zeros for other groups'.
void pack_groups(const ConvProblem& problem, const void* weight, void* packed, void* stream);

// The same of float32, dense or of groups: TF32 parts, one after the other, each [channel of the
// result][tap][sums], sums rounded up and in the order in which the kernel multiplies them.
void pack_floats(const ConvProblem& problem, const PixelGemm& gemm, const void* weight,
                 void* packed, void* stream);

// Launches the kernel of kPixelShapes[shape], or kFloatPixelShapes[shape].
void multiply_pixels(const ConvProblem& problem, const PixelGemm& gemm, int shape,
                     const PixelOperands& operands, const Execution& execution);
void multiply_float_pixels(const ConvProblem& problem, const PixelGemm& gemm, int shape,
                           const PixelOperands& operands, const Execution& execution);

}  // namespace convops::cuda

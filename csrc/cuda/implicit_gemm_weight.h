// What the kernels of implicit_gemm_weight compute and how it is cut into blocks: plain data, made
// once on the host and passed to the kernels by value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/implicit_gemm.h"

namespace convops::cuda {

// Pixels of a row of grad_output that are multiplied at once, a stage: six steps of 16, after which
// sums leave the tensor cores (promoted_steps).
inline constexpr int kStagePixels = 96;
// Floats of such a row as it is copied: what lies before it in its 16 bytes, too; and a consumer's
// 8 rows × 4 pairs lie in different banks.
inline constexpr int kRawPitch = kStagePixels + 8;
static_assert(kRawPitch % 32 == 8 && kRawPitch >= kStagePixels + kVector);
inline constexpr int kReach = 8;        // columns of the input by which a tile's taps reach further
inline constexpr int kMaxRowKinds = 4;  // of rows, by where they begin in 16 bytes

// The taps that a block sums, `kernel_h × kernel_w` of them, for `octets` · 8 channels in each
// warpgroup. Its warpgroups share channels and have 64 out channels each (`wide`), or share out
// channels and have `octets` each.
struct WeightTile {
  int kernel_h, kernel_w, octets;
  bool wide;

  CONVOPS_HOST_DEVICE constexpr int out_channels() const { return wide ? 128 : 64; }
  CONVOPS_HOST_DEVICE constexpr int channels() const { return (wide ? 1 : 2) * octets * kOctet; }
  constexpr bool operator==(const WeightTile&) const = default;
};

// There are kernels for these. Sums and totals, octets · 4 · kernel_h · kernel_w floats each, are
// in a thread's registers; an instruction has kernel_h · octets · 8 columns.
inline constexpr WeightTile kWeightTiles[] = {{3, 3, 2, true}, {5, 3, 1, true}, {5, 3, 1, false}};

struct WeightGemm {
  // Sizes of a group, and of the tensors; strides in floats.
  int groups, channels, out_channels;
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t image_stride, channel_stride, row_stride;  // of the input
  // Blocks of channels, out channels and taps; segments of a row; parts that K is split into.
  int channel_tiles, out_channel_tiles, taps_h, taps_w, segments, splits;
  int64_t rows;  // of grad_output in all segments of all images: what is split
  int row_kinds;
  int row_begins[kMaxRowKinds];  // floats before a row of the kind in its box
  float smallest;                // GemmProblem::smallest

  CONVOPS_HOST_DEVICE int tiles() const {
    return channel_tiles * out_channel_tiles * taps_h * taps_w * groups;
  }
  CONVOPS_HOST_DEVICE int64_t weights() const {
    return int64_t(groups) * out_channels * channels * kernel_h * kernel_w;
  }
};

struct WeightOperands {
  const float* input;
  const float* grad;
  float* partial;                  // [split][weight]
  uint8_t* bad_blocks;             // not 0: fp16 cannot hold what the block reads
  CUtensorMap maps[kMaxRowKinds];  // of grad_output
};

// On the stream, each launch checked: zeros `bad_blocks`, sums all parts, and again by fused
// multiply-adds those of bad blocks. Grad_output's strides are for the latter.
void sum_weight_parts_sm90(const WeightGemm& gemm, const WeightTile& tile, int products,
                           const WeightOperands& operands, const Tensor4& grad, void* stream);

}  // namespace convops::cuda

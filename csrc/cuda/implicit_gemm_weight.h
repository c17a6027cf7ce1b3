// What the kernels of implicit_gemm_weight compute and how it is cut into blocks: plain data, made
// once on the host and passed to the kernels by value.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "cuda/implicit_gemm.h"

namespace convops::cuda {

// Pixels of a row of grad_output that are multiplied at once, a stage: six steps of 16, after which
// sums leave the tensor cores (promoted_steps).
inline constexpr int kStagePixels = 96;
inline constexpr int kStepPixels = 16;
inline constexpr int kReach = 8;  // columns of the input by which a tile's taps reach further
// From a row to the next in memory: elements of grad_output, which begin with what lies before the
// row in its 16 bytes, and cells of the input. Of grad_output the 4 rows × 4 pairs that half a warp
// reads at once (of 16 bits 8 rows) lie in different banks, as the pitch is an odd multiple of 8.
constexpr int weight_pitch(int pixels) { return pixels + kReach; }
inline constexpr int kMostPitch = weight_pitch(kStagePixels);
static_assert(kReach >= vector_elements(2) && kReach % 16 == 8 && kStepPixels % 16 == 0);
// Of 16 bits the input comes in rows, too, of which each box begins with up to a vector before the
// row; the 8 rows of a matrix lie in different banks.
constexpr int weight_raw_pitch(int pitch) { return pitch + 16; }
inline constexpr int kMaxRing = 16;  // slots of rows of the input
// Of 16 bits, of all slots: three stages of grad_output have room beside them.
inline constexpr int kHalfCellBytes = 112 * 1024;

// Rows of a tensor begin at places in 16 bytes that are of kinds: a channel's, times a row's. Each
// kind has a map, from the last multiple of 16 bytes before its first row on.
inline constexpr int kMaxRowKinds = 16;
struct RowKinds {
  int channels_log, rows_log;
  int begins[kMaxRowKinds];  // elements from there to a row: of [channel's kind][row's kind]

  CONVOPS_HOST_DEVICE int channels() const { return 1 << channels_log; }
  CONVOPS_HOST_DEVICE int rows() const { return 1 << rows_log; }
  CONVOPS_HOST_DEVICE int kind(int channel, int row) const {
    return ((channel & (channels() - 1)) << rows_log) + (row & (rows() - 1));
  }
};
// Grad_output's out channels come in boxes of rows, or of 16 bits, where channels are neighbours
// (channels_last), in boxes of 64 channels, whose 16 bytes are swizzled.
inline constexpr int kBoxChannels = 64;
// The input's, of 16 bits, in boxes of rows, in octets of neighbouring channels, or one by one.
enum class InputWay { kBoxes, kOctets, kElements };

// The taps that a block sums, `kernel_h × kernel_w` of them, for `octets` · 8 channels in each
// warpgroup. Its warpgroups share channels and have 64 out channels each (`wide`), or share out
// channels and have `octets` each. In place of rows of taps there may be `layers` of channels. Rows
// may share a stage, and have strides, where that is `narrow` or has layers.
struct WeightTile {
  int kernel_h, kernel_w, octets, layers;
  bool wide, narrow;

  // That a slot of the ring holds of a row, and that are summed.
  CONVOPS_HOST_DEVICE constexpr int slot_channels() const {
    return (wide ? 1 : 2) * octets * kOctet;
  }
  CONVOPS_HOST_DEVICE constexpr int channels() const { return layers * slot_channels(); }
  CONVOPS_HOST_DEVICE constexpr int out_channels() const { return wide ? 128 : 64; }
  // Slots that an instruction multiplies, rows of taps or layers; those that are stored once more
  // behind the ring's last, so that any window of slots which follow each other do so in memory
  // (layers are all new in every stage: their windows have places of their own); and whole ones in
  // shared memory, for two windows or for two rows more than one.
  constexpr int window() const { return kernel_h * layers; }
  constexpr int mirrored() const { return layers > 1 ? 0 : window() - 1; }
  // (Of 16 bits as many as kHalfCellBytes have room for.)
  constexpr int slots(bool half) const {
    if (half)
      return std::min(kMaxRing + mirrored(), kHalfCellBytes / (slot_channels() * kMostPitch * 2));
    return layers > 1 ? 2 * window() : window() + 2 + mirrored();
  }
  constexpr bool operator==(const WeightTile&) const = default;
};

// There are kernels for these. Sums and totals, octets · 4 · kernel_h · layers · kernel_w floats
// each, are in a thread's registers; an instruction has kernel_h · layers · octets · 8 columns.
inline constexpr WeightTile kFloatWeightTiles[] = {
    {3, 3, 2, 1, true, false}, {5, 3, 1, 1, true, false}, {5, 3, 1, 1, false, false},
    {3, 3, 2, 1, true, true},  {5, 3, 1, 1, false, true}, {1, 1, 2, 4, true, false}};
// Of 16 bits there are no totals, and twice as many sums. (The first of those that are as fast by
// estimate is taken.)
inline constexpr WeightTile kHalfWeightTiles[] = {
    {5, 3, 2, 1, true, false}, {5, 3, 2, 1, false, false}, {3, 3, 2, 1, true, false},
    {3, 3, 4, 1, true, false}, {3, 3, 4, 1, false, false}, {3, 3, 4, 1, true, true},
    {3, 3, 4, 1, false, true}, {5, 3, 2, 1, false, true},  {1, 1, 2, 4, true, false}};

// A stride s makes s phases of rows and of columns: channel k of the sum is (channel, phase), row y
// of phase i is row s · y + i - padding of the input, and its tap t is row s · t + i of the kernel,
// where there is one.
struct WeightGemm {
  // Sizes of a group, `channels` of the sum, and of the tensors; strides in elements.
  int groups, channels, out_channels;
  int height, width, out_height, out_width;
  int kernel_h, kernel_w;  // of the weight
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int phases_h, phases_w;          // that have a tap
  Divisor by_phases, by_phases_w;  // of both together, and the columns'
  int64_t image_stride, channel_stride, row_stride, column_stride;  // of the input
  // Blocks of channels, out channels and taps; segments of a row; parts that K is split into.
  int channel_tiles, out_channel_tiles, taps_h, taps_w, images, segments, splits;
  int64_t rows;  // of grad_output in all segments of all images: what is split
  // Rows narrower than half a stage share it. Slots are as many as there is memory for.
  int pitch, stage_rows, ring;
  // The out channels of a tile, and octets of the input's, are ordered by kinds.
  RowKinds grad_kinds, input_kinds;
  InputWay input_way;
  bool grad_last;  // boxes of channels
  bool is_astray;  // no boxes: all blocks are summed by fused multiply-adds
  float smallest;  // GemmProblem::smallest

  CONVOPS_HOST_DEVICE int tiles() const {
    return channel_tiles * out_channel_tiles * taps_h * taps_w * groups;
  }
  CONVOPS_HOST_DEVICE int phases() const { return phases_h * phases_w; }
  CONVOPS_HOST_DEVICE int group_channels() const { return by_phases.quotient(channels); }
  CONVOPS_HOST_DEVICE int64_t weights() const {
    return int64_t(groups) * out_channels * group_channels() * kernel_h * kernel_w;
  }
  // Where the sums of channel k for all taps are in a part, and of one of them; -1 where the weight
  // has no such elements.
  struct Taps {
    int64_t first;
    int phase_h, phase_w;
  };
  CONVOPS_HOST_DEVICE Taps taps(int group, int out_channel, int k) const {
    const int line = by_phases.quotient(k), phase = k - line * phases();
    const int channel = sort_kinds(line, input_kinds.channels_log, kOctetLog);
    const int phase_h = by_phases_w.quotient(phase);
    const bool exists = out_channel < out_channels && channel < group_channels();
    const int64_t row = int64_t(group * out_channels + out_channel) * group_channels() + channel;
    return {exists ? row * kernel_h * kernel_w : -1, phase_h, phase - phase_h * phases_w};
  }
  CONVOPS_HOST_DEVICE int64_t weight(const Taps& taps, int tap_h, int tap_w) const {
    const int h = tap_h * stride_h + taps.phase_h, w = tap_w * stride_w + taps.phase_w;
    const bool exists = taps.first >= 0 && h < kernel_h && w < kernel_w;
    return exists ? taps.first + h * kernel_w + w : -1;
  }
};

struct WeightOperands {
  const void* input;
  const void* grad;
  float* partial;       // [split][weight]
  uint8_t* bad_blocks;  // not 0: to be summed again (fp16 cannot hold what it reads, NaN, Inf)
  CUtensorMap grad_maps[kMaxRowKinds];
  CUtensorMap input_maps[kMaxRowKinds];  // of 16 bits
};

// On the stream, each launch checked: zeros `bad_blocks`, sums all parts, and again by fused
// multiply-adds those of bad blocks. Grad_output's strides are for the latter. A function for each
// type.
using SumWeightParts = void(const WeightGemm& gemm, const WeightTile& tile, int products,
                            const WeightOperands& operands, const Tensor4& grad, void* stream);
SumWeightParts sum_weight_parts_float, sum_weight_parts_half, sum_weight_parts_bfloat16;

}  // namespace convops::cuda

// depthwise_large on FMA units: float32, plain IEEE.
#pragma once

#include "cuda/depthwise_large.cuh"

namespace convops::cuda::large {

// A thread has kColumns neighbouring sums of one row. For four columns of the filter it reads four
// new elements of the source and four of the filter, 16 bytes each, and makes 4 · kColumns FMAs of
// registers. Lanes lie along rows, an odd number of 16 bytes apart: no two of the eight lanes that
// shared memory serves at once meet in a bank.
template <int kColumns_>
struct FmaCore {
  using T = float;
  using Element = float;
  static constexpr int kColumns = kColumns_;
  static constexpr int kBlocksPerProcessor = min_blocks(kColumns > 16 ? 2 : 3);
  static constexpr int kFour = 4;
  static constexpr int kUnroll = 8;  // the width of a filter of 31 at once
  static constexpr int kWindow = kColumns + kFour;
  static_assert(kColumns % kFour == 0);

  float sums[kColumns] = {};
  int group, row, first_column;  // of the thread; no group: nothing to do

  static __device__ void store_filter(float* line, int column, float value) {
    line[column] = value;
  }

  __device__ explicit FmaCore(const Correlation& p) {
    const int segments = (p.tile_columns + kColumns - 1) / kColumns;
    const int segment = Divider(p.rows())(threadIdx.x);  // of all groups
    row = int(threadIdx.x) - segment * p.rows();
    group = Divider(segments)(segment);
    first_column = (segment - group * segments) * kColumns;
    if (group >= p.groups()) group = -1;
  }

  __device__ __forceinline__ void add(const Correlation& p, const Stage& stage, const Place&,
                                      const float* shared) {
    const Divider by_splits(p.splits);
    const int group_item = by_splits(group), part = group - group_item * p.splits;
    const int item = p.sum ? group_item : Divider(p.tile_rows)(row);
    const int r = p.sum ? row : row - item * p.tile_rows;
    if (group < 0 || item >= stage.items) return;
    const int i_begin = by_splits(stage.filter_rows * part);
    const int i_end = by_splits(stage.filter_rows * (part + 1));
    const int height = stage.row_end - stage.row;
    const int fours = (stage.filter_columns + kFour - 1) / kFour;
    const float* lines = shared + p.source_pitch + item * p.source_item;
    const float* filter = shared + p.filter_begin + (p.sum ? item : 0) * p.filter_item;
    int y = r + stage.source_row - stage.row + i_begin;
#pragma unroll 1
    for (int i = i_begin; i < i_end; ++i, ++y) {
      const float* line = unsigned(y) < unsigned(height) ? lines + y * p.source_pitch : shared;
      const auto x = reinterpret_cast<const float4*>(line + first_column);
      const auto w = reinterpret_cast<const float4*>(filter + i * p.filter_pitch);
#pragma unroll 1
      for (int k = 0; k < fours; k += kUnroll) add_line(x + k, w + k, fours - k);
    }
  }

  __device__ __forceinline__ void store_sums(const Correlation& p, float* to) const {
    if (group < 0) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (first_column + c < p.tile_columns)
        to[(group * p.rows() + row) * p.tile_columns + first_column + c] = sums[c];
  }

 private:
  // The window is a ring: four of its elements leave as four others come.
  static __device__ __forceinline__ void read(float (&window)[kWindow], int at, const float4* x) {
    const float4 four = *x;
    window[at] = four.x, window[at + 1] = four.y, window[at + 2] = four.z, window[at + 3] = four.w;
  }

  __device__ __forceinline__ void add_line(const float4* x, const float4* w, int fours) {
    float window[kWindow];
#pragma unroll
    for (int c = 0; c < kColumns; c += kFour) read(window, c, x + c / kFour);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (k >= fours) break;
      read(window, (kFour * k + kColumns) % kWindow, x + k + kColumns / kFour);
      const float4 four = w[k];
      const float weights[kFour] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < kFour; ++j)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          sums[c] += weights[j] * window[(kFour * k + j + c) % kWindow];
    }
  }
};

}  // namespace convops::cuda::large

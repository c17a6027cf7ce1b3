// depthwise_large on tensor cores: float16 and bfloat16, sums in float32.
#pragma once

#include "cuda/depthwise_large.cuh"
#include "cuda/ptx/mma.cuh"

namespace convops::cuda::large {

// For one row i of the filter, a row of results is the row of the source under it times the banded
// matrix B[s][q] = filter[i, s - q]. A warp has 16 rows of results and kTiles · 8 columns. Blocks
// of 8×8 on one diagonal of B are the same, so kDiagonals registers hold all of it: tile j is the
// sum over e of block j + e of the source times diagonal e, two of them an mma of depth 16.
//
// In shared memory each element of the filter stands beside its right neighbour, as a 32-bit word
// of its own, so that the pairs along a column of B are words wherever they begin.
template <typename T_, int kTiles_, int kSteps_>
struct MmaCore {
  using T = T_;
  using Element = T_;
  static constexpr int kTiles = kTiles_, kSteps = kSteps_;
  static constexpr int kDiagonals = 2 * kSteps;
  static constexpr int kSide = 8;   // of a block
  static constexpr int kRows = 16;  // of a warp
  static constexpr int kColumns = kSide * kTiles;
  static constexpr int kMaxFilter = kSide * kDiagonals - kSide + 1;  // columns on the diagonals
  static constexpr int kFilterPitch = 2 * kSide * (kDiagonals + 1);  // zeros on both sides
  static constexpr int kPairs = (kTiles + kDiagonals) / 2;           // of blocks of the source
  static constexpr int kBlocksPerProcessor = min_blocks(kTiles > 4                 ? 2
                                                        : kTiles > 2 || kSteps > 3 ? 3
                                                                                   : 4);
  static_assert(kTiles * kSteps <= 32, "products of a row are the bits of a mask");

  float sums[kTiles][4] = {};
  int group, first_row;  // of the warp; no group: nothing to do

  static __device__ void store_filter(T* line, int column, T value) {
    line[2 * (column + kSide)] = value;
    line[2 * (column + kSide) - 1] = value;
  }

  __device__ explicit MmaCore(const Correlation& p) {
    const int tiles = (p.rows() + kRows - 1) / kRows, warp = threadIdx.x / kWarp;
    group = Divider(tiles)(warp);
    first_row = (warp - group * tiles) * kRows;
    if (group >= p.groups()) group = -1;
  }

  __device__ __forceinline__ void add(const Correlation& p, const Stage& stage, const Place& place,
                                      const T* shared) {
    const int lane = threadIdx.x % kWarp;
    const Divider by_splits(p.splits);
    const int part = group - by_splits(group) * p.splits;
    const int group_item = p.sum ? by_splits(group) : 0;
    if (group < 0 || group_item >= stage.items) return;

    // The row whose address this lane gives to ldmatrix.
    const int m = first_row + lane % kRows;
    const int item = p.sum ? group_item : Divider(p.tile_rows)(m);
    const int r = p.sum ? m : m - item * p.tile_rows;
    const int height = m < p.rows() ? stage.row_end - stage.row : 0;
    const auto zeros = uint32_t(__cvta_generic_to_shared(shared)) + lane / kRows * kBlockBytes;
    const uint32_t lines = zeros + (p.source_pitch + item * p.source_item) * int(sizeof(T));
    const int offset = r + stage.source_row - stage.row;

    const int i_end = by_splits(stage.filter_rows * (part + 1));
    int i = by_splits(stage.filter_rows * part);
    const int n = lane / 4, k = lane % 4 * 2;  // of this lane's pair in a block of B
    const auto words = reinterpret_cast<const uint32_t*>(shared + p.filter_begin) +
                       (group_item * p.filter_item + i * p.filter_pitch) / 2 + kSide + k - n;
    const unsigned products = mask_of_products(stage, place), loads = mask_of_loads(stage);

    uint32_t a[kPairs][4] = {};  // blocks without an element of the source stay zero
#pragma unroll 1
    for (const uint32_t* w = words; i < i_end; ++i, w += p.filter_pitch / 2) {
      const int y = offset + i;
      const uint32_t line =
          unsigned(y) < unsigned(height) ? lines + y * p.source_pitch * int(sizeof(T)) : zeros;
      uint32_t b[kDiagonals];
#pragma unroll
      for (int e = 0; e < kDiagonals; ++e) b[e] = w[kSide * e];
#pragma unroll
      for (int u = 0; u < kPairs; ++u)
        if (loads >> u & 1) ptx::load_matrices(a[u], line + 2 * u * kBlockBytes);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
          const int first = j + 2 * t, second = first + 1;
          if (products >> (j * kSteps + t) & 1)
            ptx::mma<T>(sums[j], a[first / 2][first % 2 * 2], a[first / 2][first % 2 * 2 + 1],
                        a[second / 2][second % 2 * 2], a[second / 2][second % 2 * 2 + 1], b[2 * t],
                        b[2 * t + 1]);
        }
    }
  }

  __device__ __forceinline__ void store_sums(const Correlation& p, float* to) const {
    if (group < 0) return;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = first_row + lane / 4 + c / 2 * kSide;
        const int column = j * kSide + lane % 4 * 2 + c % 2;
        if (row < p.rows() && column < p.tile_columns)
          to[(group * p.rows() + row) * p.tile_columns + column] = sums[j][c];
      }
  }

 private:
  static constexpr int kBlockBytes = kSide * sizeof(T);

  // Which blocks of a row of the source, and so which products, have something other than zeros.
  static __device__ unsigned mask_of_loads(const Stage& stage) {
    const int first = (stage.column - stage.source_column) / kSide;
    const int end = (stage.column_end - stage.source_column + kSide - 1) / kSide;
    unsigned mask = 0;
#pragma unroll
    for (int u = 0; u < kPairs; ++u)
      if (2 * u + 1 >= first && 2 * u < end) mask |= 1u << u;
    return mask;
  }
  static __device__ unsigned mask_of_products(const Stage& stage, const Place& place) {
    const int first = (stage.column - stage.source_column) / kSide;
    const int end = (stage.column_end - stage.source_column + kSide - 1) / kSide;
    const int tiles = (place.columns + kSide - 1) / kSide;
    const int diagonals = (stage.filter_columns + 2 * kSide - 2) / kSide;
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int t = 0; t < kSteps; ++t)
        if (j < tiles && 2 * t < diagonals && j + 2 * t + 1 >= first && j + 2 * t < end)
          mask |= 1u << (j * kSteps + t);
    return mask;
  }
};

}  // namespace convops::cuda::large

// What the kernel of grouped convolution (grouped.cuh) and its launcher share: sizes, the geometry
// of taps, the arithmetic.
#pragma once

#include <cstdint>

#include "cuda/tf32_parts.cuh"
#include "problem.h"

namespace convops::cuda::grouped {

constexpr int kWarp = 32;
constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kOctet = 8;               // channels of an instruction, on either side
constexpr int kQuad = 4;                // lanes of a strip
constexpr int kCells = 4;               // of a strip: one vector store, two instructions
constexpr int kStrips = kWarp / kQuad;  // of a warp
constexpr int kMmas = kCells / 2;       // instructions of a strip
constexpr int kStages = 3;              // one is read, the loads of the others are under way

// The taps along a side (kernels are square). Forward, a cell is a result and moves on by kStride
// sources. Backward, it is the kStride results that begin at a multiple of kStride, one for each
// phase, and moves on by one source: inserted zeros are never met. kParity: padding modulo kStride.
// Backward-input of stride 1 is kForward with the weight turned.
template <Direction kDirection, int kSize_, int kStride, int kParity>
struct Taps {
  static constexpr bool kForward = kDirection == Direction::kForward;
  static constexpr int kSize = kSize_;
  static constexpr int kPhases = kForward ? 1 : kStride;   // results of a cell
  static constexpr int kSources = kForward ? kStride : 1;  // from a cell to the next

  CONVOPS_HOST_DEVICE static constexpr int phase(int tap) {
    return kForward ? 0 : (tap - kParity + kStride * kSize) % kStride;
  }
  // The source of a tap, counted from that of the cell's first tap. Backward: result = kStride ·
  // source + tap - padding.
  CONVOPS_HOST_DEVICE static constexpr int position(int tap) {
    return kForward ? tap : (phase(tap) + kParity - tap) / kStride - kFirst;
  }
  static constexpr int kFirst = kForward ? 0 : (kParity + 1 - kSize) / kStride;
  static constexpr int kReach = kForward ? kSize : 1 - kFirst + (kParity + kPhases - 1) / kStride;

  // A step down takes kSources rows; results are complete kDelay steps after their first row.
  CONVOPS_HOST_DEVICE static constexpr int source(int tap) { return position(tap) % kSources; }
  CONVOPS_HOST_DEVICE static constexpr int delay(int tap) { return position(tap) / kSources; }
  static constexpr int kDelay = (kReach - 1) / kSources;
  static constexpr int kColumns = (kCells - 1) * kSources + kReach;  // of a strip
  // The column that vectors begin at, aligned with the usual padding, and their number.
  static constexpr int kAligned = kForward ? kSize / 2 : -kFirst;
  static constexpr int kVectors = (kColumns - kAligned) / kCells;
  // Whether columns before and behind the vectors are read as well: those of the next strips.
  static constexpr int kEnd = kAligned + kVectors * kCells;
  static constexpr bool kBefore = kAligned > 0, kBehind = kColumns > kEnd;
  static_assert(kAligned <= 1 && kColumns <= kEnd + 1);
};

// What the kernel needs to know. Strides in elements; next_...: in bytes, for pointers that move.
struct Grouped {
  int64_t source_image, source_channel, source_row;
  int64_t next_octet, next_row;  // from a step of a row to the next; from the last to the next row
  int64_t next_source;           // added behind the last row: to the next image's first
  int64_t result_image, result_channel, result_row;
  int64_t next_cell, next_result;  // the same of rows of cells
  int source_height, source_width, result_height, result_width;
  int origin_h, origin_w;                        // the first source of cell 0
  int end_row;                                   // behind the last that an image's cells need
  int source_channels, result_channels, groups;  // channels of a group
  int merged;                                    // groups that share an instruction
  int64_t weight_first, weight_group, weight_result, weight_source, weight_row, weight_column;
  int64_t bias_stride;
  int strips, cells_h, rows;         // strips of a row; rows of cells of an image, of a band
  int all_rows, items;               // cells_h · images; strips · bands
  int steps;                         // octets of source channels
  int source_vector, result_vector;  // elements that may be moved at once: 4, 2 or 1
  bool skips_outside;  // what is outside of the source is not multiplied by the weight
};

}  // namespace convops::cuda::grouped

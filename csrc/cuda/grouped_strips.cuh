// Grouped convolution: where a thread's strip lies, and how its columns come from the source to the
// operands of the instruction.
#pragma once

#include "cuda/grouped_taps.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/thread.cuh"

namespace convops::cuda::grouped {

// The channels of a block: of the merged groups, and the first of its tiles among the results'.
struct Place {
  int first_group, source_channels, result_channels, first_channel;

  __device__ __forceinline__ Place(const Grouped& g, int tiles) {
    const int channels = tiles * kOctet;  // of a block
    const int blocks = (g.merged * g.result_channels + channels - 1) / channels;
    first_group = blockIdx.y / blocks * g.merged;
    const int groups = min(g.merged, g.groups - first_group);
    source_channels = groups * g.source_channels;
    result_channels = groups * g.result_channels;
    first_channel = blockIdx.y % blocks * channels;
  }
};

// What a thread's strip walks down: a band of the images' rows of cells on top of each other. Of an
// image that it enters, kDelay steps come before the first row is complete.
template <typename Taps>
struct Band {
  int strip, image, cell;  // the first row's
  int steps;

  __device__ __forceinline__ Band(const Grouped& g, int thread) {
    const int item = (blockIdx.x * kThreads + thread) / kQuad;
    strip = item % g.strips;
    const int first = item / g.strips * g.rows;
    const int rows = item < g.items ? min(g.rows, g.all_rows - first) : 0;
    image = rows > 0 ? first / g.cells_h : 0;
    cell = rows > 0 ? first % g.cells_h : 0;
    steps = rows > 0 ? rows + ((cell + rows - 1) / g.cells_h + 1) * Taps::kDelay : 0;
  }
  __device__ __forceinline__ int first_column(const Grouped& g) const {
    return strip * kCells * Taps::kSources + g.origin_w;
  }
};

// Without the shift of an offset in elements, which would cost an instruction for either half.
__device__ __forceinline__ void move(float*& pointer, int64_t bytes) {
  pointer = reinterpret_cast<float*>(reinterpret_cast<char*>(pointer) + bytes);
}
__device__ __forceinline__ void move(const float*& pointer, int64_t bytes) {
  pointer = reinterpret_cast<const float*>(reinterpret_cast<const char*>(pointer) + bytes);
}
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// What a warp has in shared memory of one step, in bytes: the columns of its strips, two halves of
// four channels each. A strip's column before or behind its vectors is its neighbour's, unless that
// one is of another warp or row: then it has a copy of its own.
template <typename Taps>
struct Stage {
  static constexpr int kFloat = sizeof(float);
  static constexpr int kCellBytes = kCells * kFloat;
  // Channels this far apart: the vectors of a quarter of a warp are in different banks.
  static constexpr int kPitch = kStrips * kCellBytes + 8 * kFloat;
  static constexpr int kVector = kQuad * kPitch;  // from a vector of a strip to its next
  static constexpr int kCopies = Taps::kVectors * kVector;
  static constexpr int kHalf = kCopies + 2 * kWarp * kFloat;
  static constexpr int kBytes = 2 * kHalf;
};
template <typename Taps>
constexpr int kRingBytes = kStages * Stage<Taps>::kBytes;  // of a warp

// What addresses are made of is computed once: at every step it costs ten instructions. The columns
// of stride 2 leave no registers for that.
template <typename Taps>
constexpr bool kKeeps = Taps::kSources == 1;

// Where the columns of a thread's strip are in a half of a stage.
template <typename Taps>
struct Seat {
  int vector, before, behind;
  bool copies_before, copies_behind;

  __device__ __forceinline__ Seat(bool row_begins, bool row_ends) {
    using S = Stage<Taps>;
    const int lane = threadIdx.x % kWarp, copy = S::kCopies + lane * S::kFloat;
    vector = lane % kQuad * S::kPitch + lane / kQuad * S::kCellBytes;
    copies_before = Taps::kBefore && (row_begins || lane < kQuad);
    copies_behind = Taps::kBehind && (row_ends || lane >= kWarp - kQuad);
    before = copies_before ? copy : vector + (Taps::kVectors - 1) * S::kVector - S::kFloat;
    behind = copies_behind ? copy + kWarp * S::kFloat : vector + S::kCellBytes;
    if constexpr (kKeeps<Taps>) ptx::keep(vector), ptx::keep(before), ptx::keep(behind);
  }
};

// The strip of a thread: where the next step's columns are.
template <typename Taps>
struct Strip {
  const float* next;  // column 0 of channel c of the step
  int row, octet;
  int rows;         // that are left to be loaded
  uint32_t inside;  // a bit for each column within the source

  template <int kCount>
  __device__ __forceinline__ void copy_columns(const Grouped& g, int channels, bool needed,
                                               const Seat<Taps>& seat, char* stage) const {
    constexpr int kLast = Taps::kColumns - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half, stage += Stage<Taps>::kHalf) {
      const float* columns = next + half * kQuad * g.source_channel;
      const uint32_t bits = needed && octet * kOctet + half * kQuad < channels ? inside : 0;
#pragma unroll
      for (int i = 0; i < Taps::kVectors * kCells; i += kCount) {
        char* const to = stage + seat.vector + i / kCells * Stage<Taps>::kVector +
                         i % kCells * Stage<Taps>::kFloat;
        // By way of L1, where other warps find the columns before and behind.
        ptx::copy_bytes<4 * kCount>(shared_address(to), columns + Taps::kAligned + i,
                                    (bits & 1u << (Taps::kAligned + i)) != 0);
      }
      if (seat.copies_before)
        ptx::copy_bytes_or_zeros<4>(shared_address(stage + seat.before), columns, bits & 1);
      if (seat.copies_behind)
        ptx::copy_bytes_or_zeros<4>(shared_address(stage + seat.behind), columns + kLast,
                                    bits & 1u << kLast);
    }
  }

  // Starts to load two channels, zeros outside, and moves on to the next step. `channels`: from
  // channel c of the first octet on.
  template <bool kOneStep>
  __device__ __forceinline__ void load(const Grouped& g, int channels, const Seat<Taps>& seat,
                                       char* stage) {
    const bool needed = rows > 0 && unsigned(row) < unsigned(g.source_height);
    if (g.source_vector == 4)
      copy_columns<4>(g, channels, needed, seat, stage);
    else if (g.source_vector == 2)
      copy_columns<2>(g, channels, needed, seat, stage);
    else
      copy_columns<1>(g, channels, needed, seat, stage);
    ptx::copy_commit();
    if (!kOneStep && ++octet < g.steps) {
      move(next, g.next_octet);
      return;
    }
    octet = 0;
    --rows;
    ++row;
    move(next, g.next_row);
    if (row == g.end_row) {
      row = g.origin_h;
      move(next, g.next_source);
    }
  }
};

// The columns of a strip as the instruction wants them: those of its cells m and m + 2 for the same
// tap, of two channels, are neighbouring registers.
template <typename Taps, int kProducts>
struct Columns {
  static constexpr int kApart = kMmas * Taps::kSources;  // from cell m to m + 2
  static constexpr int kFirsts = Taps::kColumns - kApart;
  uint32_t part[kFirsts][Tf32Parts<kProducts>::kCount][4];

  __device__ __forceinline__ Columns(const char* stage, const Seat<Taps>& seat) {
    float column[2][Taps::kColumns];
#pragma unroll
    for (int half = 0; half < 2; ++half, stage += Stage<Taps>::kHalf) {
#pragma unroll
      for (int i = 0; i < Taps::kVectors; ++i) {
        const float4 v =
            *reinterpret_cast<const float4*>(stage + seat.vector + i * Stage<Taps>::kVector);
        float* const to = &column[half][Taps::kAligned + i * kCells];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
      if (Taps::kBefore) column[half][0] = *reinterpret_cast<const float*>(stage + seat.before);
      if (Taps::kBehind)
        column[half][Taps::kColumns - 1] = *reinterpret_cast<const float*>(stage + seat.behind);
    }
#pragma unroll
    for (int i = 0; i < Taps::kColumns; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto parts = Tf32Parts<kProducts>::of(column[half][i]);
        const auto again = parts.again();
#pragma unroll
        for (int k = 0; k < parts.kCount; ++k) {
          if (i >= kApart) part[i - kApart][k][2 * half + 1] = parts.part[k];
          if (i < kFirsts) part[i][k][2 * half] = i >= kApart ? again.part[k] : parts.part[k];
        }
      }
  }
};

}  // namespace convops::cuda::grouped

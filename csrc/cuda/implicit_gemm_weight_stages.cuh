// What the warps of implicit_gemm_weight's main kernel share (implicit_gemm_weight_sm90.cu): their
// numbers, the traits of a kernel, where a block works, the rings in shared memory.
#pragma once

#include <cstdint>

#include "cuda/implicit_gemm_scale.cuh"
#include "cuda/implicit_gemm_weight.h"

namespace convops::cuda::implicit_gemm_weight {

using implicit_gemm::choose_scale;
using implicit_gemm::kHalfUnit;
using implicit_gemm::pack;
using implicit_gemm::pack_rest;
using implicit_gemm::Scale;

constexpr int kWarp = 32;
// Warps that multiply, that find grad_output's scales, of which one thread loads it too, and that
// convert the input.
constexpr int kConsumerWarps = 8, kScalerWarps = 4, kConverterWarps = 4;
constexpr int kScalers = kConsumerWarps, kConverters = kScalers + kScalerWarps;  // the first
constexpr int kThreads = (kConverters + kConverterWarps) * kWarp;
constexpr int kConsumerRegisters = 200, kProducerRegisters = 56;
static_assert(kConsumerRegisters * kConsumerWarps +
                  kProducerRegisters * (kThreads / kWarp - kConsumerWarps) <=
              65536 / kWarp);

constexpr int kStepPixels = 16, kSteps = kStagePixels / kStepPixels;
static_assert(kSteps <= promoted_steps(3), "sums leave the tensor cores after a stage");
// Cells of a row of the input, a thread's each; bytes of an octet of them.
constexpr int kCells = kStagePixels + kReach, kPlane = kCells * kOctet * 2;
static_assert(kCells <= kConverterWarps * kWarp);
constexpr int kMaxStages = 4, kMaxRing = 7, kHeader = 5120;
constexpr int kInputStages = 3;  // of raw rows of the input, each thread's its own

struct Header {
  uint64_t raw_full[kMaxStages], raw_scaled[kMaxStages], raw_empty[kMaxStages];
  uint64_t cells_full[kMaxRing], cells_empty[kMaxRing];
  float cells_unit[kMaxRing];         // what 1 stands for
  float2 row_scale[kMaxStages][128];  // of an out channel: factor, and what 1 stands for
  uint32_t largest[2][kConverterWarps];
};
static_assert(sizeof(Header) <= kHeader);

template <int kKernelH_, int kKernelW_, int kOctets_, bool kWide_, int kProducts_>
struct Traits {
  static constexpr WeightTile kTile = {kKernelH_, kKernelW_, kOctets_, kWide_};
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_, kProducts = kProducts_;
  static constexpr int kParts = kProducts == 3 ? 2 : 1;  // of a number: high, with three low
  // Of a warpgroup: octets, columns of an instruction, sums of a thread for a tap of a row.
  static constexpr int kOctets = kOctets_, kColumns = kKernelH * kOctets * kOctet;
  static constexpr int kSums = kColumns / 2;
  static_assert(kSums * kKernelW <= 72, "two sets of sums and the operands fit the registers");
  static constexpr int kBlockOctets = kTile.channels() / kOctet;
  static_assert(kBlockOctets <= 2, "a converter has registers for so many");
  // Rows of the input are in a ring of slots. The first are stored once more behind the last, so
  // that any kernel_h of them which follow each other do so in memory.
  static constexpr int kRing = kKernelH + 2, kSlots = kRing + kKernelH - 1;
  static_assert(kRing <= kMaxRing);
  static constexpr int kGroupBytes = kSlots * kOctets * kPlane;  // of a part, a warpgroup's octets
  static constexpr int kPartBytes = (kBlockOctets / kOctets) * kGroupBytes;
  static constexpr int kRawBytes = kTile.out_channels() * kRawPitch * 4;
  static constexpr int kInputFloats = kBlockOctets * kOctet * kCells;  // of a stage
  static constexpr int kRawAt = kHeader + kParts * kPartBytes + kInputStages * kInputFloats * 4;
  static constexpr int kRoom = (kMaxSharedMemory - kRawAt) / kRawBytes;
  static constexpr int kStages = kRoom < kMaxStages ? kRoom : kMaxStages;
  static_assert(kStages >= 2);
  static constexpr int kSharedBytes = kRawAt + kStages * kRawBytes;
  static_assert(kRawAt % 128 == 0);
};

// Where a block works.
struct Place {
  int group, channel, out_channel;  // the first of the group's
  int tap_h, tap_w;                 // the first
  int split;
  int64_t begin, end;  // rows of grad_output

  __device__ Place(const WeightGemm& g, WeightTile tile, int index) {
    const auto next = [&](int size) {
      const int digit = index % size;
      index /= size;
      return digit;
    };
    channel = next(g.channel_tiles) * tile.channels();
    out_channel = next(g.out_channel_tiles) * tile.out_channels();
    tap_w = next(g.taps_w) * tile.kernel_w;
    tap_h = next(g.taps_h) * tile.kernel_h;
    group = next(g.groups);
    split = index;
    begin = g.rows * split / g.splits;
    end = g.rows * (split + 1) / g.splits;
  }
};

// Walks through rows of grad_output in *runs* down a segment of an image: a run's rows are as far
// apart as the kernel's, so that a row's taps are rows of the input one after the other.
class Rows {
 public:
  __device__ Rows(const WeightGemm& g, const Place& place)
      : height_(g.out_height), step_(g.dilation_h), left_(int(place.end - place.begin)) {
    column_ = int(place.begin / height_);
    const int row = int(place.begin % height_);
    // Runs of one row more come first.
    const int shorter = height_ / step_, longer = height_ % step_;
    const int run =
        row < longer * (shorter + 1) ? row / (shorter + 1) : (row - longer) / max(1, shorter);
    y = run + (row - run * shorter - min(run, longer)) * step_;
    set_column(g.segments);
  }
  __device__ bool done() const { return left_ <= 0; }
  // Whether a run begins.
  __device__ bool next(const WeightGemm& g) {
    --left_;
    y += step_;
    if (y < height_) return false;
    y = y % step_ + 1;
    if (y >= min(step_, height_)) {
      y = 0;
      ++column_;
      set_column(g.segments);
    }
    return true;
  }

  int image, x, y;  // x: the segment's first pixel

 private:
  __device__ void set_column(int segments) {
    image = column_ / segments;
    x = (column_ - image * segments) * kStagePixels;
  }

  int height_, step_, column_, left_;
};

// A place in a ring of stages and the parity of its barriers' phase.
template <int kCount>
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++index < kCount) return;
    index = 0;
    parity ^= 1;
  }
};

}  // namespace convops::cuda::implicit_gemm_weight

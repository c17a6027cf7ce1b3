// What the warps of implicit_gemm's main kernel share (implicit_gemm_sm90.cu): their numbers, the
// traits of a kernel, the rings of stages and the notes at the start of shared memory.
#pragma once

#include <cstdint>

#include "cuda/implicit_gemm.h"

namespace convops::cuda::implicit_gemm {

constexpr int kWarp = 32;
constexpr int kConsumerThreads = kConsumers * 4 * kWarp;
constexpr int kConverterThreads = kConverterWarps * kWarp;
constexpr int kThreads = kConsumerThreads + kWarp + kConverterThreads;
// Two accumulators and addresses for 256 threads, what is left for the other 256.
constexpr int kConsumerRegisters = 208, kProducerRegisters = 48;
static_assert(kThreads == 512 && 256 * (kConsumerRegisters + kProducerRegisters) <= 65536);

// 6 taps of three products are 18 truncated additions (docs/implicit_gemm.md).
constexpr int kPromotedTaps = 6;
// Halves of a source stage and of a row reach up to 2^14 ≤ largest < 2^15; sums are kept in the
// source's own scale, as if the row's largest weight were 1 to 2.
constexpr int kLargestExponent = 14;
constexpr float kSumUnit = 0x1p-14f;

template <int kProducts_, int kRowTile_, int kColumns_>
struct Traits {
  static constexpr int kProducts = kProducts_, kRowTile = kRowTile_, kColumns = kColumns_;
  // Planes of 8 channels: two of high parts, then two of low parts.
  static constexpr int kPlanes = kProducts == 3 ? 4 : 2;
  static constexpr int kWeightBytes = kPlanes * kRowTile * 16;
  static constexpr int kStagePitch = kColumns + kStagePadding;
  // Groups of instructions in flight: enough to hide the issue of the next.
  static constexpr int kInFlight = kProducts == 3 ? 1 : 2;
  static_assert(kStagePitch % 32 == 8 || kStagePitch % 32 == 24, "staging without bank conflicts");
};

// A channel of the source in one of its phases, from the place of the cell in channel and phase 0.
struct SumPlace {
  int64_t offset;
  int h, w;  // far outside where there is no such channel
};

// Barriers and notes at the start of shared memory.
struct Header {
  uint64_t weights_full[kMaxWeightStages], weights_empty[kMaxWeightStages];
  uint64_t source_full[kMaxSourceStages], source_empty[kMaxSourceStages];
  float source_unit[kMaxSourceStages];  // what 1 in the stage stands for
  uint64_t raw_full[kMaxRawStages];     // this and the next only with bulk copies
  int raw_skew[kMaxRawStages];
  int raw_job[kMaxRawStages];  // whose cells a stage holds; kNoJob: there is no more
  uint32_t channel_max[kMaxDepth * kSumBlock];  // bits of |x|, of the stage being converted
  SumPlace sum_places[kMaxDepth * kSumBlock];   // of the stage being copied, with mixed phases
};
static_assert(sizeof(Header) <= GemmSharedMemory::kRowPlaces);

constexpr int kNoJob = -1;

// A place in a ring of stages and the parity of its barriers' phase.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void next(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace convops::cuda::implicit_gemm

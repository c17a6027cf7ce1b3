// What the warps of implicit_gemm's main kernel share (implicit_gemm_sm90.cu): their numbers, the
// traits of a kernel, the rings of stages and the notes at the start of shared memory.
#pragma once

#include <cstdint>

#include "cuda/implicit_gemm.h"
#include "cuda/implicit_gemm_scale.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/types.cuh"

namespace convops::cuda::implicit_gemm {

constexpr int kWarp = 32;
constexpr int kRows = 16;  // of the weight, of a consumer warp

// Named barriers: of each group of converters, of all of them, of each warpgroup of consumers.
constexpr int kConverterBarrier = 1, kAllConvertersBarrier = kConverterBarrier + kConverterGroups,
              kGroupBarrier = kAllConvertersBarrier + 1;

// Scales of stages are as many powers of two apart: most stages have the last one's, and sums need
// not be promoted in between.
constexpr int kScaleStep = 4;

// What 1 of the sums of two operands stands for whose largest magnitudes are 1 to 2: they are kept
// as if the row's largest weight were.
constexpr float kSumUnit = kHalfUnit * kHalfUnit;

// E: of the tensors' elements.
template <typename E, int kProducts_, int kRowTile_, GemmShape kShape>
struct Traits {
  using Element = E;
  static constexpr int kProducts = kProducts_, kRowTile = kRowTile_;
  static constexpr int kColumns = kShape.columns, kConsumers = kShape.consumers;
  static constexpr int kConsumerThreads = kConsumers * 4 * kWarp;
  static constexpr int kFirstConverter = kConsumerThreads + 2 * kWarp;  // after streamer and loader
  // Consumers have 64 of the rows each, and those that have the same rows other cells.
  static constexpr int kRowGroups = kRowTile / 64, kCellGroups = kConsumers / kRowGroups;
  __device__ static int row_group(int group) {
    return kRowGroups == 1 ? 0 : kCellGroups == 1 ? group : group % kRowGroups;
  }
  __device__ static int cell_group(int group) {
    return kCellGroups == 1 ? 0 : kRowGroups == 1 ? group : group / kRowGroups;
  }
  // Elements of 16 bits are multiplied as they are: no scales, no promotion, one accumulator.
  static constexpr bool kHalf = sizeof(E) == 2;
  // What the converters move; to them 16 bits are only bits.
  using Raw = std::conditional_t<kHalf, uint16_t, float>;
  static constexpr int kVector = vector_elements(sizeof(E));
  // Of a number: high, and with three products low.
  static constexpr int kParts = kProducts == 3 ? 2 : 1;
  // Of a step's weights, an octet each: two of high parts, then two of low parts.
  static constexpr int kPlanes = kStepOctets * kParts;
  static constexpr int kWeightBytes = kPlanes * kRowTile * 16;
  // Odd multiples of 8: no bank conflicts.
  static constexpr int kStagePitch = gemm_stage_pitch(kColumns);
  // Of a stage: what is done once a stage counts for less where steps are short.
  static constexpr int kWeightStageBytes = gemm_weight_stage_bytes(kProducts, kRowTile);
  static constexpr int kSteps = kWeightStageBytes / kWeightBytes;
  // Of a sum, and of the second warpgroup's first if they promote by turns.
  static constexpr int kSumSteps = promoted_steps(kProducts);
  static constexpr int kFirstSteps = (kSumSteps / 2 + kSteps - 1) / kSteps * kSteps;
  static_assert(kSumSteps % kSteps == 0, "stages of weights end where sums are promoted");
  // The operand of a step in the source ring: only that of 16 bits has several layouts.
  __device__ static auto laid(ptx::Matrix step, const GemmTile& t) {
    if constexpr (kHalf)
      return ptx::LaidMatrix{step.low, t.operand_layout};
    else
      return step;
  }
  static constexpr int kConverterThreads = gemm_converter_threads(sizeof(E), kColumns, kConsumers);
  static constexpr int kConverterWarps = kConverterThreads / kWarp;
  static constexpr int kThreads = kFirstConverter + kConverterGroups * kConverterThreads;
  // What a thread has at the launch. Of other numbers of threads ptxas would leave registers over,
  // and setmaxnreg wait for ever for what it is not given.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kThreads % (4 * kWarp) == 0);
  // Two accumulators (or one) and addresses for the consumers, what is left for the others.
  static constexpr int kConsumerRegisters = kConsumers == kMostConsumers      ? 96
                                            : kHalf && kColumns <= kFewHalves ? 176
                                            : kColumns > kRoomyColumns        ? 208
                                            : kColumns > kFewColumns          ? 200
                                                                              : 168;
  static constexpr int kProducerRegisters =
      (kRegisters * kThreads - kConsumerRegisters * kConsumerThreads) /
      (kThreads - kConsumerThreads);
  static_assert(kProducerRegisters % 8 == 0 && kProducerRegisters >= 48);
  static_assert(kStagePitch % 32 == 8 || kStagePitch % 32 == 24, "staging without bank conflicts");
};

// A channel of the source in one of its phases, from the place of the cell in channel and phase 0.
struct SumPlace {
  int64_t offset;
  int h, w;  // far outside where there is no such channel
};

// A row of the weight as its results need it.
struct RowPlace {
  int channel;               // of the tensor, or -1 where there is no such row
  int16_t phase_h, phase_w;  // phase_h: less the origin
};
struct RowNote {
  float scale, bias;
  RowPlace place;
};

// Of the skews that one number holds; each is below a vector.
constexpr int kSkewBits = 4;
static_assert(1 << kSkewBits >= vector_elements(2) && kMaxSourceKinds * kSkewBits <= 32);

// A raw stage.
struct RawNote {
  int job;  // whose cells it holds
  // How many cells at the begin of a row lie outside the source, though not outside of what a box
  // has; and the elements before the tile in a row of each box, kSkewBits a box. Without bulk
  // copies zeros.
  int outside;
  uint32_t skews;
};

// Barriers and notes at the start of shared memory.
struct Header {
  uint64_t weights_full[kMaxWeightStages], weights_empty[kMaxWeightStages];
  uint64_t source_full[kMaxSourceStages], source_empty[kMaxSourceStages];
  float source_unit[kMaxSourceStages];                         // what 1 in the sums stands for
  uint64_t raw_full[kMaxRawStages], raw_empty[kMaxRawStages];  // only with bulk copies
  RawNote raw[kMaxRawStages];
  union {
    RowNote rows[kMostConsumers * 4][kRows];  // of every consumer warp
    struct {
      RowNote float_rows[kConsumers * 4][kRows];
      // Of every group of converters of float32, of its raw stage and its next.
      float thread_max[kConverterGroups][2][kMostConverterThreads];
    };
  };
  uint4 nowhere;  // where converters of 16 bits put what is no cell
  // Only with several phases in a block of the sum:
  union {
    SumPlace sum_places[kConverterGroups][kMaxStageSums];  // of the stage a group is copying
    int sum_offsets[kMaxStageSums];                        // with bulk copies
  };
};
static_assert(sizeof(Header) <= GemmSharedMemory::kHeader);

// A place in a ring of stages and, in the lowest bit, the parity of its barriers' phase: one
// register, of which the converters have few.
struct Stage {
  uint32_t place = 0;

  __device__ int index() const { return int(place >> 1); }
  __device__ uint32_t parity() const { return place & 1; }
  __device__ void next(int stages) {
    place += 2;
    if (index() >= stages) place = parity() ^ 1;
  }
};

}  // namespace convops::cuda::implicit_gemm

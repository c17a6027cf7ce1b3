// What the kernels of tma_im2col share: the ring of stages, tiles, and the thread that asks the
// copy engine for both operands. They differ in what multiplies and stores (tma_im2col_sm90.cu,
// tma_im2col_float_sm90.cu). See tma_im2col.h for what is computed.
//
// A persistent block walks over tiles of pixels × channels of the result; its warps pass data on
// through a ring of stages in shared memory, each a tap's 128 bytes of channels of the sum:
//
//   producer   1 thread     source → pixels × channels by the copy engine's im2col mode, which
//                           finds windows, strides and padding by itself; weight → the same
//   consumers  warpgroups   ring → registers, 64 pixels each → result
//
// The producer runs ahead into the next tile while the consumers store. A stage's rows are 128
// bytes, swizzled as the tensor cores read them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/check.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tma_im2col.h"

namespace convops::cuda::tma_im2col {

constexpr int kWarp = 32, kWarpgroup = 4 * kWarp;
constexpr int kRowBytes = kMapRowBytes, kGroupBytes = 64 * kRowBytes;  // of a warpgroup's pixels
constexpr int kWarpPixels = 16;
constexpr int kMostStages = 8, kHeaderBytes = 1024;  // stages begin at multiples of 1024
constexpr int kMaxSharedMemory = 227 * 1024;         // of a block

struct Header {
  uint64_t full[kMostStages], empty[kMostStages];
  uint64_t turns[2];  // of teams
};
static_assert(sizeof(Header) <= kHeaderBytes);

// kTurned: rows of the weight's stage are k's. kParts: of the weight, one after the other.
// kStagedBytes: a warp's, for its results. kProducers: threads; a warpgroup of them hands registers
// on to the consumers.
template <typename E, bool kTurned_, int kParts_, PixelShape kShape_, int kStagedBytes_,
          int kProducers = kWarp>
struct Traits {
  using Element = E;
  static constexpr bool kTurned = kTurned_;
  static constexpr int kParts = kParts_, kStagedBytes = kStagedBytes_;
  static constexpr PixelShape kShape = kShape_;
  static constexpr int kStageSums = map_channels(sizeof(E));
  static constexpr int kTeam = kShape.warpgroups * kWarpgroup;  // threads
  static constexpr int kConsumers = kShape.teams * kTeam, kThreads = kConsumers + kProducers;
  static constexpr bool kMovesRegisters = kProducers == kWarpgroup;
  static constexpr int kSourceBytes = kShape.pixels() * kRowBytes;
  static constexpr int kPartBytes = kShape.channels * kRowBytes;
  static constexpr int kStageBytes = kSourceBytes + kParts * kPartBytes;
  static constexpr int kStaged = kHeaderBytes;  // where results are
  static constexpr int kStagesAt = kStaged + kConsumers / kWarp * kStagedBytes;
  static constexpr int kRoom = (kMaxSharedMemory - kStagesAt) / kStageBytes;
  static constexpr int kStages = kRoom < kMostStages ? kRoom : kMostStages;
  static_assert(kStages >= 2);
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;
};

// A place in the ring and the parity of its barriers' phase.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++index < kStages) return;
    index = 0;
    parity ^= 1;
  }
  __device__ __forceinline__ void skip(int count) {
    const int rounds = (index + count) / kStages;
    index += count - rounds * kStages;
    parity ^= rounds & 1;
  }
};

struct Tile {
  const PixelPhase& phase;
  int number;          // the phase's
  int pixel, channel;  // the first

  template <PixelShape kShape>
  static __device__ __forceinline__ Tile find(const PixelGemm& g, int index) {
    int number = g.phase_count - 1;
    while (index < g.phases[number].first_tile) --number;
    const PixelPhase& phase = g.phases[number];
    const int local = index - phase.first_tile, block = g.by_channel_tiles.quotient(local);
    return {phase, number, block * kShape.pixels(),
            (local - block * int(g.by_channel_tiles.value)) * kShape.channels};
  }
};

// Of a phase's pixel.
struct Place {
  int image, row, column;

  __device__ __forceinline__ Place(const PixelPhase& phase, int pixel) {
    image = phase.by_pixels.quotient(pixel);
    const int rest = pixel - image * int(phase.by_pixels.value);
    row = phase.by_columns.quotient(rest);
    column = rest - row * int(phase.by_columns.value);
  }
  __device__ __forceinline__ int h(const PixelGemm& g, const PixelPhase& phase) const {
    return phase.result_h + row * g.result_step_h;
  }
  __device__ __forceinline__ int w(const PixelGemm& g, const PixelPhase& phase) const {
    return phase.result_w + column * g.result_step_w;
  }
};

template <typename T>
__device__ __forceinline__ int steps(const PixelGemm& g, const PixelPhase& phase) {
  return phase.taps_h * phase.taps_w * ((g.sums + T::kStageSums - 1) / T::kStageSums);
}

template <typename T>
__device__ __forceinline__ void produce(const PixelGemm& g, const PixelOperands& operands,
                                        Header& header, uint8_t* stages) {
  Stage<T::kStages> stage;
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const Tile tile = Tile::find<T::kShape>(g, index);
    const PixelPhase& phase = tile.phase;
    const Place first(phase, tile.pixel);
    const int h = phase.begin_h + first.row * g.step_h;
    const int w = phase.begin_w + first.column * g.step_w;
    const int merged = g.merged ? tile.channel : 0;  // source channels before the merged groups'
    for (int tap_h = 0; tap_h < phase.taps_h; ++tap_h)
      for (int tap_w = 0; tap_w < phase.taps_w; ++tap_w) {
        const int weight_h = phase.weight_h + tap_h * g.weight_step_h;
        const int weight_w = phase.weight_w + tap_w * g.weight_step_w;
        for (int k = 0; k < g.sums; k += T::kStageSums, stage.next()) {
          uint64_t* const full = &header.full[stage.index];
          uint8_t* const source = stages + stage.index * T::kStageBytes;
          uint8_t* const weight = source + T::kSourceBytes;
          ptx::barrier_wait(&header.empty[stage.index], stage.parity ^ 1);
          ptx::expect_bytes(full, T::kStageBytes);
          ptx::copy_pixels(source, &operands.source_maps[tile.number],
                           {merged + k, w, h, first.image},
                           {uint16_t(tap_w * g.shift_w), uint16_t(tap_h * g.shift_h)}, full);
          if constexpr (T::kTurned) {
#pragma unroll
            for (int i = 0; i < T::kShape.channels; i += T::kStageSums)
              ptx::copy_box(weight + i * kRowBytes, &operands.weight_map,
                            {tile.channel - merged + i, weight_w, weight_h, merged + k}, full);
          } else {
#pragma unroll
            for (int part = 0; part < T::kParts; ++part)
              ptx::copy_box(weight + part * T::kPartBytes, &operands.weight_map,
                            {k, weight_w, weight_h, tile.channel + part * g.channels}, full);
          }
          ptx::barrier_arrive(full);
        }
      }
  }
}

// Whether the block's tile number `turn` is of the consumer's team; if not, its stages are passed
// over. Waits until the other team has seen all of its stages: a barrier tells one phase from the
// next only.
template <typename T>
__device__ __forceinline__ bool take_turn(Header& header, int turn, int count,
                                          Stage<T::kStages>& stage) {
  const int team = int(threadIdx.x) / T::kTeam;
  if (turn % T::kShape.teams != team) {
    stage.skip(count);
    return false;
  }
  if (T::kShape.teams > 1) ptx::barrier_wait(&header.turns[team], turn / 2 % 2 ^ (team ^ 1));
  return true;
}
// By one lane of each warp, when it has seen all of its tile's stages.
template <typename T>
__device__ __forceinline__ void pass_turn(Header& header, bool leads) {
  const int team = int(threadIdx.x) / T::kTeam;
  if (T::kShape.teams > 1 && leads) ptx::barrier_arrive(&header.turns[team ^ 1]);
}

// Roles of a block's warps. Consume: consume(header), by the consumers.
template <typename T, typename Consume>
__device__ __forceinline__ void run_block(const PixelGemm& g, const PixelOperands& operands,
                                          uint8_t* shared, Consume consume) {
  Header& header = *reinterpret_cast<Header*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.empty[i], T::kTeam / kWarp);
    }
    for (uint64_t& turn : header.turns) ::cuda::ptx::mbarrier_init(&turn, T::kTeam / kWarp);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __syncthreads();
  if (threadIdx.x < T::kConsumers) {
    if constexpr (T::kMovesRegisters) ptx::raise_registers<consumer_registers(T::kShape)>();
    consume(header);
  } else {
    if constexpr (T::kMovesRegisters) ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == T::kConsumers) produce<T>(g, operands, header, shared + T::kStagesAt);
  }
}

// How many blocks are launched.
template <typename T, typename Kernel>
int prepare(Kernel kernel, const PixelGemm& g, const Execution& execution) {
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  return std::min(g.tiles, execution.device->processors);
}

}  // namespace convops::cuda::tma_im2col

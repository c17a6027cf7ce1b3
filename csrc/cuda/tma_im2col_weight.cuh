// What the kernels of tma_im2col_weight share: a block's work, the ring of stages, and the thread
// that asks the copy engine for both operands. They differ in what multiplies and stores
// (tma_im2col_weight_sm90.cu, tma_im2col_weight_float_sm90.cu). See tma_im2col_weight.h for what a
// block sums.
#pragma once

#include <iterator>
#include <utility>

#include "cuda/check.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/tma_im2col_weight.h"

namespace convops::cuda::tma_im2col_weight {

constexpr int kWarp = 32, kWarpgroup = 4 * kWarp;
constexpr int kAlignment = 1024;  // of boxes
constexpr int kRingBytes = 208 * 1024, kMostStages = 8;

// kTurningWarps: of a warpgroup beside the consumers, to which it hands registers on. kTurnedBoxes:
// what they make of a stage, behind its out boxes.
template <PixelTile kTile_, int kConsumerWarps_, int kTurningWarps_ = 0, int kTurnedBoxes_ = 0>
struct Traits {
  static constexpr PixelTile kTile = kTile_;
  static constexpr int kConsumerWarps = kConsumerWarps_;
  static constexpr int kTurningWarps = kTurningWarps_, kTurnedBoxes = kTurnedBoxes_;
  static constexpr bool kMovesRegisters = kTurningWarps > 0;
  static constexpr int kProducers = kMovesRegisters ? kWarpgroup : kWarp;  // threads
  static constexpr int kConsumers = kConsumerWarps * kWarp, kThreads = kConsumers + kProducers;
  static constexpr int kProducerRegisters = 72, kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * kThreads - kProducerRegisters * kProducers) / kConsumers / 8 * 8;
  static constexpr int kStageBytes = kTile.stage_bytes() + kTurnedBoxes * kTile.box_bytes();
  static constexpr int kStages =
      kRingBytes / kStageBytes < kMostStages ? kRingBytes / kStageBytes : kMostStages;
  static constexpr int kSharedBytes = kAlignment + kStages * kStageBytes;
  static_assert(kStages >= 3 && kTile.box_bytes() % kAlignment == 0);
};

// The block's work.
struct Share {
  int group, out_channel, slot;  // of merged groups the number, and the first
  int split, begin, end;         // stages

  Share() = default;
  __device__ Share(const WeightPixels& g, PixelTile tile) {
    // Neighbouring blocks read the same pixels.
    const int block = int(blockIdx.x), rest = block % g.tiles();
    split = block / g.tiles();
    slot = rest % g.slot_tiles * tile.slots;
    out_channel = rest / g.slot_tiles % g.out_tiles * tile.out_channels();
    group = rest / (g.slot_tiles * g.out_tiles);
    begin = int(int64_t{g.stages} * split / g.splits);
    end = int(int64_t{g.stages} * (split + 1) / g.splits);
  }
};

// In shared memory, before the ring.
struct Header {
  uint64_t full[kMostStages], turned[kMostStages], empty[kMostStages];
  Share share;
};
static_assert(sizeof(Header) <= kAlignment);

template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// By one thread.
template <typename T>
__device__ void run_producer(const WeightPixels& g, const WeightPixelsOperands& operands,
                             Header& header, uint8_t* ring) {
  const Share share = header.share;
  constexpr PixelTile kTile = T::kTile;
  const int slots = min(kTile.slots, g.slots - share.slot);
  const uint32_t bytes = uint32_t(kTile.out_boxes + slots) * kTile.box_bytes();
  const int first_out = share.group * g.merged * g.out_channels + share.out_channel;
  int channels[kTile.slots];  // found once: a stage's boxes follow each other faster than divisions
  uint16_t shifts[kTile.slots][2];
#pragma unroll
  for (int j = 0; j < kTile.slots; ++j) {
    const int block = g.by_taps.quotient(share.slot + j);
    const int tap = share.slot + j - block * g.taps, tap_h = g.by_kernel_w.quotient(tap);
    channels[j] = share.group * g.merged * g.channels + block * kTile.side;
    shifts[j][0] = uint16_t((tap - tap_h * g.kernel_w) * g.dilation_w);
    shifts[j][1] = uint16_t(tap_h * g.dilation_h);
  }
  Stage<T::kStages> stage;
  for (int i = share.begin; i < share.end; ++i, stage.next()) {
    ptx::barrier_wait(&header.empty[stage.index], stage.parity ^ 1);
    uint64_t* const barrier = &header.full[stage.index];
    ptx::expect_bytes(barrier, bytes);
    ptx::barrier_arrive(barrier);
    const int pixel = i * kTile.side, line = g.by_out_width.quotient(pixel);
    const int column = pixel - line * int(g.by_out_width.value);
    const int image = g.by_out_height.quotient(line);
    const int row = line - image * int(g.by_out_height.value);
    uint8_t* to = ring + stage.index * T::kStageBytes;
#pragma unroll
    for (int j = 0; j < kTile.out_boxes; ++j, to += kTile.box_bytes())
      ptx::copy_pixels(to, &operands.grad, {first_out + j * kTile.side, column, row, image}, {0, 0},
                       barrier);
    to += T::kTurnedBoxes * kTile.box_bytes();
    const int left = column * g.stride_w - g.padding_w, top = row * g.stride_h - g.padding_h;
#pragma unroll
    for (int j = 0; j < kTile.slots; ++j, to += kTile.box_bytes())
      if (j < slots)
        ptx::copy_pixels(to, &operands.input, {channels[j], left, top, image}, shifts[j], barrier);
  }
}

// Roles of a block's warps: consume(header, ring), and turn(header, ring) by the turning warps.
template <typename T, typename Consume, typename Turn>
__device__ __forceinline__ void run_block(const WeightPixels& g,
                                          const WeightPixelsOperands& operands, uint8_t* shared,
                                          Consume consume, Turn turn) {
  Header& header = *reinterpret_cast<Header*>(shared);
  uint8_t* const ring = shared + kAlignment;
  if (threadIdx.x == 0) {
    header.share = Share(g, T::kTile);
    for (int i = 0; i < T::kStages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.empty[i], T::kConsumerWarps);
      if constexpr (T::kTurningWarps > 0)
        ::cuda::ptx::mbarrier_init(&header.turned[i], T::kTurningWarps);
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __syncthreads();
  ptx::launch_dependents();
  if (threadIdx.x < T::kConsumers) {
    if constexpr (T::kMovesRegisters) ptx::raise_registers<T::kConsumerRegisters>();
    consume(header, ring);
  } else {
    if constexpr (T::kMovesRegisters) ptx::lower_registers<T::kProducerRegisters>();
    const int warp = int(threadIdx.x) / kWarp - T::kConsumerWarps;
    if (threadIdx.x == T::kConsumers) run_producer<T>(g, operands, header, ring);
    if (warp > 0 && warp <= T::kTurningWarps) turn(header, ring);
  }
}

template <typename T, typename Kernel>
void launch(Kernel kernel, const WeightPixels& g, const WeightPixelsOperands& operands,
            void* stream) {
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  kernel<<<g.tiles() * g.splits, T::kThreads, T::kSharedBytes, cudaStream_t(stream)>>>(g, operands);
  CONVOPS_LAUNCH_CHECK("tma_im2col_weight");
}

// Calls launch.operator()<i>() for the tile's number i in `kTiles`.
template <const auto& kTiles, typename Launch>
void with_tile(const PixelTile& tile, Launch launch) {
  const auto try_tile = [&]<int i>() {
    if (tile == kTiles[i]) launch.template operator()<i>();
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_tile.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, int(std::size(kTiles))>());
}

}  // namespace convops::cuda::tma_im2col_weight

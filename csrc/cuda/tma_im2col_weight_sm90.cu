// The kernel of tma_im2col_weight: for every tap, the out channels × channels matrix
//
//   grad_weight[o][tap][c] = sum over pixels of grad_output[pixel][o] · input[pixel + tap][c]
//
// in channels_last, where a pixel's channels are neighbours. The copy engine walks the pixels of
// grad_output, and of the input what each tap sees of them, by im2col maps: stride, padding and the
// ends of rows and images are its work. Pixels are the sum, the k's of both operands, and lie as
// rows of 64 swizzled channels, the way wgmma reads turned operands: nobody moves an element by
// hand.
//
// A block has a tile (PixelTile) and a share of the pixels. One thread asks for stages of the ring;
// each warpgroup multiplies its 64 out channels by its slots, and stores its sums into the share's
// part. weight_parts.cu adds the parts in order. (Where one block has all pixels, it stores
// results.)
#include <type_traits>

#include "cuda/ptx/wgmma.cuh"
#include "cuda/tma_im2col_weight.cuh"
#include "cuda/types.cuh"

namespace convops::cuda {
namespace {

using namespace tma_im2col_weight;

constexpr int kStepPixels = 16;
constexpr int kWarpRows = 16;  // out channels of a warp
constexpr int kConsumerBarrier = 1;

template <typename E_, PixelTile kTile>
struct HalfTraits : Traits<kTile, 4 * kTile.out_boxes> {
  using E = E_;
  using Base = Traits<kTile, 4 * kTile.out_boxes>;
  static constexpr int kSums = kTile.slots * kTile.side / 2;  // of a thread
  // From a row of sums to the next in shared memory: eight rows lie in different banks.
  static constexpr int kSumsPitch = kTile.slots * kTile.side + 8;
  static_assert(Base::kConsumerWarps * kWarpRows * kSumsPitch * 4 <=
                Base::kStages * kTile.stage_bytes());
};

template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[T::kSums], ptx::LaidMatrix a,
                                         ptx::LaidMatrix b, int accumulate) {
  if constexpr (std::is_same_v<typename T::E, __nv_bfloat16>)
    ptx::wgmma_boxes_bf16<true, true>(sums, a, b, accumulate);
  else
    ptx::wgmma_boxes<true, true>(sums, a, b, accumulate);
}

// A warp's sums by way of shared memory, from where lines of 64 channels leave at once: fragments
// stored from registers make several times the code, which has to come from memory, too. All of the
// block's instructions have ended.
template <typename T>
__device__ __forceinline__ void store_sums(const WeightPixels& g, const Share& share,
                                           const WeightSums& to, const float (&sums)[T::kSums],
                                           uint8_t* ring) {
  using E = typename T::E;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  float* const rows = reinterpret_cast<float*>(ring) + warp * kWarpRows * T::kSumsPitch;
#pragma unroll
  for (int i = 0; i < T::kSums; i += 2) {
    float* const row = rows + (lane / 4 + i % 4 / 2 * 8) * T::kSumsPitch;
    *reinterpret_cast<float2*>(row + i / 4 * 8 + lane % 4 * 2) = {sums[i], sums[i + 1]};
  }
  __syncwarp();
  float* const part = static_cast<float*>(to.first) + share.split * g.weights();
  E* const results = static_cast<E*>(to.first);
  const int64_t first = int64_t{share.group} * g.merged * g.out_channels;
#pragma unroll 1
  for (int j = 0; j < T::kTile.slots; ++j) {
    const int slot = share.slot + j;
    if (slot >= g.slots) break;
    const int block = g.by_taps.quotient(slot), tap = slot - block * g.taps;
    const int tap_h = g.by_kernel_w.quotient(tap), tap_w = tap - tap_h * g.kernel_w;
    const int64_t tap_place = tap_h * to.tap_h + tap_w * to.tap_w;
#pragma unroll 4
    for (int row = 0; row < kWarpRows; ++row) {
      const int out_channel = share.out_channel + warp * kWarpRows + row;  // of merged groups
      const int others = g.merged > 1 ? g.by_channels.quotient(out_channel) * g.channels : 0;
      const int channel = block * T::kTile.side + 2 * lane - others;
      if (out_channel >= g.merged * g.out_channels ||
          first + out_channel >= int64_t{g.groups} * g.out_channels ||
          unsigned(channel) >= unsigned(g.channels))
        continue;
      const int64_t place =
          tap_place + (first + out_channel) * to.out_channel + channel * to.channel;
      const float2 pair = *reinterpret_cast<const float2*>(rows + row * T::kSumsPitch +
                                                           j * T::kTile.side + 2 * lane);
      if (!to.rounded) {
        *reinterpret_cast<float2*>(part + place) = pair;
      } else {
        results[place] = convert<E>(pair.x);
        results[place + to.channel] = convert<E>(pair.y);
      }
    }
  }
}

template <typename T>
__device__ void run_consumers(const WeightPixels& g, Header& header, uint8_t* ring,
                              const WeightSums& to) {
  const Share& share = header.share;
  constexpr PixelTile kTile = T::kTile;
  const int group = int(threadIdx.x) / (4 * kWarp);
  const auto base = uint32_t(__cvta_generic_to_shared(ring));
  const ptx::LaidMatrix a0 = ptx::boxes(base + group * kTile.box_bytes(), kTile.box_bytes());
  const ptx::LaidMatrix b0 =
      ptx::boxes(base + kTile.out_boxes * kTile.box_bytes(), kTile.box_bytes());
  const bool leads = threadIdx.x % kWarp == 0;
  float sums[T::kSums];
#pragma unroll
  for (int i = 0; i < T::kSums; ++i) asm("" : "=f"(sums[i]));  // set by the first instruction
  Stage<T::kStages> stage, used;
  for (int i = share.begin; i < share.end; ++i, stage.next()) {
    ptx::barrier_wait(&header.full[stage.index], stage.parity);
    const int from = stage.index * kTile.stage_bytes() / 16;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTile.side; k += kStepPixels)
      multiply<T>(sums, ptx::skip<true>({a0.low + from, a0.high}, k),
                  ptx::skip<true>({b0.low + from, b0.high}, k), k > 0 || i > share.begin);
    ptx::wgmma_commit();
    if (i == share.begin) continue;
    ptx::wgmma_wait<1>();  // the stage before is done with
    if (leads) ptx::barrier_arrive(&header.empty[used.index]);
    used.next();
  }
  ptx::wgmma_wait<0>();
  ptx::sync_threads<T::kConsumers>(kConsumerBarrier);
  store_sums<T>(g, share, to, sums, ring);
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    sum_kernel(const __grid_constant__ WeightPixels g,
               const __grid_constant__ WeightPixelsOperands operands) {
  extern __shared__ __align__(1024) uint8_t shared[];
  run_block<T>(
      g, operands, shared,
      [&](Header& header, uint8_t* ring) { run_consumers<T>(g, header, ring, operands.sums); },
      [](Header&, uint8_t*) {});
}

template <typename E>
void sum_pixels(const WeightPixels& g, const PixelTile& tile, const WeightPixelsOperands& operands,
                void* stream) {
  with_tile<kHalfTiles>(tile, [&]<int i>() {
    using T = HalfTraits<E, kHalfTiles[i]>;
    launch<T>(sum_kernel<T>, g, operands, stream);
  });
}

}  // namespace

void sum_pixels_half(const WeightPixels& g, const PixelTile& tile,
                     const WeightPixelsOperands& operands, void* stream) {
  sum_pixels<__half>(g, tile, operands, stream);
}
void sum_pixels_bfloat16(const WeightPixels& g, const PixelTile& tile,
                         const WeightPixelsOperands& operands, void* stream) {
  sum_pixels<__nv_bfloat16>(g, tile, operands, stream);
}

}  // namespace convops::cuda

// The kernel of tma_im2col: forward and backward-input of 16-bit tensors in channels_last on
// Hopper's tensor cores. See tma_im2col.h for what it computes.
//
// A persistent block walks over tiles of pixels × channels of the result; its warps pass data on
// through a ring of stages in shared memory, each a tap's 64 channels of the sum:
//
//   producer   1 thread     source → pixels × 64 by the copy engine's im2col mode, which finds
//                           windows, strides and padding by itself; weight → 64 × channels
//   consumers  warpgroups   ring → registers, 64 pixels each → result
//
// The producer runs ahead into the next tile while the consumers store. A stage's rows are 128
// bytes, swizzled as the tensor cores read them. Backward-input sums over the weight's first
// dimension: there rows of the weight's stage are k's, and the tensor cores turn them.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cuda/check.h"
#include "cuda/definition.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tma_im2col.h"
#include "cuda/types.cuh"

namespace convops::cuda {
namespace {

constexpr int kWarp = 32, kWarpgroup = 4 * kWarp;
constexpr int kStageSums = kMapChannels, kStepSums = 16;                   // an instruction sums 16
constexpr int kRowBytes = kMapChannels * 2, kGroupBytes = 64 * kRowBytes;  // of a warpgroup's A
constexpr int kMostStages = 8, kHeaderBytes = 1024;  // stages begin at multiples of 1024
constexpr int kWarpPixels = 16, kStagedBytes = kWarpPixels * kRowBytes;
constexpr int kMaxSharedMemory = 227 * 1024;  // of a block

struct Header {
  uint64_t full[kMostStages], empty[kMostStages];
  uint64_t turns[2];  // of teams
};
static_assert(sizeof(Header) <= kHeaderBytes);

template <typename T, bool kTurned_, PixelShape kShape_>
struct Traits {
  using Element = T;
  static constexpr bool kTurned = kTurned_;  // backward-input
  static constexpr PixelShape kShape = kShape_;
  static constexpr int kTeam = kShape.warpgroups * kWarpgroup;  // threads
  static constexpr int kConsumers = kShape.teams * kTeam, kThreads = kConsumers + kWarp;
  static constexpr int kSourceBytes = kShape.pixels() * kRowBytes;
  static constexpr int kWeightBytes = kShape.channels * kRowBytes;
  static constexpr int kStageBytes = kSourceBytes + kWeightBytes;
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

__device__ __forceinline__ int steps(const PixelGemm& g, const PixelPhase& phase) {
  return phase.taps_h * phase.taps_w * ((g.sums + kStageSums - 1) / kStageSums);
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
        for (int k = 0; k < g.sums; k += kStageSums, stage.next()) {
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
            for (int i = 0; i < T::kShape.channels; i += kMapChannels)
              ptx::copy_box(weight + i * kRowBytes, &operands.weight_map,
                            {tile.channel - merged + i, weight_w, weight_h, merged + k}, full);
          } else {
            ptx::copy_box(weight, &operands.weight_map, {k, weight_w, weight_h, tile.channel},
                          full);
          }
          ptx::barrier_arrive(full);
        }
      }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  const T pair[] = {convert<T>(x), convert<T>(y)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}
template <typename T>
__device__ __forceinline__ bool is_nan(uint32_t bits) {
  constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  return (bits & 0x7fff) > kInfinity;
}
template <typename T>
__device__ __forceinline__ bool has_nan(uint32_t word) {
  return is_nan<T>(word) || is_nan<T>(word >> 16);
}

// A warp's 16 pixels, 64 channels at a time: to shared memory, where a pixel's 16 bytes change
// places against bank conflicts, and from there as they lie in the result.
template <typename T>
__device__ __forceinline__ void store(const ConvProblem& p, const PixelGemm& g,
                                      const PixelOperands& operands, const Tile& tile,
                                      uint8_t* staged,
                                      const float (&sums)[T::kShape.channels / 2]) {
  using E = typename T::Element;
  constexpr int kVector = 8, kVectors = kMapChannels / kVector;  // elements of 16 bytes
  constexpr int kLines = kWarp / kVectors;                       // pixels at a time
  const int warp = int(threadIdx.x) % T::kTeam / kWarp, lane = int(threadIdx.x) % kWarp;
  const int line = lane / kVectors, vector = lane % kVectors;
  const PixelPhase& phase = tile.phase;
  const int first = tile.pixel + warp * kWarpPixels, channel = tile.channel + vector * kVector;
  const auto element = [&](const Place& place) {
    return place.image * g.image_stride + place.h(g, phase) * g.row_stride +
           place.w(g, phase) * g.column_stride;
  };
  // Lanes find a pixel each and tell each other where it is; below 0 there is none.
  const int own = first + lane % kWarpPixels;
  const int64_t own_place = own < phase.pixels ? element(Place(phase, own)) : -1;
  E* const result = static_cast<E*>(operands.result) + channel;
  const E* const from = static_cast<const E*>(operands.bias);
  const uint32_t row = uint32_t(__cvta_generic_to_shared(staged)) + lane % 16 * kRowBytes;
  // NaN may come of zeros outside of grad_output and an infinite weight, or of other groups.
  const bool checks = T::kTurned || g.merged;
  bool nan = false;
#pragma unroll
  for (int block = 0; block < T::kShape.channels; block += kMapChannels) {
    // A lane reads the bias of two channels; those of its sums are other lanes'.
    float2 bias{0, 0};
    if (const int at = tile.channel + block + lane * 2; !T::kTurned && from && at < g.channels)
      bias = {convert<float>(from[at * g.bias_stride]),
              convert<float>(from[(at + 1) * g.bias_stride])};
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMapChannels; i += 16) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 sum{sums[(block + i) / 2 + j * 2], sums[(block + i) / 2 + j * 2 + 1]};
        if constexpr (!T::kTurned) {
          const int owner = (i + j / 2 * 8) / 2 + lane % 4;
          sum.x += __shfl_sync(~0u, bias.x, owner);
          sum.y += __shfl_sync(~0u, bias.y, owner);
        }
        words[j] = pack<E>(sum.x, sum.y);
      }
      ptx::store_matrices(row + ((i / 8 + lane / 16) ^ lane % 8) * 16, words);
    }
    __syncwarp();
#pragma unroll
    for (int at = 0; at < kWarpPixels; at += kLines) {
      const int pixel = at + line;
      const uint4 elements =
          *reinterpret_cast<const uint4*>(staged + pixel * kRowBytes + (vector ^ pixel % 8) * 16);
      const int64_t to = __shfl_sync(~0u, own_place, pixel);
      if (to < 0 || channel + block >= g.channels) continue;
      *reinterpret_cast<uint4*>(result + to + block) = elements;
      if (checks)
        nan |= has_nan<E>(elements.x) || has_nan<E>(elements.y) || has_nan<E>(elements.z) ||
               has_nan<E>(elements.w);
    }
  }
  if (checks) {
    const int end = nan ? min(first + kWarpPixels, phase.pixels) : 0;
#pragma unroll 1
    for (int pixel = first + line; pixel < end; pixel += kLines)
#pragma unroll 1
      for (int i = 0; i < T::kShape.channels / kVectors; ++i) {
        const int at = i / kVector * kMapChannels + i % kVector;
        if (channel + at >= g.channels) continue;
        const Place place(phase, pixel);
        E& to_check = result[element(place) + at];
        if (convert<float>(to_check) == convert<float>(to_check)) continue;
        const auto element_of = [&](auto define) {
          return define(p, static_cast<const E*>(operands.source),
                        static_cast<const E*>(operands.weight), int64_t{place.image},
                        int64_t{channel + at}, int64_t{place.h(g, phase)},
                        int64_t{place.w(g, phase)});
        };
        if constexpr (T::kTurned)
          to_check = convert<E>(element_of(backward_input_element<E>));
        else
          to_check = convert<E>(
              element_of(forward_element<E>) +
              (from ? convert<float>(from[int64_t{channel + at} * g.bias_stride]) : 0.f));
      }
  }
}

template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[T::kShape.channels / 2], ptx::LaidMatrix a,
                                         ptx::LaidMatrix b, int accumulate) {
  if constexpr (std::is_same_v<typename T::Element, __nv_bfloat16>)
    ptx::wgmma_boxes_bf16<false, T::kTurned>(sums, a, b, accumulate);
  else
    ptx::wgmma_boxes<false, T::kTurned>(sums, a, b, accumulate);
}

template <typename T>
__device__ __forceinline__ void consume(const ConvProblem& p, const PixelGemm& g,
                                        const PixelOperands& operands, Header& header,
                                        uint8_t* shared) {
  const int warp = int(threadIdx.x) / kWarp, team = int(threadIdx.x) / T::kTeam;
  const int group = int(threadIdx.x) % T::kTeam / kWarpgroup;
  const bool leads = threadIdx.x % kWarp == 0;
  const uint32_t stages = uint32_t(__cvta_generic_to_shared(shared + T::kStagesAt));
  Stage<T::kStages> stage;
  int turn = 0;
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x, ++turn) {
    const Tile tile = Tile::find<T::kShape>(g, index);
    const int count = steps(g, tile.phase);
    if (turn % T::kShape.teams != team) {
      stage.skip(count);
      continue;
    }
    // A barrier tells one phase from the next only.
    if (T::kShape.teams > 1) ptx::barrier_wait(&header.turns[team], turn / 2 % 2 ^ (team ^ 1));
    float sums[T::kShape.channels / 2];
#pragma unroll
    for (float& sum : sums) sum = 0;
    Stage<T::kStages> used = stage;  // whose instructions may not have ended
    const auto release = [&] {
      if (leads) ptx::barrier_arrive(&header.empty[used.index]);
      used.next();
    };
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      const uint32_t source = stages + stage.index * T::kStageBytes;
      const ptx::LaidMatrix a = ptx::boxes(source + group * kGroupBytes, 0);
      const ptx::LaidMatrix b = ptx::boxes(source + T::kSourceBytes, kStageSums * kRowBytes);
      ptx::barrier_wait(&header.full[stage.index], stage.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStageSums; k += kStepSums)
        multiply<T>(sums, ptx::skip<false>(a, k), ptx::skip<T::kTurned>(b, k), 1);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0) release();
      stage.next();
    }
    if (T::kShape.teams > 1 && leads) ptx::barrier_arrive(&header.turns[team ^ 1]);
    ptx::wgmma_wait<0>();
    if (count > 0) release();
    store<T>(p, g, operands, tile, shared + T::kStaged + warp * kStagedBytes, sums);
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    tma_im2col_kernel(const __grid_constant__ ConvProblem p, const __grid_constant__ PixelGemm g,
                      const __grid_constant__ PixelOperands operands) {
  extern __shared__ __align__(1024) uint8_t shared[];
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
    consume<T>(p, g, operands, header, shared);
  } else if (threadIdx.x == T::kConsumers) {
    produce<T>(g, operands, header, shared + T::kStagesAt);
  }
}

constexpr int kPackThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_groups_kernel(const __grid_constant__ ConvProblem p, const T* weight, T* packed) {
  const int64_t taps = p.kernel().h * p.kernel().w, channels = p.group_in_channels();
  const int64_t element = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  const int64_t line = element / kMapChannels, out_channel = line / taps, tap = line % taps;
  if (out_channel >= p.out_channels()) return;
  const int64_t before = out_channel % kMapChannels / channels * channels;
  const int64_t channel = element % kMapChannels - before;
  const auto& stride = p.weight.stride;
  const bool own = channel >= 0 && channel < channels;
  packed[element] = own ? weight[out_channel * stride[0] + channel * stride[1] +
                                 tap / p.kernel().w * stride[2] + tap % p.kernel().w * stride[3]]
                        : T{};
}

template <typename T>
void launch(const ConvProblem& p, const PixelGemm& g, const PixelOperands& operands,
            const Execution& execution) {
  const auto kernel = tma_im2col_kernel<T>;
  const int blocks = std::min(g.tiles, execution.device->processors);
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  kernel<<<blocks, T::kThreads, T::kSharedBytes, cudaStream_t(execution.stream)>>>(p, g, operands);
  CONVOPS_LAUNCH_CHECK("tma_im2col");
}

template <typename E, bool kTurned>
void launch_shape(const ConvProblem& p, const PixelGemm& g, int shape,
                  const PixelOperands& operands, const Execution& execution) {
  const auto try_shape = [&]<int i>() {
    if (shape == i) launch<Traits<E, kTurned, kPixelShapes[i]>>(p, g, operands, execution);
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_shape.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, int(std::size(kPixelShapes))>());
}

}  // namespace

void pack_groups(const ConvProblem& p, const void* weight, void* packed, void* stream) {
  const int64_t elements = p.out_channels() * p.kernel().h * p.kernel().w * kMapChannels;
  pack_groups_kernel<uint16_t>
      <<<unsigned(ceil_divide(elements, kPackThreads)), kPackThreads, 0, cudaStream_t(stream)>>>(
          p, static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed));
  CONVOPS_LAUNCH_CHECK("tma_im2col weights");
}

void multiply_pixels(const ConvProblem& p, const PixelGemm& g, int shape,
                     const PixelOperands& operands, const Execution& execution) {
  const bool half = p.dtype == DType::kFloat16, forward = p.direction == Direction::kForward;
  const auto launch =
      half ? (forward ? launch_shape<__half, false> : launch_shape<__half, true>)
           : (forward ? launch_shape<__nv_bfloat16, false> : launch_shape<__nv_bfloat16, true>);
  launch(p, g, shape, operands, execution);
}

}  // namespace convops::cuda

// tma_im2col of 16 bits: both operands are multiplied from shared memory as they lie in the tensors
// (see tma_im2col.h for what is computed, tma_im2col.cuh for how data comes there). Backward-input
// sums over the weight's first dimension: there rows of the weight's stage are k's, and the tensor
// cores turn them.
#include <cuda_runtime.h>

#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cuda/check.h"
#include "cuda/definition.cuh"
#include "cuda/pixel_walk.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tma_im2col.cuh"
#include "cuda/tma_im2col.h"
#include "cuda/types.cuh"

namespace convops::cuda {
namespace {

using namespace tma_im2col;

constexpr int kStepSums = 16;  // an instruction sums 16
constexpr int kStagedBytes = kWarpPixels * kRowBytes;
constexpr int kStagedChannels = kRowBytes / 2;

template <typename E, bool kTurned, PixelShape kShape>
using HalfTraits = Traits<E, kTurned, 1, kShape, kStagedBytes>;

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
  constexpr int kVector = 8, kVectors = kStagedChannels / kVector;  // elements of 16 bytes
  constexpr int kLines = kWarp / kVectors;                          // pixels at a time
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
  for (int block = 0; block < T::kShape.channels; block += kStagedChannels) {
    // A lane reads the bias of two channels; those of its sums are other lanes'.
    float2 bias{0, 0};
    if (const int at = tile.channel + block + lane * 2; !T::kTurned && from && at < g.channels)
      bias = {convert<float>(from[at * g.bias_stride]),
              convert<float>(from[(at + 1) * g.bias_stride])};
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kStagedChannels; i += 16) {
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
        const int at = i / kVector * kStagedChannels + i % kVector;
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
  const int warp = int(threadIdx.x) / kWarp;
  const int group = int(threadIdx.x) % T::kTeam / kWarpgroup;
  const bool leads = threadIdx.x % kWarp == 0;
  const uint32_t stages = uint32_t(__cvta_generic_to_shared(shared + T::kStagesAt));
  Stage<T::kStages> stage;
  int turn = 0;
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x, ++turn) {
    const Tile tile = Tile::find<T::kShape>(g, index);
    const int count = steps<T>(g, tile.phase);
    if (!take_turn<T>(header, turn, count, stage)) continue;
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
      const ptx::LaidMatrix b = ptx::boxes(source + T::kSourceBytes, T::kStageSums * kRowBytes);
      ptx::barrier_wait(&header.full[stage.index], stage.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < T::kStageSums; k += kStepSums)
        multiply<T>(sums, ptx::skip<false>(a, k), ptx::skip<T::kTurned>(b, k), 1);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0) release();
      stage.next();
    }
    pass_turn<T>(header, leads);
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
  run_block<T>(g, operands, shared,
               [&](Header& header) { consume<T>(p, g, operands, header, shared); });
}

constexpr int kPackThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_groups_kernel(const __grid_constant__ ConvProblem p, const T* weight, T* packed) {
  const int64_t taps = p.kernel().h * p.kernel().w, channels = p.group_in_channels();
  const int64_t element = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  const int64_t line = element / kMergedChannels, out_channel = line / taps, tap = line % taps;
  if (out_channel >= p.out_channels()) return;
  const int64_t before = out_channel % kMergedChannels / channels * channels;
  const int64_t channel = element % kMergedChannels - before;
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
  const int blocks = prepare<T>(kernel, g, execution);
  kernel<<<blocks, T::kThreads, T::kSharedBytes, cudaStream_t(execution.stream)>>>(p, g, operands);
  CONVOPS_LAUNCH_CHECK("tma_im2col");
}

template <typename E, bool kTurned>
void launch_shape(const ConvProblem& p, const PixelGemm& g, int shape,
                  const PixelOperands& operands, const Execution& execution) {
  const auto try_shape = [&]<int i>() {
    if (shape == i) launch<HalfTraits<E, kTurned, kPixelShapes[i]>>(p, g, operands, execution);
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_shape.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, int(std::size(kPixelShapes))>());
}

}  // namespace

void pack_groups(const ConvProblem& p, const void* weight, void* packed, void* stream) {
  const int64_t elements = p.out_channels() * p.kernel().h * p.kernel().w * kMergedChannels;
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

// tma_im2col of float32: TF32 tensor cores, one product for `tf32`, three of numbers in two parts
// for `ieee` (see tma_im2col.h for what is computed, tma_im2col.cuh for how data comes there).
//
// Consumers read their pixels from a stage into registers, split them there and multiply them from
// there; no pass over the tensors, and no more shared memory than the numbers as they are. The
// weight is split once, by a small kernel. A sum's products may be in any order: a lane takes four
// neighbouring channels with one load, and the packed weight has its k's in the order that results.
//
// TF32 has float32's range, so data needs no scales. What is too large for its parts, infinite or
// NaN makes a result that is not finite, and such results are computed again by their definition.
#include <cuda_runtime.h>

#include <iterator>
#include <utility>

#include "cuda/definition.cuh"
#include "cuda/launch.h"
#include "cuda/pixel_walk.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tf32_parts.cuh"
#include "cuda/tma_im2col.cuh"
#include "cuda/tma_im2col.h"

namespace convops::cuda {
namespace {

using namespace tma_im2col;

constexpr int kStepSums = 8;                 // of an instruction
constexpr int kUnitSums = kPackedFloatSums;  // of a lane's load, two instructions
constexpr int kUnitSteps = kUnitSums / kStepSums;
constexpr int kUnits = map_channels(sizeof(float)) / kUnitSums;  // of a stage

// Which channel is k of an instruction: lanes k % 4 loaded four each, two for every instruction.
CONVOPS_HOST_DEVICE constexpr int packed_channel(int place) {
  const int step = place / kStepSums, k = place % kStepSums;
  return k % 4 * 4 + step * 2 + k / 4;
}

template <int kParts, PixelShape kShape>
using FloatTraits = Traits<float, false, kParts, kShape, 0, kWarpgroup>;

// A warp's pixels: rows lane / 4 of an instruction, and 8 more. Neighbours are 4 pixels apart, so
// that lanes that load together find their swizzled 16 bytes in different banks.
__device__ __forceinline__ int lane_pixel(int lane) { return lane / 8 + lane / 4 % 2 * 4; }

// What a lane has of a stage: of every unit two instructions' operands, in parts.
template <typename T>
struct StageOperand {
  static constexpr int kProducts = T::kParts == 1 ? 1 : 3;
  Tf32Operand<kProducts, 4> operand[kUnits][kUnitSteps];

  __device__ __forceinline__ void load(const uint8_t* pixels) {
    const int lane = int(threadIdx.x) % kWarp, pixel = lane_pixel(lane);
    const auto* const row = reinterpret_cast<const float4*>(pixels + pixel * kRowBytes);
    constexpr int kEightRows = 8 * kRowBytes / 16;
    float4 loaded[kUnits][2];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        loaded[unit][i] = row[((unit * 4 + lane % 4) ^ pixel % 8) + i * kEightRows];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4& four = loaded[unit][i];
        operand[unit][0].set(i, four.x);
        operand[unit][0].set(i + 2, four.y);
        operand[unit][1].set(i, four.z);
        operand[unit][1].set(i + 2, four.w);
      }
    // Or the instructions that use them wait for each other.
#pragma unroll
    for (auto& unit : operand)
#pragma unroll
      for (auto& step : unit)
#pragma unroll
        for (auto& part : step.part)
#pragma unroll
          for (uint32_t& value : part) ptx::keep(value);
  }
  __device__ __forceinline__ void multiply(float (&sums)[T::kShape.channels / 2],
                                           ptx::LaidMatrix weight) const {
    constexpr int kStepVectors = kStepSums * 4 / 16, kPartVectors = T::kPartBytes / 16;
    ptx::wgmma_fence();
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int step = 0; step < kUnitSteps; ++step, weight.low += kStepVectors) {
        const auto& parts = operand[unit][step].part;
        const bool adds = T::kParts == 1 || unit + step > 0;  // to what is not promoted
        if constexpr (T::kParts > 1) {
          // The small products first: after them little is cut off.
          ptx::wgmma_tf32(sums, parts[0], {weight.low + kPartVectors, weight.high}, adds);
          ptx::wgmma_tf32(sums, parts[1], weight, 1);
        }
        ptx::wgmma_tf32(sums, parts[0], weight, T::kParts > 1 || adds);
      }
    ptx::wgmma_commit();
  }
};

// A lane's results: two channels of every eight, of two pixels.
template <typename T>
__device__ __forceinline__ void store(const ConvProblem& p, const PixelGemm& g,
                                      const PixelOperands& operands, const Tile& tile,
                                      const float (&sums)[T::kShape.channels / 2]) {
  constexpr float kUnscale = 1 / (kTf32Scale * kTf32Scale);
  constexpr int kEights = T::kShape.channels / 8;
  const int warp = int(threadIdx.x) % T::kTeam / kWarp, lane = int(threadIdx.x) % kWarp;
  const int first = tile.pixel + warp * kWarpPixels + lane_pixel(lane);
  const int channel = tile.channel + lane % 4 * 2;
  const auto* const bias = static_cast<const float*>(operands.bias);
  const auto bias_of = [&](int at) { return bias ? bias[at * g.bias_stride] : 0.f; };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pixel = first + 8 * i;
    if (pixel >= tile.phase.pixels) continue;
    const Place place(tile.phase, pixel);
    float* const result = static_cast<float*>(operands.result) + place.image * g.image_stride +
                          place.h(g, tile.phase) * g.row_stride +
                          place.w(g, tile.phase) * g.column_stride + channel;
    bool finite = true;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      if (channel + 8 * j >= g.channels) continue;
      const float2 sum{fmaf(sums[4 * j + 2 * i], kUnscale, bias_of(channel + 8 * j)),
                       fmaf(sums[4 * j + 2 * i + 1], kUnscale, bias_of(channel + 8 * j + 1))};
      *reinterpret_cast<float2*>(result + 8 * j) = sum;
      finite = finite && isfinite(sum.x) && isfinite(sum.y);
    }
    if (finite) continue;
#pragma unroll 1
    for (int j = 0; j < 2 * kEights; ++j) {
      const int at = j / 2 * 8 + j % 2;
      if (channel + at >= g.channels || isfinite(result[at])) continue;
      const auto element_of = [&](auto define) {
        return define(p, static_cast<const float*>(operands.source),
                      static_cast<const float*>(operands.weight), int64_t{place.image},
                      int64_t{channel + at}, int64_t{place.h(g, tile.phase)},
                      int64_t{place.w(g, tile.phase)});
      };
      result[at] = p.direction == Direction::kForward
                       ? element_of(forward_element<float>) + bias_of(channel + at)
                       : element_of(backward_input_element<float>);
    }
  }
}

template <typename T>
__device__ __forceinline__ void consume(const ConvProblem& p, const PixelGemm& g,
                                        const PixelOperands& operands, Header& header,
                                        uint8_t* shared) {
  const int warp = int(threadIdx.x) % T::kTeam / kWarp;
  const bool leads = threadIdx.x % kWarp == 0;
  Stage<T::kStages> stage;
  int turn = 0;
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x, ++turn) {
    const Tile tile = Tile::find<T::kShape>(g, index);
    const int count = steps<T>(g, tile.phase);
    if (!take_turn<T>(header, turn, count, stage)) continue;
    float sums[T::kShape.channels / 2], totals[T::kShape.channels / 2];
#pragma unroll
    for (int i = 0; i < T::kShape.channels / 2; ++i) sums[i] = totals[i] = 0;
    Stage<T::kStages> used = stage;  // whose instructions may not have ended
    const auto finish = [&](bool any) {
      ptx::wgmma_wait<0>();
      if (any) {
        if (leads) ptx::barrier_arrive(&header.empty[used.index]);
        used.next();
      }
      // Of two parts: tensor cores truncate every addition (ptx/truncation.h), here up to 12.
      if constexpr (T::kParts > 1)
#pragma unroll
        for (int i = 0; i < T::kShape.channels / 2; ++i) totals[i] += sums[i];
    };
    // While the stage before is multiplied this one is loaded and split.
    const auto multiply_stage = [&](int step, StageOperand<T>& operand) {
      const uint8_t* const source = shared + T::kStagesAt + stage.index * T::kStageBytes;
      const auto weight = uint32_t(__cvta_generic_to_shared(source + T::kSourceBytes));
      ptx::barrier_wait(&header.full[stage.index], stage.parity);
      operand.load(source + warp * kWarpPixels * kRowBytes);
      finish(step > 0);
      operand.multiply(sums, ptx::boxes(weight, 0));
      stage.next();
    };
    StageOperand<T> even, odd;
#pragma unroll 1
    for (int step = 0; step < count; step += 2) {
      multiply_stage(step, even);
      if (step + 1 == count) break;
      multiply_stage(step + 1, odd);
    }
    pass_turn<T>(header, leads);
    finish(count > 0);
    store<T>(p, g, operands, tile, T::kParts > 1 ? totals : sums);
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    tma_im2col_float_kernel(const __grid_constant__ ConvProblem p,
                            const __grid_constant__ PixelGemm g,
                            const __grid_constant__ PixelOperands operands) {
  extern __shared__ __align__(1024) uint8_t shared[];
  // The kernel that packs the weight may not have ended.
  if (threadIdx.x == T::kConsumers) ptx::wait_for_prerequisites();
  run_block<T>(g, operands, shared,
               [&](Header& header) { consume<T>(p, g, operands, header, shared); });
}

// What sums lose until they are promoted, on average: the weights are as much larger. (Zeros behind
// the channels lose nothing, nor do those of other groups.)
float mean_loss(const ConvProblem& p, const PixelGemm& g) {
  const int64_t sums = g.merged ? p.group_in_channels() : g.sums;
  const int units = int(ceil_divide(sums, kUnitSums)), rest = units % kUnits;
  const float held = float((units - rest) * kUnits + rest * rest) / float(units);
  return ptx::lost_by(3 * kUnitSteps * held);
}

constexpr int kPackThreads = 256;
template <int kParts>
__global__ void __launch_bounds__(kPackThreads)
    pack_floats_kernel(const __grid_constant__ ConvProblem p, const __grid_constant__ PixelGemm g,
                       const float* weight, float* packed, int64_t part_floats, float loss) {
  ptx::launch_dependents();
  const int64_t place = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (place >= part_floats) return;
  const int64_t sums = round_up(g.sums, kUnitSums), k = place % sums, line = place / sums;
  const int64_t taps = p.kernel().h * p.kernel().w, row = line / taps, tap = line % taps;
  const int64_t sum = k / kUnitSums * kUnitSums + packed_channel(int(k % kUnitSums));
  const int64_t channel = sum + (g.merged ? row / kMergedChannels * kMergedChannels : 0);
  const bool forward = p.direction == Direction::kForward;
  const int64_t out = forward ? row : channel, in = forward ? channel : row;
  const int64_t group = in / p.group_in_channels();
  const auto& stride = p.weight.stride;
  float value = 0;
  if (sum < g.sums && out / p.group_out_channels() == group)
    value = weight[out * stride[0] + (in - group * p.group_in_channels()) * stride[1] +
                   tap / p.kernel().w * stride[2] + tap % p.kernel().w * stride[3]];
  if (kParts > 1) value = fmaf(value, loss, value);
  const auto parts = Tf32Parts < kParts == 1 ? 1 : 4 > ::of(value);
#pragma unroll
  for (int i = 0; i < kParts; ++i) packed[i * part_floats + place] = __uint_as_float(parts.part[i]);
}

template <int kParts>
void launch_shape(const ConvProblem& p, const PixelGemm& g, int shape,
                  const PixelOperands& operands, const Execution& execution) {
  const auto try_shape = [&]<int i>() {
    using T = FloatTraits<kParts, kFloatPixelShapes[i]>;
    if constexpr (float_shape_serves(kFloatPixelShapes[i], kParts))
      if (shape == i) {
        const auto kernel = tma_im2col_float_kernel<T>;
        launch_early(kernel, prepare<T>(kernel, g, execution), T::kThreads, T::kSharedBytes,
                     execution, p, g, operands);
      }
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_shape.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, int(std::size(kFloatPixelShapes))>());
}

}  // namespace

void pack_floats(const ConvProblem& p, const PixelGemm& g, const void* weight, void* packed,
                 void* stream) {
  const int64_t floats =
      int64_t{g.channels} * p.kernel().h * p.kernel().w * round_up(g.sums, kUnitSums);
  const auto blocks = unsigned(ceil_divide(floats, kPackThreads));
  const auto kernel = float_parts(p) == 1 ? pack_floats_kernel<1> : pack_floats_kernel<2>;
  kernel<<<blocks, kPackThreads, 0, cudaStream_t(stream)>>>(p, g, static_cast<const float*>(weight),
                                                            static_cast<float*>(packed), floats,
                                                            mean_loss(p, g));
  CONVOPS_LAUNCH_CHECK("tma_im2col weights");
}

void multiply_float_pixels(const ConvProblem& p, const PixelGemm& g, int shape,
                           const PixelOperands& operands, const Execution& execution) {
  (float_parts(p) == 1 ? launch_shape<1> : launch_shape<2>)(p, g, shape, operands, execution);
}

}  // namespace convops::cuda

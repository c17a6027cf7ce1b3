// The weights of implicit_gemm as its main kernel streams them. A block of threads packs one result
// channel: finds its largest weight, scales by a power of two, rounds or splits into fp16 (weights
// of 16 bits stay what they are) and writes
//
//   packed[unit][sum class][sum block][step][plane][row][8 halves]
//
// A plane is an octet of the sum at a tap: of a step two of high parts, then two of low parts. A
// step's weights for a block of rows are one contiguous piece of shared memory this way, in the
// layout wgmma reads. It is done anew in every call: 0.02 ms, and nothing can be out of date.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/check.h"
#include "cuda/implicit_gemm.h"
#include "cuda/implicit_gemm_scale.cuh"
#include "cuda/ptx/truncation.h"

namespace convops::cuda {
namespace {

using implicit_gemm::choose_scale;
using implicit_gemm::Scale;

constexpr int kThreads = 256;
// Random weights have a few channels below GemmProblem::smallest, which do no harm; many are no
// accident.
constexpr int kRareChannels = 64;  // one in so many
constexpr int kTapsOfLane = 4;     // of a channel, whose taps up to 32 lanes share

template <typename E>
constexpr bool kIsFloat = std::is_same_v<E, float>;

// Bits of the magnitude of a row's weight number `tap` of channel k.
__device__ uint32_t magnitude_bits(const GemmProblem& g, const float* weight, int k, int tap) {
  const int h = g.by_kernel_w.quotient(tap), w = tap - h * g.w.kernel;
  const float x = weight[k * g.weight_sum_stride + h * g.weight_h_stride + w * g.weight_w_stride];
  return __float_as_uint(x) & 0x7fffffff;
}

// The scale of a row; by all threads of the block.
__device__ Scale find_scale(const GemmProblem& g, const float* weight) {
  const int taps = g.h.kernel * g.w.kernel, weights = g.sums * taps;
  uint32_t largest = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < weights; i += kThreads) {
    const int k = g.by_window.quotient(i);
    largest = max(largest, magnitude_bits(g, weight, k, i - k * taps));
  }
  __shared__ uint32_t warps[kThreads / 32];
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (const uint32_t other : warps) largest = max(largest, other);
  Scale scale = choose_scale(largest);

  // Channels that are tiny, each looked at by a group of lanes.
  int lanes = 1, tiny = 0;
  while (lanes < 32 && lanes * kTapsOfLane < taps) lanes *= 2;
  for (int first = 0; first < g.sums; first += kThreads / lanes) {
    const int k = first + int(threadIdx.x) / lanes;
    uint32_t channel = 0;
    if (k < g.sums)
#pragma unroll 4
      for (int tap = threadIdx.x & (lanes - 1); tap < taps; tap += lanes)
        channel = max(channel, magnitude_bits(g, weight, k, tap));
    for (int apart = lanes / 2; apart > 0; apart /= 2)
      channel = max(channel, __shfl_xor_sync(~0u, channel, apart));
    const float scaled = __uint_as_float(channel) * scale.factor;
    tiny += __syncthreads_count(channel > 0 && scaled < g.smallest);
  }
  scale.fits &= tiny / lanes * kRareChannels <= g.sums;
  return scale;
}

// The weights of an octet of the sum from k on, at a tap, for a row. E: float, or 16 bits.
template <typename E>
__device__ void read_octet(const GemmProblem& g, const E* weight, const GemmRow& row, int sum_class,
                           int k, const GemmTap& tap, E (&values)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {  // no load waits for another
    const GemmSum sum = gemm_sum(g, sum_class, k + i);
    const int h = g.h.tap(row.phase_h, sum.phase_h, tap.h + g.h.first);
    const int w = g.w.tap(row.phase_w, sum.phase_w, tap.w + g.w.first);
    const bool exists = k + i < g.class_sums && min(h, w) >= 0;
    const int64_t place =
        sum.channel * g.weight_sum_stride + h * g.weight_h_stride + w * g.weight_w_stride;
    values[i] = exists ? weight[place] : E{0};
  }
}

// What sums of so many steps lose until they are promoted: the mean of all products.
__device__ float mean_loss(int steps, int products) {
  const int most = promoted_steps(products), rest = steps % most;
  const float held = float((steps - rest) * most + rest * rest) / float(steps);
  return ptx::lost_by(float(products) * held);
}

// High parts and what they leave, of weights as much larger as their sums will become smaller.
__device__ void split_octet(const float (&values)[kOctet], float factor, float loss,
                            __half2 (&high)[4], __half2 (&low)[4]) {
  const auto scaled = [=](float value) {
    value *= factor;
    return fmaf(value, loss, value);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = scaled(values[2 * i]), b = scaled(values[2 * i + 1]);
    high[i] = __floats2half2_rn(a, b);
    const float2 rounded = __half22float2(high[i]);
    low[i] = __floats2half2_rn(a - rounded.x, b - rounded.y);
  }
}

// Grid: x result channels of a group, y groups.
template <typename E>
__global__ void __launch_bounds__(kThreads)
    pack_weights_kernel(const __grid_constant__ GemmProblem g, const __grid_constant__ GemmTile t,
                        const __grid_constant__ GemmOperands operands) {
  const int channel = blockIdx.x, group = blockIdx.y;
  const E* const weight = static_cast<const E*>(operands.weight) + group * g.weight_group_stride +
                          channel * g.weight_row_stride;
  Scale scale{};
  if constexpr (kIsFloat<E>) {
    scale = find_scale(g, weight);
    if (threadIdx.x == 0)
      operands.row_scales[group * g.rows + channel] =
          scale.fits ? scale.magnitude : -scale.magnitude;
  }
  const int blocks = gridDim.x * gridDim.y, block = group * gridDim.x + channel;
  for (int i = block * kThreads + threadIdx.x; i < t.jobs; i += blocks * kThreads)
    operands.bad_jobs[i] = 0;

  const int planes = kStepOctets * (g.products == 3 ? 2 : 1);
  const int phases_h = g.row_classes > 1 ? 1 : g.h.block;
  for (int row_class = 0; row_class < g.row_classes; ++row_class) {
    const int steps = g.steps(row_class), first = g.step_begin[row_class][0];
    const float loss = mean_loss(steps, g.products);
    for (int phase = 0; phase < phases_h * g.w.block; ++phase) {
      const int row = find_gemm_row(g, channel, phase / g.w.block, phase % g.w.block);
      const GemmRow where = gemm_row(g, row_class, row);
      const GemmJob job{group, row_class, row / t.row_tile, 0, 0};
      uint4* const packed = reinterpret_cast<uint4*>(operands.packed_weights) +
                            gemm_weight_step(g, t, job) * planes * t.row_tile + row % t.row_tile;
      for (int i = threadIdx.x; i < kStepOctets * steps; i += kThreads) {
        const int step = i / kStepOctets, plane = i % kStepOctets;
        int sum_class = 0;
        while (step >= (g.step_begin[row_class][sum_class + 1] - first) * g.sum_blocks) ++sum_class;
        const int begin = g.step_begin[row_class][sum_class];
        const int count = g.step_count(row_class, sum_class);
        const int rest = step - (begin - first) * g.sum_blocks;
        // The second plane is the block's next octet or, where it has one, the next tap.
        const int octet = rest / count * g.octets + plane % g.octets;
        const int tap = (begin + rest % count) * g.step_taps() + plane % g.step_taps();
        alignas(uint4) E values[kOctet];
        read_octet(g, weight, where, sum_class, octet * kOctet, g.taps[tap], values);
        uint4* const place = packed + (int64_t(step) * planes + plane) * t.row_tile;
        if constexpr (kIsFloat<E>) {
          __half2 high[4], low[4];
          split_octet(values, scale.factor, loss, high, low);
          *place = *reinterpret_cast<const uint4*>(high);
          if (planes > kStepOctets)
            place[kStepOctets * t.row_tile] = *reinterpret_cast<const uint4*>(low);
        } else {
          *place = *reinterpret_cast<const uint4*>(values);
        }
      }
    }
  }
}

}  // namespace

void pack_weights(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands,
                  void* stream) {
  const dim3 grid(g.rows, g.groups);
  if (g.is_half())
    pack_weights_kernel<uint16_t><<<grid, kThreads, 0, cudaStream_t(stream)>>>(g, t, operands);
  else
    pack_weights_kernel<float><<<grid, kThreads, 0, cudaStream_t(stream)>>>(g, t, operands);
  CONVOPS_LAUNCH_CHECK("implicit_gemm weights");
}

}  // namespace convops::cuda

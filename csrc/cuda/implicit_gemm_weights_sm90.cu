// The weights of implicit_gemm as its main kernel streams them. A block of threads packs one result
// channel: finds its largest weight, scales by a power of two, rounds or splits into fp16 and
// writes
//
//   packed[unit][sum class][sum block][step][plane][row][8 halves]
//
// A plane is an octet of the sum at a tap: of a step two of high parts, then two of low parts. A
// step's weights for a block of rows are one contiguous piece of shared memory this way, in the
// layout wgmma reads. It is done anew in every call: 0.02 ms, and nothing can be out of date.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/implicit_gemm.h"
#include "cuda/implicit_gemm_scale.cuh"

namespace convops::cuda {
namespace {

using implicit_gemm::choose_scale;
using implicit_gemm::Scale;

constexpr int kThreads = 256;
// Random weights have a few channels below GemmProblem::smallest, which do no harm; many are no
// accident.
constexpr int kRareChannels = 64;  // one in so many

// Bits of the largest |w| of a channel of the sum.
__device__ uint32_t channel_max(const GemmProblem& g, const float* weight, int k) {
  uint32_t largest = 0;
#pragma unroll 4
  for (int h = 0; h < g.h.kernel; ++h)
#pragma unroll 4
    for (int w = 0; w < g.w.kernel; ++w)
      largest =
          max(largest,
              __float_as_uint(
                  weight[k * g.weight_sum_stride + h * g.weight_h_stride + w * g.weight_w_stride]) &
                  0x7fffffff);
  return largest;
}

// The scale of a row; by all threads of the block.
__device__ Scale find_scale(const GemmProblem& g, const float* weight) {
  uint32_t largest = 0;
  for (int k = threadIdx.x; k < g.sums; k += kThreads)
    largest = max(largest, channel_max(g, weight, k));
  __shared__ uint32_t warps[kThreads / 32];
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (const uint32_t other : warps) largest = max(largest, other);
  Scale scale = choose_scale(largest);

  int tiny = 0;
  for (int first = 0; first < g.sums; first += kThreads) {
    const int k = first + threadIdx.x;
    const uint32_t channel = k < g.sums ? channel_max(g, weight, k) : 0;
    const float scaled = __uint_as_float(channel) * scale.factor;
    tiny += __syncthreads_count(channel > 0 && scaled < g.smallest);
  }
  scale.fits &= tiny * kRareChannels <= g.sums;
  return scale;
}

// An octet of the sum from k on, at a tap, for a row: high parts and what they leave.
__device__ void pack_octet(const GemmProblem& g, const float* weight, const GemmRow& row,
                           int sum_class, int k, const GemmTap& tap, float factor,
                           __half2 (&high)[4], __half2 (&low)[4]) {
  float values[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    values[i] = 0;
    if (k + i >= g.class_sums) continue;
    const GemmSum sum = gemm_sum(g, sum_class, k + i);
    const int h = g.h.tap(row.phase_h, sum.phase_h, tap.h + g.h.first);
    const int w = g.w.tap(row.phase_w, sum.phase_w, tap.w + g.w.first);
    if (h >= 0 && w >= 0)
      values[i] =
          factor *
          weight[sum.channel * g.weight_sum_stride + h * g.weight_h_stride + w * g.weight_w_stride];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    const float2 rounded = __half22float2(high[i]);
    low[i] = __floats2half2_rn(values[2 * i] - rounded.x, values[2 * i + 1] - rounded.y);
  }
}

// Grid: x result channels of a group, y groups.
__global__ void __launch_bounds__(kThreads)
    pack_weights_kernel(const __grid_constant__ GemmProblem g, const __grid_constant__ GemmTile t,
                        const __grid_constant__ GemmOperands operands) {
  const int channel = blockIdx.x, group = blockIdx.y;
  const float* const weight =
      operands.weight + group * g.weight_group_stride + channel * g.weight_row_stride;
  const Scale scale = find_scale(g, weight);
  if (threadIdx.x == 0)
    operands.row_scales[group * g.rows + channel] = scale.fits ? scale.magnitude : -scale.magnitude;
  const int blocks = gridDim.x * gridDim.y, block = group * gridDim.x + channel;
  for (int i = block * kThreads + threadIdx.x; i < t.jobs; i += blocks * kThreads)
    operands.bad_jobs[i] = 0;

  const int planes = kStepOctets * (g.products == 3 ? 2 : 1);
  const int phases_h = g.row_classes > 1 ? 1 : g.h.block;
  for (int row_class = 0; row_class < g.row_classes; ++row_class) {
    const int steps = g.steps(row_class), first = g.step_begin[row_class][0];
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
        __half2 high[4], low[4];
        pack_octet(g, weight, where, sum_class, octet * kOctet, g.taps[tap], scale.factor, high,
                   low);
        uint4* const place = packed + (int64_t(step) * planes + plane) * t.row_tile;
        *place = *reinterpret_cast<const uint4*>(high);
        if (planes > kStepOctets)
          place[kStepOctets * t.row_tile] = *reinterpret_cast<const uint4*>(low);
      }
    }
  }
}

}  // namespace

void pack_weights(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands,
                  void* stream) {
  pack_weights_kernel<<<dim3(g.rows, g.groups), kThreads, 0, cudaStream_t(stream)>>>(g, t,
                                                                                     operands);
  CONVOPS_LAUNCH_CHECK("implicit_gemm weights");
}

}  // namespace convops::cuda

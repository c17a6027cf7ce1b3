// The last kernel of implicit_gemm: the jobs whose data fp16 cannot carry, once more in float32.
//
// The main kernel splits floats into fp16 parts with one scale for a job. NaN, Inf and ranges wider
// than fp16's do not survive that; where it meets them it sets the job's byte in bad_jobs, and of
// 16 bits where a sum is not finite, because it multiplies zeros that the definition does not. This
// kernel follows it on the stream, always, since only the device knows the flags, and computes
// every result of those jobs from the convolution's definition and the tensors themselves.
//
// Every block scans all the flags and deals out the same pieces of bad jobs in the same order, one
// to a block in turn. So one bad job keeps many blocks busy, many share the chip evenly, and
// without any the kernel ends after a glance. A piece is kRows channels of kThreads results; a
// thread sums its results over taps, then source channels, in the same order whatever the piece.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/check.h"
#include "cuda/implicit_gemm.h"
#include "cuda/types.cuh"

namespace convops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocksPerProcessor = 2;   // a third would leave too few registers for values[]
constexpr int kRows = 8;                 // channels of a thread: 8 FMA for a load of the source
constexpr int kSums = kThreads / kRows;  // source channels of a step: a thread stages one weight
constexpr int kFlags = 16;               // a thread reads at once: mostly all flags in one go

// Channels are computed kRows at a time, of one vertical phase of the cells: chunk (phase, i)
// starts at channel i · kRows. These are the chunks that a job's rows touch. What they hold besides
// comes out exact as well, whoever else computes it.
struct Chunks {
  int first, count;
};
CONVOPS_HOST_DEVICE int phase_chunks(const GemmProblem& g) { return (g.rows + kRows - 1) / kRows; }
CONVOPS_HOST_DEVICE Chunks touched_chunks(const GemmProblem& g, const GemmTile& t, int row_block) {
  const int begin = row_block * t.row_tile, end = begin + t.row_tile;
  const int last = (end < g.class_rows ? end : g.class_rows) - 1;
  // As in gemm_row: horizontal phases first, then channels, then vertical phases. Channels sorted
  // by kinds stay among themselves: they are 8 rows of each kind.
  static_assert(64 % (8 << kMostChannelKindsLog) == 0,
                "blocks of rows are whole groups of sorted channels");
  const auto chunk = [&](int row) {
    const int line = row / g.w.block;
    return line / g.rows * phase_chunks(g) + line % g.rows / kRows;
  };
  return {chunk(begin), chunk(last) - chunk(begin) + 1};
}

// A job's results in one channel and vertical phase. Those that read the same sources along W under
// backward-input's stride are neighbours, so that whole warps skip the taps of the others.
struct Pixels {
  int step, columns, count;
  CONVOPS_HOST_DEVICE Pixels(const GemmProblem& g, const GemmTile& t)
      : step(g.w.transposed ? g.w.stride : 1),
        columns((t.width * g.w.block + step - 1) / step),
        count(step * t.tile_rows * columns) {}
  CONVOPS_HOST_DEVICE int pieces() const { return (count + kThreads - 1) / kThreads; }
};

// Where a result reads the source for a tap of the kernel, along one axis; -1: nowhere.
__device__ __forceinline__ int source_index(const GemmAxis& axis, int result, int tap, int size) {
  const int reach = tap * axis.dilation - axis.padding;
  if (axis.transposed && (result - reach) % axis.stride != 0) return -1;
  const int index = axis.transposed ? (result - reach) / axis.stride : result * axis.stride + reach;
  return index >= 0 && index < size ? index : -1;
}

// One piece of a job. All threads of the block take part, those without a result as well.
template <typename E>
__device__ __forceinline__ void compute(const GemmProblem& g, const GemmTile& t,
                                        const GemmOperands& operands, const GemmJob& job,
                                        int piece) {
  const Pixels pixels(g, t);
  const Chunks chunks = touched_chunks(g, t, job.row_block);
  const int chunk = chunks.first + piece / pixels.pieces();
  if (chunk >= chunks.first + chunks.count) return;
  const int phase_h = g.row_classes > 1 ? job.row_class : chunk / phase_chunks(g);
  const int first_channel = chunk % phase_chunks(g) * kRows;

  // The thread's result.
  const Tensor4 &source = g.source, &result = g.result;
  const int pixel = piece % pixels.pieces() * kThreads + int(threadIdx.x);
  const int line = pixel / pixels.columns, rows = t.tile_rows;
  const int row = job.row + line % rows, image = row / t.image_rows, cell = row % t.image_rows;
  const int column = pixel % pixels.columns * pixels.step + line / rows;
  const int h = cell * g.h.block + phase_h - g.h.result_origin, w = job.column * g.w.block + column;
  const bool valid = pixel < pixels.count && column < t.width * g.w.block && image < g.images &&
                     cell < g.cells_h && h >= 0 && h < result.size[2] && w < result.size[3];
  const int64_t first_sum = int64_t(job.group) * g.sums, first_row = int64_t(job.group) * g.rows;
  const E* image_source = static_cast<const E*>(operands.source) + image * source.stride[0] +
                          first_sum * source.stride[1];

  // The weight that the thread stages in every step.
  const int staged_sum = threadIdx.x % kSums, staged_row = threadIdx.x / kSums;
  const int staged_end = first_channel + staged_row < g.rows ? g.sums : 0;
  const E* weight = static_cast<const E*>(operands.weight) + job.group * g.weight_group_stride +
                    staged_sum * g.weight_sum_stride +
                    (first_channel + staged_row) * g.weight_row_stride;
  __shared__ __align__(16) float weights[kSums][kRows];

  float sums[kRows] = {};
  for (int kh = 0; kh < g.h.kernel; ++kh)
    for (int kw = 0; kw < g.w.kernel; ++kw) {
      const int source_h = source_index(g.h, h, kh, int(source.size[2]));
      const int source_w = source_index(g.w, w, kw, int(source.size[3]));
      const bool inside = valid && source_h >= 0 && source_w >= 0;
      // Padding is zeros that are multiplied: times an infinite weight they are NaN. A gradient has
      // no products outside.
      const bool counts = g.h.transposed ? inside : valid;
      if (!__syncthreads_or(counts)) continue;
      const E* from = image_source + source_h * source.stride[2] + source_w * source.stride[3];
      const E* tap_weight = weight + kh * g.weight_h_stride + kw * g.weight_w_stride;
      for (int k0 = 0; k0 < g.sums; k0 += kSums) {
        // All loads of the step are on their way before the first is waited for.
        const int count = min(kSums, g.sums - k0);
        const float own = k0 + staged_sum < staged_end
                              ? convert<float>(tap_weight[k0 * g.weight_sum_stride])
                              : 0.0f;
        float values[kSums];
#pragma unroll
        for (int k = 0; k < kSums; ++k, from += source.stride[1])
          values[k] = inside && k < count ? convert<float>(*from) : 0.0f;
        __syncthreads();
        weights[staged_sum][staged_row] = own;
        __syncthreads();
        if (!counts) continue;
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
          if (k == count) break;
#pragma unroll
          for (int i = 0; i < kRows; ++i) sums[i] = fmaf(values[k], weights[k][i], sums[i]);
        }
      }
    }

  if (!valid) return;
  E* to = static_cast<E*>(operands.result) + image * result.stride[0] + h * result.stride[2] +
          w * result.stride[3];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first_channel + i >= g.rows) return;
    const int64_t channel = first_row + first_channel + i;
    const auto* const biases = static_cast<const E*>(operands.bias);
    const float bias = biases ? convert<float>(biases[channel * g.bias_stride]) : 0.0f;
    to[channel * result.stride[1]] = convert<E>(sums[i] + bias);
  }
}

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    recompute_kernel(const __grid_constant__ GemmProblem g, const __grid_constant__ GemmTile t,
                     const __grid_constant__ GemmOperands operands, int pieces) {
  __shared__ uint32_t bad[kFlags * kWarps];  // a bit for every flag of a scan
  int turn = int(blockIdx.x);                // pieces from the next bad job's first to this block's
  for (int first = 0; first < t.jobs; first += kFlags * kThreads) {
    uint32_t flags = 0;
#pragma unroll
    for (int i = 0; i < kFlags; ++i) {
      const int job = first + i * kThreads + int(threadIdx.x);
      if (job < t.jobs && operands.bad_jobs[job]) flags |= 1u << i;
    }
    if (!__syncthreads_or(flags)) continue;
#pragma unroll
    for (int i = 0; i < kFlags; ++i) {
      const uint32_t mask = __ballot_sync(~0u, flags >> i & 1);
      if (threadIdx.x % 32 == 0) bad[i * kWarps + threadIdx.x / 32] = mask;
    }
    __syncthreads();
    for (int word = 0; word < kFlags * kWarps; ++word)
      for (uint32_t mask = bad[word]; mask; mask &= mask - 1) {
        const int job = first + word * 32 + __ffs(mask) - 1;
        for (; turn < pieces; turn += int(gridDim.x))
          compute<E>(g, t, operands, gemm_job(g, t, job), turn);
        turn -= pieces;
      }
  }
}

}  // namespace

void recompute_bad_jobs(const GemmProblem& gemm, const GemmTile& tile, const GemmOperands& operands,
                        int processors, void* stream) {
  if (tile.jobs == 0) return;
  int chunks = 0;  // the most of any job: where it touches fewer, some of its pieces are empty
  for (int row_block = 0; row_block < tile.row_blocks; ++row_block)
    chunks = std::max(chunks, touched_chunks(gemm, tile, row_block).count);
  const int pieces = chunks * Pixels(gemm, tile).pieces();
  const auto grid = unsigned(
      std::min<int64_t>(int64_t(processors) * kBlocksPerProcessor, int64_t(tile.jobs) * pieces));
  const auto launch = [&]<typename E>(E) {
    recompute_kernel<E><<<grid, kThreads, 0, cudaStream_t(stream)>>>(gemm, tile, operands, pieces);
  };
  if (gemm.dtype == DType::kFloat32)
    launch(float{});
  else if (gemm.dtype == DType::kFloat16)
    launch(__half{});
  else
    launch(__nv_bfloat16{});
  CONVOPS_LAUNCH_CHECK("implicit_gemm exact");
}

}  // namespace convops::cuda

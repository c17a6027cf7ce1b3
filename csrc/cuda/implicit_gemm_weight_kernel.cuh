// The kernels of implicit_gemm_weight: gradients of the weight, out channels × (channels × taps),
// as a product over all pixels of all images on Hopper's tensor cores, in fp16 parts.
//
// A block sums some taps of 128 or 64 out channels and 8 to 64 channels over a share of all rows of
// grad_output, and keeps these sums in registers until its last row. A stage is 96 pixels of a row,
// or several narrow rows:
//
//   grad_output  ──copy engine──►  raw stages  ──consumers──►  registers, fp16: A
//   input  ──converters──►  cells of 8 channels, fp16, a ring of rows: B
//
// (16 bits are not converted: there movers bring the input.)
//
// Both operands have pixels as k. A tensor core's A may be in registers, where a lane's pixels are
// neighbours in grad_output's rows: it needs no transposition, and each number is converted by the
// one thread that uses it. B lies as cells, one pixel's eight channels in 16 bytes: k is the cell,
// so a tap to the right is the same operand 16 bytes further, and the rows of a kernel are more
// columns of the same instruction: the ring's rows are as far apart as octets of a row. (A 1×1
// kernel has more channels in their place.) Every number of the input is converted once for all
// taps and out channels of the block.
//
// Every row of an out channel's and every row of the input has its own power of two as scale; a
// stage's sums leave the tensor cores, which cut bits off, with both. The second kernel computes
// again what the first found fp16 cannot hold. docs/implicit_gemm_weight.md tells how fast.
#pragma once

#include <iterator>
#include <utility>

#include "cuda/check.h"
#include "cuda/implicit_gemm_weight_consumers.cuh"
#include "cuda/implicit_gemm_weight_movers.cuh"
#include "cuda/implicit_gemm_weight_producers.cuh"

namespace convops::cuda::implicit_gemm_weight {

template <typename T>
__global__ void __launch_bounds__(T::kWarps* kWarp, 1)
    sum_kernel(const __grid_constant__ WeightGemm g,
               const __grid_constant__ WeightOperands operands) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Header& header = *reinterpret_cast<Header*>(shared);
  uint8_t* const cells = shared + kHeader;
  uint8_t* const input = cells + T::kParts * T::kPartBytes;
  uint8_t* const raw = shared + T::kRawAt;
  if (threadIdx.x == 0) {
    header.place = Place(g, T::kTile, int(blockIdx.x));
    for (int i = 0; i < T::kStages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.raw_full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.raw_scaled[i], T::kScalerWarps * kWarp);
      ::cuda::ptx::mbarrier_init(&header.raw_empty[i], kConsumerWarps * kWarp);
    }
    for (int i = 0; i < T::ring(g); ++i) {
      ::cuda::ptx::mbarrier_init(&header.cells_full[i],
                                 T::kHalf ? T::kPieces * kWarp : min(T::kCells, T::pitch(g)));
      ::cuda::ptx::mbarrier_init(&header.cells_empty[i], kConsumerWarps);
    }
    for (int i = 0; T::kHalf && i < kRawPieces; ++i) {
      ::cuda::ptx::mbarrier_init(&header.input_full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.input_empty[i], kWarp);
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __syncthreads();

  const Place& place = header.place;
  const int warp = int(threadIdx.x) / kWarp;
  if (warp < kConsumerWarps) {
    ptx::raise_registers<T::kConsumerRegisters>();
    run_consumers<T>(g, operands, place, header, cells, raw);
  } else {
    ptx::lower_registers<T::kProducerRegisters>();
    if constexpr (T::kHalf)
      run_producers<T>(g, operands, place, header, cells, input, raw);
    else if (warp >= T::kConverters)
      run_converters<T>(g, operands, place, header, cells, reinterpret_cast<float*>(input));
    else
      run_scalers<T>(g, operands, place, header, raw);
  }
}

// The sums of bad blocks by fused multiply-adds, a thread each; zeros outside the input are
// multiplied. Grid: blocks of the first kernel, shares of their sums.
constexpr int kExactThreads = 256, kExactShares = 16;
template <typename E>
__global__ void __launch_bounds__(kExactThreads, 2)
    exact_kernel(const __grid_constant__ WeightGemm g,
                 const __grid_constant__ WeightOperands operands,
                 const __grid_constant__ Tensor4 grad, WeightTile tile) {
  if (operands.bad_blocks[blockIdx.x] == 0) return;
  const Place place(g, tile, int(blockIdx.x));
  const int taps = tile.kernel_h * tile.kernel_w, pairs = tile.out_channels() * tile.channels();
  for (int i = int(blockIdx.y) * kExactThreads + int(threadIdx.x); i < pairs * taps;
       i += kExactShares * kExactThreads) {
    const int tap = i % taps, pair = i / taps;
    const int tap_h = place.tap_h + tap / tile.kernel_w;
    const int tap_w = place.tap_w + tap % tile.kernel_w;
    const int k = place.channel + pair % tile.channels();
    const int out_channel = place.out_channel + pair / tile.channels();
    const int64_t to = g.weight(g.taps(place.group, out_channel, k), tap_h, tap_w);
    if (to < 0) continue;
    const int line = g.by_phases.quotient(k), phase = k - line * g.phases();
    const int channel = sort_kinds(line, g.input_kinds.channels_log, kOctetLog);
    const int top = tap_h * g.dilation_h * g.stride_h + g.by_phases_w.quotient(phase) - g.padding_h;
    const int left =
        tap_w * g.dilation_w * g.stride_w + g.by_phases_w.remainder(phase) - g.padding_w;
    const E* const input = static_cast<const E*>(operands.input) +
                           (int64_t(place.group) * g.group_channels() + channel) * g.channel_stride;
    const E* const gradients =
        static_cast<const E*>(operands.grad) +
        (int64_t(place.group) * g.out_channels + out_channel) * grad.stride[1];
    float total = 0;
    for (Rows row(g, place); !row.done(); row.next(g)) {
      const int h = row.y * g.stride_h + top;
      const E* const x = input + row.image * g.image_stride + h * g.row_stride;
      const E* const dy = gradients + row.image * grad.stride[0] + row.y * grad.stride[2];
      float sum = 0;
      for (int at = row.x; at < min(row.x + kStagePixels, g.out_width); ++at) {
        const int w = at * g.stride_w + left;
        const bool inside = unsigned(h) < unsigned(g.height) && unsigned(w) < unsigned(g.width);
        sum = fmaf(inside ? convert<float>(x[w * g.column_stride]) : 0.f,
                   convert<float>(dy[at * grad.stride[3]]), sum);
      }
      total += sum;
    }
    operands.partial[place.split * g.weights() + to] = total;
  }
}

template <typename T>
void launch(const WeightGemm& g, const WeightOperands& operands, cudaStream_t stream) {
  const auto kernel = sum_kernel<T>;
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  kernel<<<g.tiles() * g.splits, T::kWarps * kWarp, T::kSharedBytes, stream>>>(g, operands);
  CONVOPS_LAUNCH_CHECK("implicit_gemm backward-weight");
}

// There is a kernel for each tile.
template <typename E, int kProducts>
void sum_parts(const WeightGemm& g, const WeightTile& tile, const WeightOperands& operands,
               const Tensor4& grad, void* stream) {
  const auto on = cudaStream_t(stream);
  const int blocks = g.tiles() * g.splits;
  CONVOPS_CUDA_CHECK(cudaMemsetAsync(operands.bad_blocks, g.is_astray, blocks, on));
  constexpr int kTiles =
      int(sizeof(E) == 2 ? std::size(kHalfWeightTiles) : std::size(kFloatWeightTiles));
  const auto try_tile = [&]<int i>() {
    constexpr WeightTile kTile = sizeof(E) == 2 ? kHalfWeightTiles[i] : kFloatWeightTiles[i];
    if (tile == kTile && !g.is_astray) launch<Traits<kTile, E, kProducts>>(g, operands, on);
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_tile.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kTiles>());
  exact_kernel<E><<<dim3(blocks, kExactShares), kExactThreads, 0, on>>>(g, operands, grad, tile);
  CONVOPS_LAUNCH_CHECK("implicit_gemm backward-weight, exact");
}

}  // namespace convops::cuda::implicit_gemm_weight

// The main kernel of implicit_gemm: dense convolution of float32 tensors on Hopper's tensor cores.
//
// A persistent block of 16 or 20 warps walks over jobs (a block of rows on a tile of cells, see
// implicit_gemm.h); its warps pass data on through rings of stages in shared memory:
//
//   loader      1 warp   source → raw ring (bulk copies)
//   converters  6 or 10  two groups that take stages by turns: raw ring (or, by cp.async, source) →
//                        scaled, rounded or split into fp16 → source ring
//   streamer    1 warp   packed weights → weight ring (bulk copies), or all of them once
//   consumers   8 warps  two warpgroups: source ring × weight ring → registers → result
//
// What makes it fast: an element of the source is converted once for all kernel_h · kernel_w taps.
// In the source ring a cell's 8 channels are 16 bytes and cells lie one after the other, which is
// wgmma's K-major layout without swizzle; there a tap is nothing but another start address. An
// instruction sums two such octets of channels at a tap or, of tiles that reach far, one octet at
// two.
//
// What makes it accurate: x = high + low in fp16, 22 bits; high·high + high·low + low·high are
// three products (ieee), high·high alone has TF32's 11 bits (tf32). fp16's range is met by a power
// of two for each source stage, from its largest element, and one for each row of the weight. The
// tensor core adds with 25 bits and cuts the rest off, so after at most promoted_steps steps its
// sums are added to float32 registers, where the stage's scale comes out again. Data that one scale
// does not fit (and NaN and Inf) mark the job; implicit_gemm_exact_sm90.cu computes it again.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <type_traits>
#include <utility>

#include "cuda/check.h"
#include "cuda/implicit_gemm_consumers.cuh"
#include "cuda/implicit_gemm_converters.cuh"
#include "cuda/implicit_gemm_transposers.cuh"

namespace convops::cuda::implicit_gemm {

template <typename T>
__device__ __forceinline__ void run_streamer(const GemmProblem& g, const GemmTile& t,
                                             const GemmOperands& operands, uint8_t* shared,
                                             const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  if (t.resident_bytes > 0) {
    const GemmJob job = gemm_job(g, t, blockIdx.x);
    ptx::copy_bulk(shared + memory.weights,
                   operands.packed_weights + gemm_weight_step(g, t, job) * T::kWeightBytes,
                   g.steps(job.row_class) * T::kWeightBytes, &header.weights_full[0]);
    return;
  }
  Stage stage;
  for (int index = blockIdx.x; index < t.jobs; index += gridDim.x) {
    const GemmJob job = gemm_job(g, t, index);
    const uint8_t* packed = operands.packed_weights + gemm_weight_step(g, t, job) * T::kWeightBytes;
    for (int sum_class = 0; sum_class < g.sum_classes; ++sum_class)
      for (int block = 0; block < g.sum_blocks; block += t.depth) {
        int steps = min(t.depth, g.sum_blocks - block) * g.step_count(job.row_class, sum_class);
        for (; steps > 0; steps -= T::kSteps) {
          const int bytes = min(steps, T::kSteps) * T::kWeightBytes;
          ptx::barrier_wait(&header.weights_empty[stage.index()], stage.parity() ^ 1);
          ptx::copy_bulk(shared + memory.weights + stage.index() * T::kWeightStageBytes, packed,
                         bytes, &header.weights_full[stage.index()]);
          packed += bytes;
          stage.next(t.weight_stages);
        }
      }
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    implicit_gemm_kernel(const __grid_constant__ GemmProblem g, const __grid_constant__ GemmTile t,
                         const __grid_constant__ GemmOperands operands,
                         const __grid_constant__ GemmSharedMemory memory) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Header& header = *reinterpret_cast<Header*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < t.weight_stages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.weights_full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.weights_empty[i], T::kConsumers * 4);
    }
    for (int i = 0; i < t.source_stages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.source_full[i], t.direct ? 1 : T::kConverterThreads);
      ::cuda::ptx::mbarrier_init(&header.source_empty[i], T::kConsumers * 4);
    }
    for (int i = 0; i < t.raw_stages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.raw_full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.raw_empty[i], T::kConverterThreads);
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  if constexpr (T::kHalf) {
    // What is multiplied for nothing must be finite too (store_results).
    auto* const cells = reinterpret_cast<uint4*>(shared + memory.sources);
    for (int i = threadIdx.x; i < t.source_stages * t.stage_cells; i += T::kThreads)
      cells[i] = make_uint4(0, 0, 0, 0);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp;
  constexpr int kStreamer = T::kConsumers * 4, kLoader = kStreamer + 1, kConverters = kLoader + 1;
  if (warp < kStreamer) {
    ptx::raise_registers<T::kConsumerRegisters>();
    run_consumers<T>(g, t, operands, shared, memory);
  } else {
    ptx::lower_registers<T::kProducerRegisters>();
    if (warp >= kConverters) {
      const int group = (warp - kConverters) / T::kConverterWarps;
      if constexpr (T::kHalf)
        run_transposers<T>(g, t, operands, shared, memory, group);
      else
        run_converters<T>(g, t, operands, shared, memory, group);
    } else if (threadIdx.x % kWarp == 0) {
      if (warp == kStreamer)
        run_streamer<T>(g, t, operands, shared, memory);
      else if (T::kHalf && t.direct)
        run_direct_loader<T>(g, t, operands, shared, memory);
      else if (t.bulk)
        run_loader<T>(g, t, operands, shared, memory);
    }
  }
}

template <typename T>
void launch(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands, int processors,
            cudaStream_t stream) {
  const GemmSharedMemory memory(t);
  const auto kernel = implicit_gemm_kernel<T>;
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedMemory));
  kernel<<<min(t.jobs, processors), T::kThreads, memory.bytes, stream>>>(g, t, operands, memory);
  CONVOPS_LAUNCH_CHECK("implicit_gemm");
}

// Launches the kernel of the tile: there is an instantiation for each of gemm_shapes and both row
// tiles.
template <typename E, int kProducts>
void launch_tile(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands,
                 int processors, void* stream) {
  bool launched = false;
  const auto try_tile = [&]<int kRowTile, GemmShape kShape>() {
    if (t.row_tile != kRowTile || t.columns != kShape.columns || t.consumers != kShape.consumers)
      return;
    launched = true;
    launch<Traits<E, kProducts, kRowTile, kShape>>(g, t, operands, processors,
                                                   cudaStream_t(stream));
  };
  constexpr auto kShapes = gemm_shapes(sizeof(E));
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_tile.template operator()<64, kShapes[i]>(), ...);
    (try_tile.template operator()<128, kShapes[i]>(), ...);
  }(std::make_integer_sequence<int, int(kShapes.size())>());
  if (!launched) throw std::logic_error("implicit_gemm has no kernel for its tile");
}

}  // namespace convops::cuda::implicit_gemm

// The consumers of implicit_gemm's main kernel: source ring × weight ring → registers → result.
#pragma once

#include "cuda/implicit_gemm_results.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace convops::cuda::implicit_gemm {

// The instructions of a step: a = weights, b = source, whose low parts are `part` cells after the
// high ones; the small products first.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[T::kColumns / 2], ptx::Matrix a,
                                              ptx::Matrix b, int part, int accumulate) {
  if constexpr (T::kProducts == 3) {
    const ptx::Matrix a_low = a + kStepOctets * T::kRowTile, b_low = b + part;
    ptx::wgmma(sums, a, b_low, accumulate);
    ptx::wgmma(sums, a_low, b, 1);
    ptx::wgmma(sums, a, b, 1);
  } else {
    ptx::wgmma(sums, a, b, accumulate);
  }
}

template <typename T>
__device__ __forceinline__ void run_consumers(const GemmProblem& g, const GemmTile& t,
                                              const GemmOperands& operands, uint8_t* shared,
                                              const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  const int warp = of_warp(threadIdx.x / kWarp), group = warp / 4;
  const bool leads = threadIdx.x % kWarp == 0;

  // Warpgroups share a job: each has 64 of the rows, or half of the cells.
  const ptx::Matrix a0 = ptx::matrix(uint32_t(__cvta_generic_to_shared(shared + memory.weights)) +
                                         (T::kRowTile == 128 ? group * 64 * 16 : 0),
                                     T::kRowTile * 16);
  const ptx::Matrix b0 = ptx::matrix(uint32_t(__cvta_generic_to_shared(shared + memory.sources)) +
                                         (T::kRowTile == 128 ? 0 : group * t.height * t.pitch * 16),
                                     0);  // every step tells how far apart its octets are

  float* const staged =
      reinterpret_cast<float*>(shared + memory.staged) + warp * t.staged_halves * t.staged_floats;
  Stage source, weights, released;
  const auto release_weights = [&] {
    if (leads) ptx::barrier_arrive(&header.weights_empty[released.index()]);
    released.next(t.weight_stages);
  };

  const bool stay = t.resident_bytes > 0;
  if (stay) ptx::barrier_wait(&header.weights_full[0], 0);
  int noted = -1;
  bool rows_fit = true;
  float totals[T::kColumns / 2];
  for (int index = blockIdx.x; index < t.jobs; index += gridDim.x) {
    const GemmJob job = gemm_job(g, t, index);
    // Most blocks' jobs are all on the same rows of the weight.
    const int unit = t.by_units.remainder(index);
    if (unit != noted) rows_fit = note_rows<T>(g, operands, job, header.rows[warp]);
    noted = unit;
    // A job with a channel whose weights fp16 cannot hold is bad whatever its source.
    if (!rows_fit) operands.bad_jobs[index] = 1;
    // Instructions set `sums` before they add to them; that they begin here tells the compiler that
    // storing may have their registers.
    float sums[T::kColumns / 2];
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; ++i) {
      totals[i] = 0;
      asm("" : "=f"(sums[i]));
    }

    ptx::Matrix resident = a0;  // the next step's weights, where they stay
    for (int sum_class = 0; sum_class < g.sum_classes; ++sum_class) {
      const int begin = g.step_begin[job.row_class][sum_class];
      const int end = g.step_begin[job.row_class][sum_class + 1];
      if (begin == end) continue;
      for (int block = 0; block < g.sum_blocks; block += t.depth) {
        ptx::barrier_wait(&header.source_full[source.index()], source.parity());
        // Read by the lane that says later that the stage is free.
        const float unit = __shfl_sync(~0u, leads ? header.source_unit[source.index()] : 0.0f, 0);
        const int steps = min(t.depth, g.sum_blocks - block) * (end - begin);
        ptx::Matrix b = b0 + source.index() * t.stage_cells;
        for (int step = 0, at = begin; step < steps;) {
          // Both warpgroups promote as often, but the second has its short turn first: while one
          // adds up its sums, the other multiplies.
          const int turn = step == 0 && group == 1
                               ? ((steps - 1) % kPromotedSteps / T::kSteps + 1) * T::kSteps
                               : kPromotedSteps;
          const int promoted = T::kProducts == 3 ? min(steps - step, turn) : steps - step;
          int i = 0;
          const auto multiply_next = [&](ptx::Matrix a) {
            multiply_step<T>(sums, a, b + g.step_cells[at], t.part, i > 0);
            ++i;
            if (++at == end) {
              at = begin;
              b = b + t.part * T::kParts;
            }
          };
          const auto next_weights = [&] {
            ptx::barrier_wait(&header.weights_full[weights.index()], weights.parity());
            return a0 + weights.index() * (kWeightStageBytes / 16);
          };
          // Whole stages of weights, then what is left; or all of it, without waiting.
#pragma unroll 1
          while (!stay && i + T::kSteps <= promoted) {
            const ptx::Matrix a = next_weights();
            ptx::wgmma_fence();
#pragma unroll
            for (int j = 0; j < T::kSteps; ++j) multiply_next(a + j * (T::kWeightBytes / 16));
            ptx::wgmma_commit();
            weights.next(t.weight_stages);
            ptx::wgmma_wait<1>();
            if (i > T::kSteps) release_weights();
          }
          if (i < promoted) {
            ptx::Matrix a = stay ? resident : next_weights();
#pragma unroll 1
            do {
              ptx::wgmma_fence();
              multiply_next(a);
              ptx::wgmma_commit();
              a = a + T::kWeightBytes / 16;
            } while (i < promoted);
            if (stay)
              resident = a;
            else
              weights.next(t.weight_stages);
          }
          ptx::wgmma_wait<0>();
          while (released.place != weights.place) release_weights();
          step += promoted;
#pragma unroll
          for (int i = 0; i < T::kColumns / 2; ++i) totals[i] = fmaf(sums[i], unit, totals[i]);
        }
        if (leads) ptx::barrier_arrive(&header.source_empty[source.index()]);
        source.next(t.source_stages);
      }
    }
    __syncwarp();
    store_results<T>(g, t, operands, job, header.rows[warp], staged, totals);
  }
  ptx::store_wait();
}

}  // namespace convops::cuda::implicit_gemm

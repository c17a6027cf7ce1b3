// The consumers of implicit_gemm's main kernel: source ring × weight ring → registers → result.
#pragma once

#include "cuda/implicit_gemm_results.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace convops::cuda::implicit_gemm {

// The instructions of a step: a = weights, b = source, whose low parts are `part` cells after the
// high ones; the small products first.
template <typename T, typename B>
__device__ __forceinline__ void multiply_step(float (&sums)[T::kColumns / 2], ptx::Matrix a, B b,
                                              int part, int accumulate) {
  if constexpr (T::kProducts == 3) {
    const ptx::Matrix a_low = a + kStepOctets * T::kRowTile, b_low = b + part;
    ptx::wgmma(sums, a, b_low, accumulate);
    ptx::wgmma(sums, a_low, b, 1);
    ptx::wgmma(sums, a, b, 1);
  } else if constexpr (std::is_same_v<typename T::Element, __nv_bfloat16>) {
    ptx::wgmma_bf16(sums, a, b, accumulate);
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

  // Warpgroups share a job: each has 64 of the rows and a part of the cells.
  const ptx::Matrix a0 = ptx::matrix(
      uint32_t(__cvta_generic_to_shared(shared + memory.weights)) + T::row_group(group) * 64 * 16,
      T::kRowTile * 16);
  const int group_cells = T::cell_group(group) * t.height * t.pitch;
  const ptx::Matrix b0 = ptx::matrix(uint32_t(__cvta_generic_to_shared(shared + memory.sources)) +
                                         group_cells * t.cell_octets() * 16,
                                     0);  // every step tells how far apart its octets are

  uint8_t* const staged = shared + memory.staged + warp * t.staged_halves * t.staged_bytes;
  // Stages whose instructions are not known to have ended are not released yet.
  Stage source, weights, used_source, used_weights;
  // Releases all stages before `weights_place` and the one of the source.
  const auto release = [&](uint32_t weights_place) {
    while (used_weights.place != weights_place) {
      if (leads) ptx::barrier_arrive(&header.weights_empty[used_weights.index()]);
      used_weights.next(t.weight_stages);
    }
    if (used_source.place != source.place) {
      if (leads) ptx::barrier_arrive(&header.source_empty[used_source.index()]);
      used_source.next(t.source_stages);
    }
  };
  const auto finish = [&] {
    ptx::wgmma_wait<0>();
    release(weights.place);
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

    // `sums` are of `held` steps, of `most` at the most, in multiples of `sums_unit`.
    int held = 0, most = T::kHalf                    ? kMaxExtent
                         : group == 1 && t.staggered ? T::kFirstSteps
                                                     : T::kSumSteps;
    float sums_unit = 0;
    const auto promote = [&] {
      finish();
      if (held == 0) return;
#pragma unroll
      for (int i = 0; i < T::kColumns / 2; ++i) totals[i] = fmaf(sums[i], sums_unit, totals[i]);
    };
    ptx::Matrix resident = a0;  // the next step's weights, where they stay
    for (int sum_class = 0; sum_class < g.sum_classes; ++sum_class) {
      const int begin = g.step_begin[job.row_class][sum_class];
      const int end = g.step_begin[job.row_class][sum_class + 1];
      if (begin == end) continue;
      for (int block = 0; block < g.sum_blocks; block += t.depth) {
        // Converters may wait for the stage before. A warpgroup's warps wait for their instructions
        // together or not at all.
        if (!ptx::sync_threads_and<4 * kWarp>(
                kGroupBarrier + group,
                ptx::barrier_passed(&header.source_full[source.index()], source.parity())))
          finish();
        ptx::barrier_wait(&header.source_full[source.index()], source.parity());
        // Read by the lane that says later that the stage is free.
        const float stage_unit =
            T::kHalf ? sums_unit
                     : __shfl_sync(~0u, leads ? header.source_unit[source.index()] : 0.0f, 0);
        const ptx::Matrix b = b0 + source.index() * t.stage_cells;
        int at = begin * t.depth;  // in the list of steps
        for (int left = min(t.depth, g.sum_blocks - block) * (end - begin); left > 0;) {
          // A sum goes on in the next stage, but for another unit; it ends where weights' stages
          // do.
          if (!T::kHalf && (held + min(left, T::kSteps) > most || stage_unit != sums_unit)) {
            promote();
            if (held > 0) most = T::kSumSteps;
            held = 0;
            sums_unit = stage_unit;
          }
          const int room = most - held, count = room < left ? room / T::kSteps * T::kSteps : left;
          left -= count;
          // Of the next `steps` steps; the ring's next stage, or where weights stay.
          const auto next_weights = [&](int steps) {
            ptx::Matrix a = resident;
            if (stay) {
              resident = resident + steps * (T::kWeightBytes / 16);
            } else {
              ptx::barrier_wait(&header.weights_full[weights.index()], weights.parity());
              a = a0 + weights.index() * (T::kWeightStageBytes / 16);
              weights.next(t.weight_stages);
            }
            return a;
          };
          const auto multiply = [&](ptx::Matrix a, int steps) {
            ptx::wgmma_fence();
#pragma unroll
            for (int j = 0; j < steps; ++j) {
              const ptx::Matrix step = b + g.step_cells[at + j];
              multiply_step<T>(sums, a + j * (T::kWeightBytes / 16), T::laid(step, t), t.part,
                               j > 0 || held > 0);
            }
            ptx::wgmma_commit();
            at += steps;
            held += steps;
          };
          // Whole stages of weights, then what is left.
#pragma unroll 1
          for (int stages = count / T::kSteps; stages > 0; --stages) {
            const uint32_t before = weights.place;
            multiply(next_weights(T::kSteps), T::kSteps);
            ptx::wgmma_wait<1>();
            release(before);
          }
          if (const int rest = count % T::kSteps) {
            const uint32_t before = weights.place;
            ptx::Matrix a = next_weights(rest);
#pragma unroll 1
            for (int i = rest; i > 0; --i, a = a + T::kWeightBytes / 16) {
              multiply(a, 1);
              ptx::wgmma_wait<1>();
              release(before);
            }
          }
        }
        source.next(t.source_stages);
      }
    }
    if constexpr (T::kHalf) {
      finish();
      if (held == 0)
        for (float& sum : sums) sum = 0;
      __syncwarp();
      if (!store_results<T>(g, t, operands, job, header.rows[warp], staged, sums))
        operands.bad_jobs[index] = 1;
    } else {
      promote();
      __syncwarp();
      store_results<T>(g, t, operands, job, header.rows[warp], staged, totals);
    }
  }
  ptx::store_wait();
}

}  // namespace convops::cuda::implicit_gemm

// The consumers of implicit_gemm's main kernel: source ring × weight ring → registers → result.
#pragma once

#include "cuda/implicit_gemm_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace convops::cuda::implicit_gemm {

// The instructions of a tap: a = weights, b = source; the small products first.
template <typename T>
__device__ __forceinline__ void multiply_tap(float (&sums)[T::kColumns / 2], ptx::Matrix a,
                                             ptx::Matrix b, int plane, int accumulate) {
  if constexpr (T::kProducts == 3) {
    const ptx::Matrix a_low = a + 2 * T::kRowTile, b_low = b + 2 * plane;  // 16 bytes a row or cell
    ptx::wgmma(sums, a, b_low, accumulate);
    ptx::wgmma(sums, a_low, b, 1);
    ptx::wgmma(sums, a, b, 1);
  } else {
    ptx::wgmma(sums, a, b, accumulate);
  }
}

// A row of the warpgroup's tile as its results need it.
struct RowPlace {
  float scale, bias;
  int64_t offset;  // of the row's first result in row 0 of its image's cells
  int phase_h;     // past every height where there is no such row
  int count;       // results in a row of the tile that lie in the tensor
};

static_assert(sizeof(RowPlace) == GemmSharedMemory::kRowPlaceBytes);

template <typename T>
__device__ __forceinline__ RowPlace find_row(const GemmProblem& g, const GemmTile& t,
                                             const GemmOperands& operands, const GemmJob& job) {
  const int warp = threadIdx.x / kWarp;
  const int row = job.row_block * T::kRowTile + (T::kRowTile == 128 ? warp * 16 : warp % 4 * 16) +
                  threadIdx.x % 16;
  // Rows that are none are staged like others: side by side with their neighbours.
  if (row >= g.class_rows) return {0, 0, t.woven ? row & (t.woven - 1) : 0, 1 << 30, 0};
  const GemmRow where = gemm_row(g, job.row_class, row);
  const int channel = job.group * g.rows + where.channel;
  const int left = int(g.result.size[3]) - job.column * g.w.block - where.phase_w;
  return {
      operands.row_scales[channel], operands.bias ? operands.bias[channel * g.bias_stride] : 0.f,
      channel * g.result.stride[1] + where.phase_h * g.result.stride[2] +
          (int64_t(job.column) * g.w.block + where.phase_w) * g.result.stride[3],
      where.phase_h,
      t.woven ? min(t.width * g.w.block, left) : min(t.width, (left + g.w.block - 1) / g.w.block)};
}

// The rows of cells a warpgroup computes, from the first one's place in its image.
struct ResultRows {
  int image, row;
  float* first;        // image's row in channel 0, column 0
  int64_t row_step;    // from cell to cell
  int64_t image_step;  // besides, where the next image begins

  __device__ ResultRows(const GemmProblem& g, const GemmTile& t, int tall_row, float* result) {
    image = t.by_image_rows.quotient(tall_row);
    row = t.by_image_rows.remainder(tall_row);
    row_step = g.h.block * g.result.stride[2];
    first = result + image * g.result.stride[0] + row * row_step;
    image_step = g.result.stride[0] - t.image_rows * row_step;
  }
  // Row r of the tile in the row of `place`; nullptr where it is not in the tensor.
  __device__ float* find(const GemmProblem& g, const GemmTile& t, const RowPlace& place,
                         int r) const {
    float* to = first + place.offset + r * row_step;
    int in_image = row + r, its_image = image;
    for (; in_image >= t.image_rows; in_image -= t.image_rows) {
      ++its_image;
      to += image_step;
    }
    return its_image < g.images && in_image < g.cells_h &&
                   in_image * g.h.block + place.phase_h < int(g.result.size[2])
               ? to
               : nullptr;
  }
};

// Floats between an address and the multiple of 16 bytes before it.
__device__ __forceinline__ int misalignment(const float* p) {
  return int(reinterpret_cast<uintptr_t>(p) / 4 % 4);
}

// Eight of the warp's rows to slots of shared memory: one for each row of the tile in each line, a
// line being the rows whose results are woven together. A slot's elements lie as far from a
// multiple of 16 bytes as they will in the result.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_results(const GemmTile& t, const ResultRows& rows,
                                              const RowPlace& place, int row, int half,
                                              float* staged,
                                              const float (&totals)[T::kColumns / 2]) {
  constexpr int kGroups = T::kColumns / 8, kBatch = 4;  // groups of eight columns
  const int woven_log = kPaired ? 0 : t.woven >> 1;     // of 1, 2 and 4
  const int phase = row & (t.woven - 1);
  float* const line = staged + (row >> woven_log) * t.line + phase;
  const int first = misalignment(rows.first + place.offset - phase);
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    const int begin = r * t.pitch;
    int skew = first + r * int(rows.row_step & 3);
    if (t.straddles) skew += t.by_image_rows.quotient(rows.row + r) * int(rows.image_step & 3);
    const int column = int(threadIdx.x % 4) * 2 - begin;
    float* const slot = line + r * t.slot + (skew & 3) + (column << woven_log);
#pragma unroll
    for (int batch = 0; batch < kGroups; batch += kBatch) {
      if (8 * (batch + kBatch) <= begin || 8 * batch >= begin + t.width) continue;
#pragma unroll
      for (int i = batch; i < batch + kBatch && i < kGroups; ++i) {
        const float a = totals[4 * i + 2 * half], b = totals[4 * i + 2 * half + 1];
        if constexpr (kPaired) {
          if (unsigned(column + 8 * i) < unsigned(t.width))
            *reinterpret_cast<float2*>(slot + 8 * i) = make_float2(a, b);
        } else {
          if (unsigned(column + 8 * i) < unsigned(t.width)) slot[8 * i << woven_log] = a;
          if (unsigned(column + 8 * i + 1) < unsigned(t.width)) slot[8 * i + 1 << woven_log] = b;
        }
      }
    }
  }
}

// Writes slots to the result: their whole vectors of 16 bytes by all lanes, one slot after another,
// what is left at the ends by one lane each.
__device__ __forceinline__ void store_slots(const GemmProblem& g, const GemmTile& t,
                                            const ResultRows& rows, const RowPlace* places,
                                            int lines, const float* staged) {
  const int lane = threadIdx.x % kWarp, slots = lines * t.height;
  for (int first = 0; first < slots; first += kWarp) {
    float* to = nullptr;
    int from = 0, vectors = 0;
    if (first + lane < slots) {
      const int line = t.by_height.quotient(first + lane), r = first + lane - line * t.height;
      const RowPlace& place = places[line * t.woven];
      to = rows.find(g, t, place, r);
      if (to) {
        const int skew = misalignment(to), head = min((4 - skew) & 3, place.count);
        from = line * t.line + r * t.slot + skew;
        vectors = (place.count - head) / 4;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (i < head) to[i] = staged[from + i];
          const int j = head + 4 * vectors + i;
          if (j < place.count) to[j] = staged[from + j];
        }
        to += head;
        from += head;
      }
    }
#pragma unroll 4
    for (int i = 0; i < min(slots - first, kWarp); ++i) {
      const int count = __shfl_sync(~0u, vectors, i);
      const auto* source = reinterpret_cast<const float4*>(staged + __shfl_sync(~0u, from, i));
      auto* destination =
          reinterpret_cast<float4*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(to), i));
      float4 a, b;
      if (lane < count) a = source[lane];
      if (lane + kWarp < count) b = source[lane + kWarp];
      if (lane < count) destination[lane] = a;
      if (lane + kWarp < count) destination[lane + kWarp] = b;
      for (int j = lane + 2 * kWarp; j < count; j += kWarp) destination[j] = source[j];
    }
  }
}

// Writes eight rows element by element, for results that are no neighbours in memory.
template <typename T>
__device__ __forceinline__ void store_apart(const GemmProblem& g, const GemmTile& t,
                                            const ResultRows& rows, const RowPlace* places,
                                            const float* staged) {
  const int64_t step = g.result.stride[3] * g.w.block;
#pragma unroll 1
  for (int row = 0; row < 8; ++row)
#pragma unroll 1
    for (int r = 0; r < t.height; ++r) {
      float* const to = rows.find(g, t, places[row], r);
      if (!to) continue;
      const float* const from = staged + row * T::kStagePitch + r * t.pitch;
#pragma unroll 1
      for (int i = threadIdx.x % kWarp; i < places[row].count; i += kWarp) to[i * step] = from[i];
    }
}

// The results of a warp's 16 rows, through its part of shared memory.
template <typename T>
__device__ __forceinline__ void store_results(const GemmProblem& g, const GemmTile& t,
                                              const GemmJob& job, const RowPlace* places,
                                              float* result, float* staged,
                                              float (&totals)[T::kColumns / 2]) {
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp / 4;
  const ResultRows rows(g, t, job.row + (T::kRowTile == 128 ? 0 : group * t.height), result);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPlace& place = places[8 * half + lane / 4];
#pragma unroll
    for (int i = 0; i < T::kColumns / 4; ++i) {
      float& total = totals[i / 2 * 4 + 2 * half + i % 2];
      total = fmaf(total, place.scale, place.bias);
    }
    if (!t.woven) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < T::kColumns / 8; ++i)
        *reinterpret_cast<float2*>(&staged[lane / 4 * T::kStagePitch + 8 * i + lane % 4 * 2]) =
            make_float2(totals[4 * i + 2 * half], totals[4 * i + 2 * half + 1]);
      __syncwarp();
      store_apart<T>(g, t, rows, places + 8 * half, staged);
      continue;
    }
    __syncwarp();
    if (t.paired)
      stage_results<T, true>(t, rows, place, lane / 4, half, staged, totals);
    else
      stage_results<T, false>(t, rows, place, lane / 4, half, staged, totals);
    __syncwarp();
    store_slots(g, t, rows, places + 8 * half, 8 / t.woven, staged);
  }
}

template <typename T>
__device__ __forceinline__ void run_consumers(const GemmProblem& g, const GemmTile& t,
                                              const GemmOperands& operands, uint8_t* shared,
                                              const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  const int warp = threadIdx.x / kWarp, group = warp / 4;
  const bool leads = threadIdx.x % kWarp == 0;
  float* const staged =
      reinterpret_cast<float*>(shared + memory.staged + warp * t.staged_floats * 4);
  RowPlace* const places =
      reinterpret_cast<RowPlace*>(shared + GemmSharedMemory::kRowPlaces) + warp * 16;

  // Warpgroups share a job: each has 64 of the rows, or half of the cells.
  const ptx::Matrix a0 = ptx::matrix(uint32_t(__cvta_generic_to_shared(shared + memory.weights)) +
                                         (T::kRowTile == 128 ? group * 64 * 16 : 0),
                                     T::kRowTile * 16);
  const ptx::Matrix b0 = ptx::matrix(uint32_t(__cvta_generic_to_shared(shared + memory.sources)) +
                                         (T::kRowTile == 128 ? 0 : group * t.height * t.pitch * 16),
                                     t.plane * 16);

  Stage source, weights, released;
  const auto release_weights = [&] {
    if (leads) ptx::barrier_arrive(&header.weights_empty[released.index]);
    released.next(t.weight_stages);
  };

  float totals[T::kColumns / 2];
  for (int index = blockIdx.x; index < t.jobs; index += gridDim.x) {
    const GemmJob job = gemm_job(g, t, index);
    __syncwarp();
    if (threadIdx.x % kWarp < 16) places[threadIdx.x % kWarp] = find_row<T>(g, t, operands, job);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; ++i) totals[i] = 0;

    for (int sum_class = 0; sum_class < g.sum_classes; ++sum_class) {
      const int begin = g.tap_begin[job.row_class][sum_class];
      const int end = g.tap_begin[job.row_class][sum_class + 1];
      if (begin == end) continue;
      for (int block = 0; block < g.sum_blocks; block += t.depth) {
        ptx::barrier_wait(&header.source_full[source.index], source.parity);
        const float unit = header.source_unit[source.index] * kSumUnit;
        const int steps = min(t.depth, g.sum_blocks - block) * (end - begin);
        ptx::Matrix b = b0 + source.index * t.depth * t.plane * T::kPlanes;
        for (int step = 0, tap = begin; step < steps;) {
          float sums[T::kColumns / 2];  // the first instruction does not add to it
          const int promoted = T::kProducts == 3 ? min(steps - step, kPromotedTaps) : steps - step;
#pragma unroll 1
          for (int i = 0; i < promoted; ++i) {
            const int offset = g.taps[tap].offset;
            ptx::barrier_wait(&header.weights_full[weights.index], weights.parity);
            ptx::wgmma_fence();
            multiply_tap<T>(sums, a0 + weights.index * (T::kWeightBytes / 16), b + offset, t.plane,
                            i > 0);
            ptx::wgmma_commit();
            weights.next(t.weight_stages);
            if (++tap == end) {
              tap = begin;
              b = b + t.plane * T::kPlanes;
            }
            ptx::wgmma_wait<T::kInFlight>();
            if (i >= T::kInFlight) release_weights();
          }
          ptx::wgmma_wait<0>();
          for (int i = min(promoted, T::kInFlight); i > 0; --i) release_weights();
          step += promoted;
#pragma unroll
          for (int i = 0; i < T::kColumns / 2; ++i) totals[i] = fmaf(sums[i], unit, totals[i]);
        }
        if (leads) ptx::barrier_arrive(&header.source_empty[source.index]);
        source.next(t.source_stages);
      }
    }
    store_results<T>(g, t, job, places, operands.result, staged, totals);
  }
}

}  // namespace convops::cuda::implicit_gemm

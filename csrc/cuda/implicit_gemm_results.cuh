// Out of registers: how the consumers of implicit_gemm's main kernel write their results. They go
// through shared memory, eight rows of the weight a warp at a time, and from there by the copy
// engine, while the warp multiplies on: in boxes of several channels where the tensor allows it, or
// row by row. Results that are no neighbours in memory are written one by one.
#pragma once

#include "cuda/implicit_gemm_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace convops::cuda::implicit_gemm {

// What all lanes have, so that the compiler knows it.
__device__ __forceinline__ int of_warp(int x) { return __shfl_sync(~0u, x, 0); }

// Whether the tile is the last in its row.
__device__ __forceinline__ bool ends_row(const GemmProblem& g, const GemmTile& t,
                                         const GemmJob& job) {
  return job.column + t.width >= g.cells_w;
}

// `row` counts from the first of the job's row class.
__device__ __forceinline__ RowPlace find_row(const GemmProblem& g, const GemmJob& job, int row) {
  if (row >= g.class_rows) return {-1, 0, 0};
  const GemmRow where = gemm_row(g, job.row_class, row);
  return {job.group * g.rows + where.channel, int16_t(where.phase_h - g.h.result_origin),
          int16_t(where.phase_w)};
}

// From a row's first result in the tile to the end of the tensor's row.
__device__ __forceinline__ int results_left(const GemmProblem& g, const GemmJob& job,
                                            const RowPlace& place) {
  return int(g.result.size[3]) - job.column * g.w.block - place.phase_w;
}

// A row of a tile in the tensor: of its image, of cells.
struct ResultRow {
  int image, cell;

  // The tensor's row of its image, for results of the place's phase.
  __device__ int h(const GemmProblem& g, const RowPlace& place) const {
    return cell * g.h.block + place.phase_h;
  }
  // Whether the tensor has them.
  __device__ bool exists(const GemmProblem& g, const RowPlace& place) const {
    return place.channel >= 0 && image < g.images && cell < g.cells_h &&
           unsigned(h(g, place)) < unsigned(g.result.size[2]);
  }
  // Offset in the result of the first in the tile.
  __device__ int64_t offset(const GemmProblem& g, const GemmJob& job, const RowPlace& place) const {
    const auto& stride = g.result.stride;
    return image * stride[0] + place.channel * stride[1] + h(g, place) * stride[2] +
           (job.column * g.w.block + place.phase_w) * stride[3];
  }
  // From where the tile begins there.
  __device__ int shift(const GemmProblem& g, const GemmTile& t, const RowPlace& place) const {
    if (t.overlap == 0) return 0;
    return t.to_border(place.channel * int(g.result.stride[1]) +
                       h(g, place) * int(g.result.stride[2]));
  }
};

// The rows of cells a warpgroup computes, from the first one's place in its image.
struct ResultRows {
  int image, row;

  __device__ ResultRows(const GemmTile& t, int tall_row)
      : image(t.by_image_rows.quotient(tall_row)), row(tall_row - image * t.image_rows) {}
  // Row r of them.
  __device__ ResultRow find(const GemmTile& t, int r) const {
    if (!t.straddles) return {image, row + r};
    const int below = t.by_image_rows.quotient(row + r);
    return {image + below, row + r - below * t.image_rows};
  }
};

// Elements between an address and the multiple of 16 bytes before it.
template <typename E>
__device__ __forceinline__ int misalignment(const E* p) {
  return int(reinterpret_cast<uintptr_t>(p) / sizeof(E) % vector_elements(sizeof(E)));
}

// Two neighbours, as they are stored together.
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
__device__ __forceinline__ void store_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}

// Where row r of the tile begins in a line of shared memory: as far from a multiple of 16 bytes as
// in the result.
template <typename E>
__device__ __forceinline__ int line_row(const GemmProblem& g, const GemmTile& t, const GemmJob& job,
                                        const ResultRows& rows, const RowPlace& place,
                                        const E* result, int r) {
  const auto misaligned = [&](const ResultRow& row) {
    return misalignment(result + row.offset(g, job, place));
  };
  const ResultRow row = rows.find(t, r);
  if (!t.joined) return r * t.slot + misaligned(row);
  const int between_images = int(g.result.stride[0]) - t.image_rows * int(g.result.stride[2]);
  return r * t.slot + misaligned(rows.find(t, 0)) +
         (row.image - rows.image) * (between_images & (vector_elements(sizeof(E)) - 1));
}

// Where a result of a lane lies among the eight rows that leave together.
struct LaneRow {
  int line, phase;  // of the channels; woven in the line, less the origin

  __device__ LaneRow(const GemmProblem& g, const GemmTile& t)
      : line((threadIdx.x % kWarp / 4) >> t.woven_log),
        phase(((threadIdx.x % kWarp / 4) & ((1 << t.woven_log) - 1)) - g.w.result_origin) {}
};

// Bits i of those elements first + i * step that lie in [0, count); -step < -first, 0 <= count.
__device__ __forceinline__ uint32_t elements_inside(int first, int step_log, int count) {
  const int before = (1 << step_log) - 1 - first;
  return ::cuda::ptx::bmsk_clamp(before >> step_log,
                                 (before + count >> step_log) - (before >> step_log));
}

// Writes those of a lane's results that are among `count` neighbours from column `first` on to
// to[0], ..., to[count - 1]. Of the tile's columns a thread has pairs, eight apart.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_row(typename T::Element* to, int first, int count,
                                          int woven_log, int phase, int half,
                                          const float (&totals)[T::kColumns / 2]) {
  if constexpr (kPaired) woven_log = 0;
  const int element = (int(threadIdx.x % 4) * 2 << woven_log) + phase - first;
  const int pair = 1 << woven_log, step_log = 3 + woven_log;
  const uint32_t inside = elements_inside(element, step_log, count);
  const uint32_t inside_too = kPaired ? 0 : elements_inside(element + pair, step_log, count);
  to += element;
  constexpr int kGroups = T::kColumns / 8, kBatch = kPaired ? kGroups : 4;
#pragma unroll
  for (int batch = 0; batch < kGroups; batch += kBatch) {
    if (kPaired || ((inside | inside_too) >> batch & ((1 << kBatch) - 1)) != 0) {
#pragma unroll
      for (int i = batch; i < batch + kBatch && i < kGroups; ++i) {
        const float a = totals[4 * i + 2 * half], b = totals[4 * i + 2 * half + 1];
        const int at = 8 * (i - batch) << woven_log;
        if constexpr (kPaired) {
          if (inside >> i & 1) store_pair(to + at, a, b);
        } else {
          if (inside >> i & 1) to[at] = convert<typename T::Element>(a);
          if (inside_too >> i & 1) to[at + pair] = convert<typename T::Element>(b);
        }
      }
    }
    // Step by step: multiples of what only the host knows would fill the registers.
    to += 8 * kBatch << woven_log;
  }
}

// Eight rows to boxes, one for each row of the tile. `place`: of the first row.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_boxes(const GemmProblem& g, const GemmTile& t,
                                            const LaneRow& lane, const ResultRows& rows,
                                            const RowPlace& place, int half,
                                            typename T::Element* staged,
                                            const float (&totals)[T::kColumns / 2]) {
  typename T::Element* box = staged + lane.line * t.box_pitch;
#pragma unroll 1
  for (int r = 0; r < t.height; ++r, box += t.box_elements)
    stage_row<T, kPaired>(box, (r * t.pitch << t.woven_log) + rows.find(t, r).shift(g, t, place),
                          t.box_width, t.woven_log, lane.phase, half, totals);
}

// What no box has is written directly: at the begin of a row of the tensor what lies before the
// first border, at its end what the last tile has besides its box, and what is no whole vector of
// 16 bytes, because the copy engine does not write less.
template <typename T>
__device__ __forceinline__ void store_edges(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const LaneRow& lane,
                                            const ResultRows& rows, const RowPlace& place, int half,
                                            typename T::Element* result,
                                            const float (&totals)[T::kColumns / 2]) {
  const int channel = lane.line << g.channel_kinds_log;
  if (place.channel < 0 || place.channel + channel >= int(g.result.size[1])) return;
  const int begin = job.column * g.w.block, width = int(g.result.size[3]);
  const bool last = ends_row(g, t, job);
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    const ResultRow at = rows.find(t, r);
    if (!at.exists(g, place)) continue;
    const int first = r * t.pitch << t.woven_log, shift = at.shift(g, t, place);
    auto* const row = result + at.offset(g, job, place) + channel * g.result.stride[1];
    if (begin == 0) stage_row<T, false>(row, first, shift, t.woven_log, lane.phase, half, totals);
    if (!last) continue;
    const int tail =
        min(shift + (width - shift) / T::kVector * T::kVector - begin, shift + t.box_width);
    stage_row<T, false>(row + tail, first + tail, width - begin - tail, t.woven_log, lane.phase,
                        half, totals);
  }
}

// Starts to copy boxes. All lanes know that they agree on the places: the instruction takes them
// from registers of the warp.
template <typename T>
__device__ __forceinline__ void copy_boxes(const GemmProblem& g, const GemmTile& t,
                                           const GemmJob& job, const ResultRows& rows,
                                           const RowPlace& place, const CUtensorMap* maps,
                                           const typename T::Element* staged) {
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    const ResultRow row = rows.find(t, r);
    const int h = row.h(g, place), row_kind = h & ((1 << t.row_kinds_log) - 1);
    const int channel_kind = place.channel & ((1 << g.channel_kinds_log) - 1);
    // A map begins with whole vectors, a box with a sector.
    const int column = job.column * g.w.block + (row.shift(g, t, place) & -T::kVector);
    const int32_t at[5] = {t.has_gaps() ? 0 : column, place.channel >> g.channel_kinds_log,
                           t.has_gaps() ? column / kGap : 0, h >> t.row_kinds_log, row.image};
    if (row.exists(g, place) && threadIdx.x % kWarp == 0)
      ptx::store_box(&maps[(row_kind << g.channel_kinds_log) + channel_kind], at,
                     staged + r * t.box_elements);
  }
}

// Eight rows to lines, one for each channel. `notes`: of the eight.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_lines(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const LaneRow& lane,
                                            const ResultRows& rows, const RowNote* notes, int half,
                                            const typename T::Element* result,
                                            typename T::Element* staged,
                                            const float (&totals)[T::kColumns / 2]) {
  // Rows that are none are staged like others.
  const RowPlace place = notes[lane.line << t.woven_log].place;
#pragma unroll 1
  for (int r = 0; r < t.height; ++r)
    stage_row<T, kPaired>(staged + lane.line * t.line + line_row(g, t, job, rows, place, result, r),
                          r * t.pitch << t.woven_log, t.width << t.woven_log, t.woven_log,
                          lane.phase, half, totals);
}

// Starts to copy lines, a run of contiguous results a lane: a row of the tile, or those that follow
// each other in an image. What is no whole vector of 16 bytes, at either end, is written at once.
template <typename T>
__device__ __forceinline__ void copy_lines(const GemmProblem& g, const GemmTile& t,
                                           const GemmJob& job, const ResultRows& rows,
                                           const RowNote* notes, typename T::Element* result,
                                           const typename T::Element* staged) {
  constexpr int kVector = T::kVector;
  const bool last = ends_row(g, t, job);
  for (int i = threadIdx.x % kWarp; i < (8 >> t.woven_log) * t.runs; i += kWarp) {
    const int line = t.by_runs.quotient(i);
    const RowPlace place = notes[line << t.woven_log].place;
    int r = i - line * t.runs, count = min(t.width * g.w.block, results_left(g, job, place));
    if (t.joined) {
      const int image = r * t.image_rows - rows.row;  // its first row in the tile
      r = max(0, image);
      count *= min(t.height, image + g.cells_h) - r;
    }
    if (count <= 0 || !rows.find(t, r).exists(g, place)) continue;
    auto* const to = result + rows.find(t, r).offset(g, job, place);
    const auto* const from = staged + line * t.line + line_row(g, t, job, rows, place, result, r);
    const int border = t.to_border(int(to - result)), begin = job.column == 0 ? 0 : border;
    const int end = last ? count : t.step * g.w.block + border;
    const int head = min(begin + (-misalignment(to + begin) & (kVector - 1)), end);
    const int tail = head + (end - head) / kVector * kVector;
#pragma unroll
    for (int j = 0; j < kVector - 1; ++j) {
      if (begin + j < head) to[begin + j] = from[begin + j];
      if (tail + j < end) to[tail + j] = from[tail + j];
    }
    if (head < tail) ptx::store_bulk(to + head, from + head, (tail - head) * int(sizeof *to));
  }
}

// Writes the results of eight rows one by one; the rows side by side, because in channels_last
// those are neighbours.
template <typename T>
__device__ __forceinline__ void store_apart(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const ResultRows& rows,
                                            const RowNote* notes, typename T::Element* result,
                                            const typename T::Element* staged) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = g.result.stride[3] * g.w.block;
  const RowPlace place = notes[lane % 8].place;
  const int count = min(t.width, (results_left(g, job, place) + g.w.block - 1) / g.w.block);
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    const ResultRow row = rows.find(t, r);
    if (!row.exists(g, place)) continue;
    auto* const to = result + row.offset(g, job, place);
    const auto* const from = staged + lane % 8 * T::kStagePitch + r * t.pitch;
#pragma unroll 1
    for (int i = lane / 8; i < count; i += kWarp / 8) to[i * step] = from[i];
  }
}

// Starts to copy a warpgroup's 64 rows as boxes of whole cells, for which its warps put their 16
// channels side by side: swizzled, so that eight cells of an octet lie in different banks.
template <typename T>
__device__ __forceinline__ void store_cells(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const ResultRows& rows,
                                            const CUtensorMap* map, uint8_t* staged,
                                            const float (&totals)[T::kColumns / 2]) {
  const int lane = threadIdx.x % kWarp, warp = of_warp(threadIdx.x / kWarp % 4);
  const int group = of_warp(threadIdx.x / (4 * kWarp)), bytes = t.cell_rows * 2;
  const int box_bytes = T::kColumns * bytes;
  // A lane's cell of eight, and of two times eight; the octets' places change with it.
  const int cell = lane % 8, octet = (warp * kRows & (t.cell_rows - 1)) / kOctet + lane / 8 % 2;
  const int swizzle = cell * bytes >> 7 & (bytes / 16 - 1);
  const uint32_t to = uint32_t(__cvta_generic_to_shared(staged)) +
                      warp * kRows / t.cell_rows * box_bytes + (lane / 16 * 8 + cell) * bytes +
                      (octet ^ swizzle) * 16;
  ptx::store_wait_read<0>();
  ptx::sync_threads<4 * kWarp>(kGroupBarrier + group);
#pragma unroll
  for (int i = 0; i < T::kColumns / 8; i += 2) {
    uint32_t matrices[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_pair(reinterpret_cast<typename T::Element*>(&matrices[j]), totals[4 * i + 2 * j],
                 totals[4 * i + 2 * j + 1]);
    ptx::store_transposed(to + i * 8 * bytes, matrices);
  }
  ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  ptx::sync_threads<4 * kWarp>(kGroupBarrier + group);
  const int first = job.row_block * T::kRowTile + T::row_group(group) * 64;
  const int boxes = 64 / t.cell_rows;
#pragma unroll 1
  for (int i = warp; i < t.height * boxes; i += 4) {
    const int r = i / boxes, box = i - r * boxes, line = first + box * t.cell_rows;
    const RowPlace place{line < g.rows ? job.group * g.rows + line : -1, 0, 0};
    const ResultRow row = rows.find(t, r);
    const int32_t at[5] = {place.channel, job.column, row.cell, row.image, 0};
    if (row.exists(g, place) && lane == 0)
      ptx::store_box(map, at, staged + box * box_bytes + r * t.pitch * bytes);
  }
  __syncwarp();
  ptx::store_commit();
}

// Notes a warp's rows; whether fp16 holds their weights (all lanes know).
template <typename T>
__device__ __forceinline__ bool note_rows(const GemmProblem& g, const GemmOperands& operands,
                                          const GemmJob& job, RowNote* notes) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncwarp();  // all lanes have read the last job's
  bool fits = true;
  if (lane < kRows) {
    const int group_warp = T::kConsumers == T::kRowGroups ? warp : warp % (T::kRowGroups * 4);
    const int row = job.row_block * T::kRowTile + group_warp * kRows;
    RowNote note{0, 0, find_row(g, job, row + lane)};
    if (note.place.channel >= 0) {
      note.scale = T::kHalf ? 1 : operands.row_scales[note.place.channel];
      const auto* const biases = static_cast<const typename T::Element*>(operands.bias);
      if (biases) note.bias = convert<float>(biases[note.place.channel * g.bias_stride]);
    }
    fits = !signbit(note.scale);
    notes[lane] = note;
  }
  return __all_sync(~0u, fits);
}

// The results of a warp's rows, from its sums. Returns whether the lane's sums of 16 bits are
// finite.
template <typename T>
__device__ __forceinline__ bool store_results(const GemmProblem& g, const GemmTile& t,
                                              const GemmOperands& operands, const GemmJob& job,
                                              const RowNote* notes, uint8_t* staged,
                                              float (&totals)[T::kColumns / 2]) {
  using E = typename T::Element;
  auto* const result = static_cast<E*>(operands.result);
  bool finite = true;
  const int lane = threadIdx.x % kWarp, group = of_warp(threadIdx.x / kWarp / 4);
  const ResultRows rows(t, job.row + T::cell_group(group) * t.height);
  const LaneRow lane_row(g, t);
  const auto lines = [&](int half) {
    return reinterpret_cast<E*>(staged + half * (t.staged_halves - 1) * t.staged_bytes);
  };
  // Of the first of eight rows.
  const auto first_place = [&](int half) {
    const RowPlace& place = notes[8 * half].place;
    return RowPlace{of_warp(place.channel), int16_t(of_warp(place.phase_h)), 0};
  };
  if (!t.across && first_place(0).channel < 0) return true;  // the warp has no rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowNote& note = notes[8 * half + lane / 4];
    const float scale = note.scale, bias = note.bias;
    float zeros[4] = {};  // or NaN: several, so that no addition waits for the one before
#pragma unroll
    for (int i = 0; i < T::kColumns / 4; ++i) {
      float& total = totals[i / 2 * 4 + 2 * half + i % 2];
      if constexpr (T::kHalf) zeros[i % 4] = fmaf(total, 0, zeros[i % 4]);
      total = fmaf(total, scale, bias);
    }
    // Nobody wrote the weights of rows that are none.
    if constexpr (T::kHalf)
      finite &= zeros[0] + zeros[1] + zeros[2] + zeros[3] == 0 || note.place.channel < 0;
    if constexpr (T::kHalf) {
      if (t.across) {
        // From the first of the warpgroup's staged rows.
        uint8_t* const cells = staged - of_warp(threadIdx.x / kWarp % 4) * t.staged_bytes;
        if (half == 1) store_cells<T>(g, t, job, rows, operands.result_maps, cells, totals);
        continue;
      }
    }
    if (!t.neighbours) {
      E* const line = lines(half);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < T::kColumns / 8; ++i)
        store_pair(&line[lane / 4 * T::kStagePitch + 8 * i + lane % 4 * 2],
                   totals[4 * i + 2 * half], totals[4 * i + 2 * half + 1]);
      __syncwarp();
      store_apart<T>(g, t, job, rows, notes + 8 * half, result, line);
      continue;
    }
    if (half == 0 || t.staged_halves == 1) {  // what was copied from here has left
      ptx::store_wait_read<0>();
      __syncwarp();
    }
    const RowPlace place = first_place(half);
    const auto stage = [&]<bool kPaired>() {
      if (t.boxed)
        stage_boxes<T, kPaired>(g, t, lane_row, rows, place, half, lines(half), totals);
      else
        stage_lines<T, kPaired>(g, t, job, lane_row, rows, notes + 8 * half, half, result,
                                lines(half), totals);
    };
    if (t.paired)
      stage.template operator()<true>();
    else
      stage.template operator()<false>();
    if (t.boxed && t.has_edges && (job.column == 0 || ends_row(g, t, job)))
      store_edges<T>(g, t, job, lane_row, rows, place, half, result, totals);
    if (half == 0 && t.staged_halves == 2) continue;  // one fence for both
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
#pragma unroll 1
    for (int i = half + 1 - t.staged_halves; i <= half; ++i)
      if (t.boxed)
        copy_boxes<T>(g, t, job, rows, first_place(i), operands.result_maps, lines(i));
      else
        copy_lines<T>(g, t, job, rows, notes + 8 * i, result, lines(i));
    ptx::store_commit();
  }
  return finite;
}

}  // namespace convops::cuda::implicit_gemm

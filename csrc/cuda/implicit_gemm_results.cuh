// Out of registers: how the consumers of implicit_gemm's main kernel write their results. They go
// through shared memory, eight rows of the weight a warp at a time, and from there by the copy
// engine, while the warp multiplies on: in boxes of several channels where the tensor allows it, or
// row by row. Results that are no neighbours in memory are written one by one.
#pragma once

#include "cuda/implicit_gemm_stages.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::implicit_gemm {

// Whether the tile is the last in its row.
__device__ __forceinline__ bool ends_row(const GemmProblem& g, const GemmTile& t,
                                         const GemmJob& job) {
  return job.column + t.width >= g.cells_w;
}

// A row of the weight as its results need it.
struct RowPlace {
  int channel;     // of the tensor, or -1 where there is no such row
  int64_t offset;  // of the row's first result in the tile from the first row of the image's cells
  int phase_h;
  int left;  // results from there to the end of the tensor's row
};

// `row` counts from the first of the job's row class.
__device__ __forceinline__ RowPlace find_row(const GemmProblem& g, const GemmJob& job, int row) {
  if (row >= g.class_rows) return {-1, 0, 0, 0};
  const GemmRow where = gemm_row(g, job.row_class, row);
  const int channel = job.group * g.rows + where.channel;
  const int column = job.column * g.w.block + where.phase_w;
  return {channel,
          channel * g.result.stride[1] + where.phase_h * g.result.stride[2] +
              column * g.result.stride[3],
          where.phase_h, int(g.result.size[3]) - column};
}

// The rows of cells a warpgroup computes, from the first one's place in its image.
struct ResultRows {
  int image, row;
  int64_t first;       // offset of that row in channel 0, column 0
  int64_t row_step;    // from cell to cell
  int64_t image_step;  // besides, where the next image begins

  __device__ ResultRows(const GemmProblem& g, const GemmTile& t, int tall_row) {
    image = t.by_image_rows.quotient(tall_row);
    row = t.by_image_rows.remainder(tall_row);
    row_step = g.h.block * g.result.stride[2];
    first = image * g.result.stride[0] + row * row_step;
    image_step = g.result.stride[0] - t.image_rows * row_step;
  }
  // How many images below the first one row r of the tile lies.
  __device__ int images_below(const GemmTile& t, int r) const {
    return t.straddles ? t.by_image_rows.quotient(row + r) : 0;
  }
  // Offset of row r of the tile in the row of `place`.
  __device__ int64_t offset(const GemmTile& t, const RowPlace& place, int r) const {
    return first + place.offset + r * row_step + images_below(t, r) * image_step;
  }
  // From where the tile begins in row r, in a channel of the kind.
  __device__ int shift(const GemmProblem& g, const GemmTile& t, const RowPlace& place, int r,
                       int kind) const {
    if (t.overlap == 0) return 0;
    const int h = (row + r - images_below(t, r) * t.image_rows) * g.h.block + place.phase_h;
    return t.to_border(kind * int(g.result.stride[1]) + h * int(g.result.stride[2]));
  }
  // The tensor's row that this is; -1 where it has none.
  __device__ int find(const GemmProblem& g, const GemmTile& t, const RowPlace& place, int r) const {
    const int below = images_below(t, r), cell = row + r - below * t.image_rows;
    const int h = cell * g.h.block + place.phase_h;
    return place.channel >= 0 && image + below < g.images && cell < g.cells_h &&
                   h < int(g.result.size[2])
               ? h
               : -1;
  }
};

// Floats between an address and the multiple of 16 bytes before it.
__device__ __forceinline__ int misalignment(const float* p) {
  return int(reinterpret_cast<uintptr_t>(p) / 4 % 4);
}

// Where row r of the tile begins in a line of shared memory: as far from a multiple of 16 bytes as
// in the result, where the misalignment of row 0 is `first`.
__device__ __forceinline__ int line_row(const GemmTile& t, const ResultRows& rows, int first,
                                        int r) {
  int skew = first + rows.images_below(t, r) * int(rows.image_step & 3);
  if (!t.joined) skew = (skew + r * int(rows.row_step & 3)) & 3;
  return r * t.slot + skew;
}

// Where a result of a lane lies among the eight rows that leave together.
struct LaneRow {
  int line, phase;  // of the channels, woven in the line

  __device__ explicit LaneRow(const GemmTile& t)
      : line((threadIdx.x % kWarp / 4) >> t.woven_log),
        phase((threadIdx.x % kWarp / 4) & ((1 << t.woven_log) - 1)) {}
};

// Writes those of a lane's results that are among `count` neighbours from column `first` on to
// to[0], ..., to[count - 1]. Of the tile's columns a thread has pairs, eight apart.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_row(float* to, int first, int count, int woven_log, int phase,
                                          int half, const float (&totals)[T::kColumns / 2]) {
  constexpr int kGroups = T::kColumns / 8, kBatch = 4;  // groups of eight columns
  if constexpr (kPaired) woven_log = 0;
  int element = (int(threadIdx.x % 4) * 2 << woven_log) + phase - first;
  to += element;
  const int begin = first >> woven_log, end = (first + count - 1 >> woven_log) + 1;
#pragma unroll
  for (int batch = 0; batch < kGroups; batch += kBatch) {
    if (begin < 8 * (batch + kBatch) && end > 8 * batch) {
#pragma unroll
      for (int i = batch; i < batch + kBatch && i < kGroups; ++i) {
        const float a = totals[4 * i + 2 * half], b = totals[4 * i + 2 * half + 1];
        const int from = 8 * (i - batch) << woven_log, step = 1 << woven_log;
        if constexpr (kPaired) {
          if (unsigned(element + from) < unsigned(count))
            *reinterpret_cast<float2*>(to + from) = make_float2(a, b);
        } else {
          if (unsigned(element + from) < unsigned(count)) to[from] = a;
          if (unsigned(element + from + step) < unsigned(count)) to[from + step] = b;
        }
      }
    }
    // Step by step: multiples of what only the host knows would fill the registers.
    element += 8 * kBatch << woven_log;
    to += 8 * kBatch << woven_log;
  }
}

// Eight rows to boxes: channels of a kind (see make_result_maps) in a row of the tile. `place`: of
// the first row.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_boxes(const GemmProblem& g, const GemmTile& t,
                                            const LaneRow& lane, const ResultRows& rows,
                                            const RowPlace& place, int half, float* staged,
                                            const float (&totals)[T::kColumns / 2]) {
  const int kind = lane.line & ((1 << t.channel_kinds_log) - 1);
  float* box = staged + kind * t.box_floats + (lane.line >> t.channel_kinds_log) * t.box_width;
#pragma unroll 1
  for (int r = 0; r < t.height; ++r, box += t.box_floats << t.channel_kinds_log)
    stage_row<T, kPaired>(box, (r * t.pitch << t.woven_log) + rows.shift(g, t, place, r, kind),
                          t.box_width, t.woven_log, lane.phase, half, totals);
}

// What no box has is written directly: at the begin of a row of the tensor what lies before the
// first border, at its end what the last tile has besides its box, and what is no whole vector of
// 16 bytes, because the copy engine does not write less.
template <typename T>
__device__ __forceinline__ void store_edges(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const LaneRow& lane,
                                            const ResultRows& rows, const RowPlace& place, int half,
                                            float* result, const float (&totals)[T::kColumns / 2]) {
  if (place.channel < 0 || place.channel + lane.line >= int(g.result.size[1])) return;
  const int begin = job.column * g.w.block, width = int(g.result.size[3]);
  const bool last = ends_row(g, t, job);
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    if (rows.find(g, t, place, r) < 0) continue;
    const int first = r * t.pitch << t.woven_log, shift = rows.shift(g, t, place, r, lane.line);
    float* const row = result + rows.offset(t, place, r) + lane.line * g.result.stride[1];
    if (begin == 0) stage_row<T, false>(row, first, shift, t.woven_log, lane.phase, half, totals);
    if (!last) continue;
    const int tail = min(shift + (width - shift) / kVector * kVector - begin, shift + t.box_width);
    stage_row<T, false>(row + tail, first + tail, width - begin - tail, t.woven_log, lane.phase,
                        half, totals);
  }
}

// Starts to copy boxes, one a lane.
__device__ __forceinline__ void copy_boxes(const GemmProblem& g, const GemmTile& t,
                                           const GemmJob& job, const ResultRows& rows,
                                           const RowPlace& place, const CUtensorMap* maps,
                                           const float* staged) {
  const int i = threadIdx.x % kWarp, r = i >> t.channel_kinds_log;
  const int h = r < t.height ? rows.find(g, t, place, r) : -1;
  if (h < 0) return;
  const int row_kind = h & ((1 << t.row_kinds_log) - 1);
  const int32_t at[4] = {job.column * g.w.block, h >> t.row_kinds_log,
                         place.channel >> t.channel_kinds_log,
                         rows.image + rows.images_below(t, r)};
  ptx::store_box(&maps[(row_kind - r << t.channel_kinds_log) + i], at, staged + i * t.box_floats);
}

// Eight rows to lines, one for each channel.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_lines(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const LaneRow& lane,
                                            const ResultRows& rows, int row, int half,
                                            float* result, float* staged,
                                            const float (&totals)[T::kColumns / 2]) {
  const RowPlace lane_place = find_row(g, job, row + (lane.line << t.woven_log));
  // Rows that are none are staged like others.
  const int misaligned =
      misalignment(result + rows.first + (lane_place.channel < 0 ? 0 : lane_place.offset));
#pragma unroll 1
  for (int r = 0; r < t.height; ++r)
    stage_row<T, kPaired>(staged + lane.line * t.line + line_row(t, rows, misaligned, r),
                          r * t.pitch << t.woven_log, t.width << t.woven_log, t.woven_log,
                          lane.phase, half, totals);
}

// Starts to copy lines, a run of contiguous results a lane: a row of the tile, or those that follow
// each other in an image. What is no whole vector of 16 bytes, at either end, is written at once.
__device__ __forceinline__ void copy_lines(const GemmProblem& g, const GemmTile& t,
                                           const GemmJob& job, const ResultRows& rows, int row,
                                           float* result, const float* staged) {
  const bool last = ends_row(g, t, job);
  for (int i = threadIdx.x % kWarp; i < (8 >> t.woven_log) * t.runs; i += kWarp) {
    const int line = t.by_runs.quotient(i);
    const RowPlace place = find_row(g, job, row + (line << t.woven_log));
    int r = i - line * t.runs, count = min(t.width * g.w.block, place.left);
    if (t.joined) {
      const int image = r * t.image_rows - rows.row;  // its first row in the tile
      r = max(0, image);
      count *= min(t.height, image + g.cells_h) - r;
    }
    if (count <= 0 || rows.find(g, t, place, r) < 0) continue;
    float* const to = result + rows.offset(t, place, r);
    const float* const from =
        staged + line * t.line +
        line_row(t, rows, misalignment(result + rows.first + place.offset), r);
    const int border = t.to_border(int(to - result)), begin = job.column == 0 ? 0 : border;
    const int end = last ? count : t.step * g.w.block + border;
    const int head = min(begin + (-misalignment(to + begin) & 3), end);
    const int tail = head + (end - head) / kVector * kVector;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (begin + j < head) to[begin + j] = from[begin + j];
      if (tail + j < end) to[tail + j] = from[tail + j];
    }
    if (head < tail) ptx::store_bulk(to + head, from + head, (tail - head) * 4);
  }
}

// Writes the results of eight rows one by one; the rows side by side, because in channels_last
// those are neighbours.
template <typename T>
__device__ __forceinline__ void store_apart(const GemmProblem& g, const GemmTile& t,
                                            const GemmJob& job, const ResultRows& rows, int row,
                                            float* result, const float* staged) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = g.result.stride[3] * g.w.block;
  const RowPlace place = find_row(g, job, row + lane % 8);
  const int count = min(t.width, (place.left + g.w.block - 1) / g.w.block);
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    if (rows.find(g, t, place, r) < 0) continue;
    float* const to = result + rows.offset(t, place, r);
    const float* const from = staged + lane % 8 * T::kStagePitch + r * t.pitch;
#pragma unroll 1
    for (int i = lane / 8; i < count; i += kWarp / 8) to[i * step] = from[i];
  }
}

// The first of a warp's eight rows, in its row class.
template <typename T>
__device__ __forceinline__ int first_row(const GemmJob& job, int half) {
  const int warp = threadIdx.x / kWarp;
  return job.row_block * T::kRowTile + (T::kRowTile == 128 ? warp : warp % 4) * 16 + half * 8;
}

// Notes the scales and biases of the warp's 16 rows while its first instructions run.
template <typename T>
__device__ __forceinline__ void note_scales(const GemmProblem& g, const GemmOperands& operands,
                                            const GemmJob& job, int index, float2* scales) {
  const int lane = threadIdx.x % kWarp;
  if (lane >= 16) return;
  const RowPlace place = find_row(g, job, first_row<T>(job, 0) + lane);
  float scale = 0, bias = 0;
  if (place.channel >= 0) {
    scale = operands.row_scales[place.channel];
    if (operands.bias) bias = operands.bias[place.channel * g.bias_stride];
  }
  // A job with a channel whose weights fp16 cannot hold is bad whatever its source.
  if (signbit(scale)) operands.bad_jobs[index] = 1;
  scales[lane] = make_float2(scale, bias);
}

// The results of a warp's 16 rows, from its sums.
template <typename T>
__device__ __forceinline__ void store_results(const GemmProblem& g, const GemmTile& t,
                                              const GemmOperands& operands, const GemmJob& job,
                                              const float2* scales, float* staged,
                                              float (&totals)[T::kColumns / 2]) {
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp / 4;
  const ResultRows rows(g, t, job.row + (T::kRowTile == 128 ? 0 : group * t.height));
  const LaneRow lane_row(t);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 scale = scales[8 * half + lane / 4];
#pragma unroll
    for (int i = 0; i < T::kColumns / 4; ++i) {
      float& total = totals[i / 2 * 4 + 2 * half + i % 2];
      total = fmaf(total, scale.x, scale.y);
    }
    const int row = first_row<T>(job, half);
    float* const lines = staged + (t.staged_halves == 2 ? half * t.staged_floats : 0);
    if (!t.neighbours) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < T::kColumns / 8; ++i)
        *reinterpret_cast<float2*>(&lines[lane / 4 * T::kStagePitch + 8 * i + lane % 4 * 2]) =
            make_float2(totals[4 * i + 2 * half], totals[4 * i + 2 * half + 1]);
      __syncwarp();
      store_apart<T>(g, t, job, rows, row, operands.result, lines);
      continue;
    }
    // What was copied from here has left.
    if (t.staged_halves == 2)
      ptx::store_wait_read<1>();
    else
      ptx::store_wait_read<0>();
    __syncwarp();
    const RowPlace place = find_row(g, job, row);
    const auto stage = [&]<bool kPaired>() {
      if (t.boxed)
        stage_boxes<T, kPaired>(g, t, lane_row, rows, place, half, lines, totals);
      else
        stage_lines<T, kPaired>(g, t, job, lane_row, rows, row, half, operands.result, lines,
                                totals);
    };
    if (t.paired)
      stage.template operator()<true>();
    else
      stage.template operator()<false>();
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
    if (t.boxed) {
      copy_boxes(g, t, job, rows, place, operands.result_maps, lines);
      if (t.has_edges && (job.column == 0 || ends_row(g, t, job)))
        store_edges<T>(g, t, job, lane_row, rows, place, half, operands.result, totals);
    } else {
      copy_lines(g, t, job, rows, row, operands.result, lines);
    }
    ptx::store_commit();
  }
}

}  // namespace convops::cuda::implicit_gemm

// The converters of implicit_gemm's main kernel: source → raw ring → source ring of scaled fp16.
#pragma once

#include <cuda_fp16.h>

#include "cuda/implicit_gemm_scale.cuh"
#include "cuda/implicit_gemm_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::implicit_gemm {

// Walks over the source stages this block needs: for its jobs, their classes that have taps, the
// class's blocks of channels.
struct Cursor {
  int index;  // of the job
  int sum_class = 0, block = 0;

  __device__ Cursor(const GemmProblem& g, const GemmTile& t) : index(blockIdx.x) {
    skip_empty(g, t);
  }
  __device__ bool done(const GemmTile& t) const { return index >= t.jobs; }
  __device__ void next(const GemmProblem& g, const GemmTile& t) {
    block += t.depth;
    if (block < g.sum_blocks) return;
    block = 0;
    ++sum_class;
    skip_empty(g, t);
  }
  __device__ void skip_empty(const GemmProblem& g, const GemmTile& t) {
    for (; !done(t); index += gridDim.x) {
      const int row_class = gemm_job(g, t, index).row_class;
      for (; sum_class < g.sum_classes; ++sum_class)
        if (g.tap_count(row_class, sum_class) > 0) return;
      sum_class = 0;
    }
  }
};

// Read anew wherever it is used: what the compiler derives from it ahead of the loop would be more
// than the converters' registers hold.
__device__ __forceinline__ int converter_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread - (kThreads - kConverterThreads);
}

// Where the tile of a job lies in the source.
struct SourceTile {
  int channel, image, cell_row, column;

  __device__ SourceTile(const GemmProblem& g, const GemmTile& t, int index) {
    const GemmJob where = gemm_job(g, t, index);
    channel = where.group * g.sums;
    image = t.by_image_rows.quotient(where.row);
    cell_row = t.by_image_rows.remainder(where.row) + g.h.first;
    column = where.column + g.w.first;
  }
};

// One thread copies the tile as a box whose rows begin at a multiple of 16 bytes, `skew` cells
// before the tile's. The copy engine writes zeros outside the tensor.
__device__ __forceinline__ void load_source_bulk(const GemmTile& t, const GemmOperands& operands,
                                                 const SourceTile& tile, int block, void* raw,
                                                 int& skew, uint64_t* full) {
  skew = tile.column & 3;
  const int32_t place[4] = {tile.column - skew, tile.cell_row, tile.channel + block * kSumBlock,
                            tile.image};
  ptx::copy_box(raw, &operands.source_map, place, t.raw_cells * t.depth * kSumBlock * 4, full);
}

// Copies the cells one by one into raw[channel][cell], wherever they come from.
__device__ __forceinline__ void load_source(const GemmProblem& g, const GemmTile& t,
                                            const SourceTile& tile, int sum_class, int block,
                                            const float* source, Header& header, uint32_t raw,
                                            int thread) {
  const bool mixed = g.sum_classes == 1 && g.h.phases * g.w.phases > 1;
  const int height = int(g.source.size[2]), width = int(g.source.size[3]);
  const int64_t channel_stride = g.source.stride[1];
  const GemmSum first = gemm_sum(g, sum_class, block * kSumBlock);
  if (mixed) {
    ptx::sync_threads<1, kConverterThreads>();  // all are done with the last stage's places
    if (thread < t.depth * kSumBlock) {
      const GemmSum sum = gemm_sum(g, sum_class, block * kSumBlock + thread);
      header.sum_places[thread] = {sum.channel * channel_stride + sum.phase_h * g.source.stride[2] +
                                       sum.phase_w * g.source.stride[3],
                                   sum.channel < g.sums ? sum.phase_h : 1 << 30, sum.phase_w};
    }
    ptx::sync_threads<1, kConverterThreads>();
  }
  for (int i = thread; i < t.depth * t.raw_cells; i += kConverterThreads) {
    int cell = i, part = 0;
    for (; cell >= t.raw_cells; cell -= t.raw_cells) ++part;
    const int row = t.by_pitch.quotient(cell), column = cell - row * t.pitch;
    int image = tile.image, from_row = tile.cell_row + row;
    if (t.straddles)
      for (; from_row - g.h.first >= t.image_rows; from_row -= t.image_rows) ++image;
    const bool exists = cell < t.source_cells && image < g.images;
    int h = from_row * g.h.phases, w = (tile.column + column) * g.w.phases;
    uint32_t destination = raw + (part * kSumBlock * t.raw_cells + cell) * 4;
    const float* place = source + tile.channel * channel_stride + image * g.source.stride[0] +
                         h * g.source.stride[2] + w * g.source.stride[3];
    if (!mixed) {
      h += first.phase_h;
      w += first.phase_w;
      const int channel = first.channel + part * kSumBlock;
      place += channel * channel_stride + first.phase_h * g.source.stride[2] +
               first.phase_w * g.source.stride[3];
      const bool inside = exists && unsigned(h) < unsigned(height) && unsigned(w) < unsigned(width);
      if (!inside) place = source;
      const int64_t step = inside ? channel_stride : 0;
      const int channels = g.sums - channel;
#pragma unroll
      for (int k = 0; k < kSumBlock; ++k) {
        if (k < channels) {
          ptx::copy_float(destination, place, inside);
          place += step;
        } else {
          ptx::copy_float(destination, source, false);
        }
        destination += t.raw_cells * 4;
      }
    } else {
#pragma unroll 4
      for (int k = 0; k < kSumBlock; ++k) {
        const SumPlace sum = header.sum_places[part * kSumBlock + k];
        const bool real = exists && unsigned(h + sum.h) < unsigned(height) &&
                          unsigned(w + sum.w) < unsigned(width);
        ptx::copy_float(destination, real ? place + sum.offset : source, real);
        destination += t.raw_cells * 4;
      }
    }
  }
}

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// The largest |x| of every channel, as bits: those of NaN and Inf are larger than any number's.
__device__ __forceinline__ void find_channel_max(uint32_t* channel_max, const GemmTile& t,
                                                 const float* raw, int thread) {
  constexpr int kLanes = 8;  // for a channel
  const int lane = thread % kLanes;
  for (int k = thread / kLanes; k < t.depth * kSumBlock; k += kConverterThreads / kLanes) {
    const float4* const channel = reinterpret_cast<const float4*>(raw + k * t.raw_cells);
    uint32_t largest = 0;
#pragma unroll 4
    for (int i = lane; i < t.raw_cells / 4; i += kLanes) {
      const float4 x = channel[i];
      largest = max(max(max(largest, magnitude(x.x)), max(magnitude(x.y), magnitude(x.z))),
                    magnitude(x.w));
    }
    static_assert(kSumBlock % (kWarp / kLanes) == 0, "warps stay whole");
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
      largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (lane == 0) channel_max[k] = largest;
  }
}

__device__ __forceinline__ Scale choose_stage_scale(const uint32_t* channel_max,
                                                    const GemmProblem& g, const GemmTile& t) {
  const int lane = threadIdx.x % kWarp, channels = t.depth * kSumBlock;
  const uint32_t a = lane < channels ? channel_max[lane] : 0;
  const uint32_t b = lane + kWarp < channels ? channel_max[lane + kWarp] : 0;
  const uint32_t largest = __reduce_max_sync(~0u, max(a, b));
  // Of the channels that are not all zeros: zeros are exact.
  const uint32_t smallest = __reduce_min_sync(~0u, min(a - 1, b - 1));
  Scale scale = choose_scale(largest);
  scale.fits &=
      smallest == ~0u || smallest + 1 >= __float_as_uint(scale.magnitude * kHalfUnit * g.smallest);
  return scale;
}

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __half2 halves = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&halves);
}

// Writes the cells' high and low parts; whether every cell's channels fit the scale.
template <typename T>
__device__ __forceinline__ bool convert_source(const GemmTile& t, const float* raw, int skew,
                                               uint4* stage, float factor, float smallest,
                                               int thread) {
  bool fits = true;
#pragma unroll 1
  for (int i = thread; i < t.depth * t.source_cells; i += kConverterThreads) {
    int cell = i, block = 0;
    for (; cell >= t.source_cells; cell -= t.source_cells) ++block;
    const int row = t.by_pitch.quotient(cell);
    const float* from =
        raw + block * kSumBlock * t.raw_cells + row * (t.raw_pitch - t.pitch) + cell + skew;
    uint4* const place = stage + block * T::kPlanes * t.plane + cell;
    float largest = 0;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = from[0] * factor, b = from[t.raw_cells] * factor;
        from += 2 * t.raw_cells;
        largest = fmaxf(largest, fmaxf(fabsf(a), fabsf(b)));
        high[j] = pack(a, b);
        if constexpr (T::kProducts == 3) {
          const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&high[j]));
          low[j] = pack(a - rounded.x, b - rounded.y);
        }
      }
      place[part * t.plane] = make_uint4(high[0], high[1], high[2], high[3]);
      if constexpr (T::kProducts == 3)
        place[(part + 2) * t.plane] = make_uint4(low[0], low[1], low[2], low[3]);
    }
    fits &= largest >= smallest || largest == 0;
  }
  return fits;
}

template <typename T>
__device__ __forceinline__ void run_converters(const GemmProblem& g, const GemmTile& t,
                                               const GemmOperands& operands, uint8_t* shared,
                                               const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  uint8_t* const raw = shared + memory.raw;

  Cursor at(g, t);
  int ahead = 0;  // stages on the way or waiting
  const auto load_next = [&](int slot) {
    if (!at.done(t)) {
      const bool leads = converter_thread() == 0;
      if (leads) header.raw_job[slot] = at.index;
      uint8_t* const place = raw + slot * t.raw_bytes;
      // The tile's place is made anew for every stage: there are no registers to keep it.
      if (!t.bulk)
        load_source(g, t, SourceTile(g, t, at.index), at.sum_class, at.block, operands.source,
                    header, uint32_t(__cvta_generic_to_shared(place)), converter_thread());
      else if (leads)
        load_source_bulk(t, operands, SourceTile(g, t, at.index), at.block, place,
                         header.raw_skew[slot], &header.raw_full[slot]);
      at.next(g, t);
      ++ahead;
    }
    ptx::copy_commit();  // an empty group where nothing is left: the count below stays right
  };
  // Until all of the stage's cells are there.
  const auto wait_loaded = [&](const Stage& raw_stage) {
    if (t.bulk) {
      ptx::barrier_wait(&header.raw_full[raw_stage.index()], raw_stage.parity());
      return;
    }
    if (t.raw_stages == 2)
      ptx::copy_wait<0>();
    else if (t.raw_stages == 3)
      ptx::copy_wait<1>();
    else
      ptx::copy_wait<2>();
    ptx::sync_threads<1, kConverterThreads>();
  };
  const auto cells = [&](const Stage& raw_stage) {
    return reinterpret_cast<const float*>(raw + raw_stage.index() * t.raw_bytes);
  };
  Stage stage, raw_stage;
  const auto find_next_max = [&] {
    if (ahead == 0) return;
    wait_loaded(raw_stage);
    find_channel_max(header.channel_max[raw_stage.index()], t, cells(raw_stage),
                     converter_thread());
  };
  int slot = 0, filling = t.raw_stages - 1;
  do {
    if (filling == 0)
      ptx::sync_threads<1, kConverterThreads>();  // all know the maxima, and are done with the last
    load_next(slot);
    if (++slot == t.raw_stages) slot = 0;
    if (filling > 0) {
      if (--filling == 0) find_next_max();
      continue;
    }
    const Scale scale = choose_stage_scale(header.channel_max[raw_stage.index()], g, t);

    ptx::barrier_wait(&header.source_empty[stage.index()], stage.parity() ^ 1);
    uint4* const converted = reinterpret_cast<uint4*>(shared + memory.sources) +
                             stage.index() * t.depth * t.plane * T::kPlanes;
    if (converter_thread() == 0) header.source_unit[stage.index()] = scale.magnitude * kSumUnit;
    const int skew = t.bulk ? header.raw_skew[raw_stage.index()] : 0;
    const bool fits = convert_source<T>(t, cells(raw_stage), skew, converted, scale.factor,
                                        g.smallest, converter_thread());
    if (!fits || !scale.fits) operands.bad_jobs[header.raw_job[raw_stage.index()]] = 1;
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.source_full[stage.index()]);
    stage.next(t.source_stages);
    raw_stage.next(t.raw_stages);
    --ahead;
    find_next_max();  // while the consumers begin
  } while (filling > 0 || ahead > 0);
}

}  // namespace convops::cuda::implicit_gemm

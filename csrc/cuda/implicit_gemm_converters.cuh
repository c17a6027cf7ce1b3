// The converters of implicit_gemm's main kernel for float32: raw ring (or source) → source ring of
// scaled fp16.
#pragma once

#include <cuda_fp16.h>

#include "cuda/implicit_gemm_source.cuh"
#include "cuda/ptx/max.cuh"

namespace convops::cuda::implicit_gemm {

// Copies the cells one by one into raw[channel][cell], wherever they come from.
template <typename T>
__device__ __forceinline__ void load_source(const GemmProblem& g, const GemmTile& t,
                                            const SourceTile& tile, int sum_class, int block,
                                            const float* source, SumPlace* sum_places, uint32_t raw,
                                            int group) {
  const int thread = converter_thread<T>(group);
  const bool mixed = g.mixes_phases();
  const int height = int(g.source.size[2]), width = int(g.source.size[3]);
  const int64_t channel_stride = g.source.stride[1];
  const GemmSum first = gemm_sum(g, sum_class, block * g.block_sums);
  if (mixed) {
    sync_group<T>(group);  // all are done with the last stage's places
    if (thread < t.depth * g.block_sums) {
      const GemmSum sum = gemm_sum(g, sum_class, block * g.block_sums + thread);
      sum_places[thread] = {sum.channel * channel_stride + sum.phase_h * g.source.stride[2] +
                                sum.phase_w * g.source.stride[3],
                            sum.channel < g.sums ? sum.phase_h : 1 << 30, sum.phase_w};
    }
    sync_group<T>(group);
  }
  for (int i = thread; i < t.depth * t.raw_cells; i += T::kConverterThreads) {
    int cell = i, part = 0;
    for (; cell >= t.raw_cells; cell -= t.raw_cells) ++part;
    auto [image, h, w] = SourceCell(g, t, tile, cell);
    const bool exists = cell < t.source_cells && image < g.images;
    uint32_t destination = raw + (part * g.block_sums * t.raw_cells + cell) * 4;
    const float* place = source + tile.channel * channel_stride + image * g.source.stride[0] +
                         h * g.source.stride[2] + w * g.source.stride[3];
    if (!mixed) {
      h += first.phase_h;
      w += first.phase_w;
      const int channel = first.channel + part * g.block_sums;
      place += channel * channel_stride + first.phase_h * g.source.stride[2] +
               first.phase_w * g.source.stride[3];
      const bool inside = exists && unsigned(h) < unsigned(height) && unsigned(w) < unsigned(width);
      if (!inside) place = source;
      const int64_t step = inside ? channel_stride : 0;
      const int channels = min(g.sums - channel, g.block_sums);
      const auto copy = [&](const float* from, bool real) {
        ptx::copy_float(destination, from, real);
        destination += t.raw_cells * 4;
        place += step;
        asm("" : "+l"(place));  // else the compiler multiplies for every address
      };
      if (channels == g.block_sums) {  // no need to look at each of them
#pragma unroll 1
        for (int octet = 0; octet < g.octets; ++octet)
#pragma unroll
          for (int k = 0; k < kOctet; ++k) copy(place, inside);
      } else {
#pragma unroll 1
        for (int k = 0; k < g.block_sums; ++k)
          copy(k < channels ? place : source, inside && k < channels);
      }
    } else {
      // By fours: a loop for what is left, where the compiler unrolls, would take registers.
      const SumPlace* sums = sum_places + part * g.block_sums;
#pragma unroll 1
      for (const SumPlace* const end = sums + g.block_sums; sums != end; sums += 4)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const SumPlace sum = sums[k];
          const bool real = exists && unsigned(h + sum.h) < unsigned(height) &&
                            unsigned(w + sum.w) < unsigned(width);
          ptx::copy_float(destination, real ? place + sum.offset : source, real);
          destination += t.raw_cells * 4;
        }
    }
  }
}

// The largest |x| that each thread sees of a channel, or of a piece of one: then `max_groups`
// groups of threads have one each. NaN is larger than any number.
__device__ __forceinline__ void find_max(float* thread_max, const GemmTile& t, const float* raw,
                                         int thread) {
  const int group = t.by_max_lanes.quotient(thread), lane = t.by_max_lanes.remainder(thread);
  const int lanes = int(t.by_max_lanes.value), groups = t.max_groups;
  float largest = 0;
  if (group < groups) {
    const int channel = group >> t.max_pieces_log, piece = group - (channel << t.max_pieces_log);
    for (int box = 0; box >> t.source_kinds_log == 0; ++box) {
      const float4* const cells =
          reinterpret_cast<const float4*>(raw + box * t.raw_box + channel * t.raw_cells);
      // Always so many at a time; the last one rather several times than a loop for what is left.
      constexpr int kBatch = 4;
      const int count = t.raw_cells / kVector, step = lanes << t.max_pieces_log;
#pragma unroll 1
      for (int i = lane + piece * lanes; i < count; i += kBatch * step) {
        float4 x[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) x[j] = cells[min(i + j * step, count - 1)];
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          largest = ptx::max_nan(largest, ptx::max_nan(ptx::max_nan(fabsf(x[j].x), fabsf(x[j].y)),
                                                       ptx::max_nan(fabsf(x[j].z), fabsf(x[j].w))));
      }
    }
  }
  thread_max[group < groups ? lane * groups + group : thread] = largest;
}

// From what find_max left.
template <typename T>
__device__ __forceinline__ Scale choose_stage_scale(const float* thread_max, const GemmProblem& g,
                                                    const GemmTile& t) {
  const int lane = threadIdx.x % kWarp, groups = t.max_groups;
  // Every second is of the same group, whatever their number.
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < T::kConverterWarps; ++i) {
    float& largest = i % 2 == 0 ? even : odd;
    largest = ptx::max_nan(largest, thread_max[i * kWarp + lane]);
  }
  uint32_t a = __float_as_uint(even), b = __float_as_uint(odd);
  if (groups <= kWarp) a = b = max(a, b);
  for (int apart = kWarp / 2; apart >= groups; apart /= 2)
    a = b = max(a, __shfl_xor_sync(~0u, a, apart));
  for (int apart = 1; apart >> t.max_pieces_log == 0; apart *= 2)
    a = b = max(a, __shfl_xor_sync(~0u, a, apart));
  const uint32_t largest = __reduce_max_sync(~0u, max(a, b));
  // Of the channels that are not all zeros: zeros are exact.
  const uint32_t smallest = __reduce_min_sync(~0u, min(a - 1, b - 1));
  Scale scale = choose_scale<kScaleStep>(largest);
  scale.fits &=
      smallest == ~0u || smallest + 1 >= __float_as_uint(scale.magnitude * kHalfUnit * g.smallest);
  return scale;
}

// Four of the sum's elements of a cell. Phases of a row, kRun of them, are aligned neighbours, and
// where they lie is in `offsets`; without phases (kRun = 0) elements are `pitch` apart.
template <int kRun>
__device__ __forceinline__ float4 read_cell(const float* from, const int* offsets, int pitch) {
  if constexpr (kRun == 0) return {from[0], from[pitch], from[2 * pitch], from[3 * pitch]};
  if constexpr (kRun == 1)
    return {from[offsets[0]], from[offsets[1]], from[offsets[2]], from[offsets[3]]};
  if constexpr (kRun == 2) {
    const float2 a = *reinterpret_cast<const float2*>(from + offsets[0]);
    const float2 b = *reinterpret_cast<const float2*>(from + offsets[1]);
    return {a.x, a.y, b.x, b.y};
  }
  if constexpr (kRun == 4) return *reinterpret_cast<const float4*>(from + offsets[0]);
}

// Writes the cells' high and low parts, and marks the job where a cell does not fit the scale.
template <typename T, int kOctets, int kRun>
__device__ __forceinline__ void convert_source(const GemmProblem& g, const GemmTile& t,
                                               const float* raw, const RawNote& note,
                                               const int* offsets, uint4* stage, float factor,
                                               uint8_t* bad_jobs, int thread) {
  const uint32_t skews = note.skews;  // read once: cells' addresses wait for it
#pragma unroll 1
  for (int i = thread; i < t.depth * t.source_cells; i += T::kConverterThreads) {
    int cell = i, block = 0;
    for (; cell >= t.source_cells; cell -= t.source_cells) ++block;
    const int row = t.by_pitch.quotient(cell), column = cell - row * t.pitch;
    const bool outside = column < note.outside;
    const float* from = raw;
    const int* runs = offsets;
    if constexpr (kRun == 0) {
      const int box = row & ((1 << t.source_kinds_log) - 1);
      from += block * kOctets * kOctet * t.raw_cells + box * t.raw_box +
              int(skews >> kSkewBits * box & (T::kVector - 1)) +
              (row >> t.source_kinds_log) * t.raw_pitch + column;
    } else {
      from += row * (g.h.phases >> t.source_kinds_log) * t.raw_pitch + column * g.w.phases;
      runs += block * (kOctets * kOctet / kRun);
    }
    uint4* const place = stage + block * T::kParts * t.part + cell;
    float largest = 0;
    // At once, where there are registers for it.
#pragma unroll(T::kProducerRegisters < 56 && kRun > 0 ? 1 : 2)
    for (int octet = 0; octet < kOctets; ++octet) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        float4 x =
            read_cell<kRun>(from, runs + (kOctet * octet + 2 * j) / max(1, kRun), t.raw_cells);
        if constexpr (kRun == 0) from += 4 * t.raw_cells;
        x = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
        largest =
            fmaxf(fmaxf(fmaxf(largest, fabsf(x.x)), fmaxf(fabsf(x.y), fabsf(x.z))), fabsf(x.w));
        high[j] = pack(x.x, x.y);
        high[j + 1] = pack(x.z, x.w);
        if constexpr (T::kProducts == 3) {
          low[j] = pack_rest(x.x, x.y, high[j]);
          low[j + 1] = pack_rest(x.z, x.w, high[j + 1]);
        }
      }
      place[octet * t.plane] = make_uint4(high[0], high[1], high[2], high[3]);
      if constexpr (T::kProducts == 3)
        place[t.part + octet * t.plane] = make_uint4(low[0], low[1], low[2], low[3]);
    }
    if (outside) {
#pragma unroll
      for (int plane = 0; plane < T::kParts * kOctets; ++plane)
        place[plane * t.plane] = make_uint4(0, 0, 0, 0);
    } else if (largest > 0 && largest < g.smallest) {
      bad_jobs[note.job] = 1;
    }
  }
}

template <typename T>
__device__ __forceinline__ void run_converters(const GemmProblem& g, const GemmTile& t,
                                               const GemmOperands& operands, uint8_t* shared,
                                               const GemmSharedMemory& memory, int group) {
  Header& header = *reinterpret_cast<Header*>(shared);
  if (t.run > 0) {
    if (group == 0) note_sum_offsets<T>(g, t, header.sum_offsets, converter_thread<T>(group));
    ptx::sync_threads<kConverterGroups * T::kConverterThreads>(kAllConvertersBarrier);
  }
  Cursor at(g, t);
  Stage stage, raw_stage;
  const auto cells = [&] { return shared + memory.raw + raw_stage.index() * t.raw_bytes; };
  const auto load = [&] {
    if (t.bulk || at.done(t)) return;
    if (converter_thread<T>(group) == 0) header.raw[group] = {at.index};
    // The tile's place is made anew for every stage: there are no registers to keep it.
    load_source<T>(g, t, SourceTile(g, t, at.index), at.sum_class, at.block,
                   static_cast<const float*>(operands.source), header.sum_places[group],
                   uint32_t(__cvta_generic_to_shared(cells())), group);
    ptx::copy_commit();
  };
  const auto skip = [&](int stages) {
    for (int i = 0; i < stages; ++i) {
      at.next(g, t);
      stage.next(t.source_stages);
      raw_stage.next(t.raw_stages);
    }
  };
  skip(group);
  load();
  for (int turn = 0; !at.done(t); turn ^= 1) {
    if (t.bulk) {
      // The other group may have had the stage's place before, and a parity does not tell a phase
      // from the next but one: that it is done with it must be seen first.
      ptx::barrier_wait(&header.raw_empty[raw_stage.index()], raw_stage.parity() ^ 1);
      ptx::barrier_wait(&header.raw_full[raw_stage.index()], raw_stage.parity());
    } else {
      ptx::copy_wait<0>();
      sync_group<T>(group);
    }
    float* const thread_max = header.thread_max[group][turn];
    find_max(thread_max, t, reinterpret_cast<const float*>(cells()), converter_thread<T>(group));
    sync_group<T>(group);
    const Scale scale = choose_stage_scale<T>(thread_max, g, t);

    ptx::barrier_wait(&header.source_empty[stage.index()], stage.parity() ^ 1);
    uint4* const converted =
        reinterpret_cast<uint4*>(shared + memory.sources) + stage.index() * t.stage_cells;
    if (converter_thread<T>(group) == 0)
      header.source_unit[stage.index()] = scale.magnitude * kSumUnit;
    const RawNote& note = header.raw[raw_stage.index()];
    if (!scale.fits) operands.bad_jobs[note.job] = 1;
    const auto convert_octets = [&]<int kOctets, int kRun>() {
      convert_source<T, kOctets, kRun>(g, t, reinterpret_cast<const float*>(cells()), note,
                                       header.sum_offsets, converted, scale.factor,
                                       operands.bad_jobs, converter_thread<T>(group));
    };
    const auto convert = [&]<int kRun>() {
      if (g.octets == 1)
        convert_octets.template operator()<1, kRun>();
      else
        convert_octets.template operator()<2, kRun>();
    };
    if (t.run == 0)
      convert.template operator()<0>();
    else if (t.run == 1)
      convert.template operator()<1>();
    else if (t.run == 2)
      convert.template operator()<2>();
    else
      convert.template operator()<4>();
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.source_full[stage.index()]);
    if (t.bulk)
      ptx::barrier_arrive(&header.raw_empty[raw_stage.index()]);
    else
      sync_group<T>(group);  // all are done with the cells
    skip(kConverterGroups);
    load();
  }
}

}  // namespace convops::cuda::implicit_gemm

// The converters of implicit_gemm's main kernel for 16 bits, which need neither scale nor rounding:
// they put a cell's channels side by side. From the raw ring, or from the source at once, where the
// copy engine cannot have it.
//
// Where a cell is one element this is done by matrices of 8 channels by 8 cells, which are loaded
// transposed: two instructions a warp for 32 octets. They begin at multiples of 16 bytes of the raw
// rows, wherever the tile does; a lane gives the place of one of the cells.
#pragma once

#include "cuda/implicit_gemm_source.cuh"
#include "cuda/ptx/mma.cuh"

namespace convops::cuda::implicit_gemm {

__device__ __forceinline__ uint32_t pair_of(uint16_t low, uint16_t high) {
  return low | uint32_t{high} << 16;
}

// Cells of one element. Warps take rows of the tile by turns; what a matrix has besides the row's
// cells goes nowhere.
template <typename T>
__device__ __forceinline__ void transpose_rows(const GemmProblem& g, const GemmTile& t,
                                               const uint16_t* raw, const RawNote& note,
                                               int first_octet, uint4* stage, uint4* nowhere,
                                               int thread) {
  constexpr int kSide = 8, kCells = 4 * kSide;  // of an instruction
  const int lane = thread % kWarp, in_matrix = lane % kSide, outside = min(note.outside, t.pitch);
  const int octets = t.depth * g.octets, kinds = 1 << g.sum_kinds_log;
  const uint32_t to_nowhere = uint32_t(__cvta_generic_to_shared(nowhere));
  const int channel_skew = int(g.source.stride[1]) & (T::kVector - 1);
#pragma unroll 1
  for (int row = thread / kWarp; row < t.tile_rows + g.h.shifts - 1; row += T::kConverterWarps) {
    const int box = row & ((1 << t.source_kinds_log) - 1);
    const int skew = int(note.skews >> kSkewBits * box);
    const uint16_t* const first = raw + box * t.raw_box +
                                  (row >> t.source_kinds_log) * t.raw_pitch + (lane - in_matrix) +
                                  in_matrix * t.raw_cells;
    uint4* const cells = stage + row * t.pitch;
    uint32_t octet_from = uint32_t(__cvta_generic_to_shared(first));
    uint32_t octet_to = uint32_t(__cvta_generic_to_shared(cells));
#pragma unroll 1
    for (int octet = 0; octet < octets; ++octet) {
      const int kind = first_octet + octet & (kinds - 1);
      const int begin = skew + kind * channel_skew & (T::kVector - 1);
      // Counted from the first that lies inside.
      int cell = lane - begin - outside;
      uint32_t from = octet_from, to = octet_to + (lane - begin) * 16;
      const auto place = [&](int i) {
        return unsigned(cell + i * kCells) < unsigned(t.pitch - outside) ? to + i * kCells * 16
                                                                         : to_nowhere;
      };
      // Two at a time: one is on its way while the other is stored. At most the last reads past the
      // row, into what follows it in shared memory.
      int column = t.raw_pitch;
#pragma unroll 1
      for (; column > kCells; column -= 2 * kCells) {
        uint32_t matrices[2][4];
        ptx::load_transposed(matrices[0], from);
        ptx::load_transposed(matrices[1], from + kCells * 2);
        ptx::store_matrices(place(0), matrices[0]);
        ptx::store_matrices(place(1), matrices[1]);
        from += 2 * kCells * 2;
        to += 2 * kCells * 16;
        cell += 2 * kCells;
      }
      if (column > 0) {
        uint32_t matrices[4];
        ptx::load_transposed(matrices, from);
        ptx::store_matrices(place(0), matrices);
      }
      for (int i = lane; i < outside; i += kWarp)
        stage[row * t.pitch + octet * t.plane + i] = make_uint4(0, 0, 0, 0);
      octet_from += t.raw_octet * 2;
      octet_to += t.plane * 16;
    }
  }
}

// An octet of the sum of a cell of several elements, as in read_cell of float32: kRun of them are
// aligned neighbours, and where they lie is in `offsets`.
template <int kRun>
__device__ __forceinline__ uint4 read_octet(const uint16_t* from, const int* offsets) {
  uint32_t pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (kRun == 1) pairs[j] = pair_of(from[offsets[2 * j]], from[offsets[2 * j + 1]]);
    if constexpr (kRun == 2) pairs[j] = *reinterpret_cast<const uint32_t*>(from + offsets[j]);
    if constexpr (kRun == 4) {
      const uint2 two = *reinterpret_cast<const uint2*>(from + offsets[j / 2]);
      pairs[j] = j % 2 == 0 ? two.x : two.y;
    }
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Cells of several elements.
template <typename T, int kRun>
__device__ __forceinline__ void transpose_patches(const GemmProblem& g, const GemmTile& t,
                                                  const uint16_t* raw, const RawNote& note,
                                                  const int* offsets, uint4* stage, int thread) {
#pragma unroll 1
  for (int i = thread; i < t.depth * t.source_cells; i += T::kConverterThreads) {
    int cell = i, block = 0;
    for (; cell >= t.source_cells; cell -= t.source_cells) ++block;
    const int row = t.by_pitch.quotient(cell), column = cell - row * t.pitch;
    const uint16_t* const from =
        raw + row * (g.h.phases >> t.source_kinds_log) * t.raw_pitch + column * g.w.phases;
    uint4* const place = stage + block * t.part + cell;
#pragma unroll 1
    for (int octet = 0; octet < g.octets; ++octet) {
      const int* const runs = offsets + (block * g.octets + octet) * (kOctet / kRun);
      place[octet * t.plane] =
          column < note.outside ? make_uint4(0, 0, 0, 0) : read_octet<kRun>(from, runs);
    }
  }
}

// Copies octets of cells, whose channels are neighbours in the source: those of a cell side by
// side.
template <typename T>
__device__ __forceinline__ void copy_octets(const GemmProblem& g, const GemmTile& t,
                                            const SourceTile& tile, const Cursor& at,
                                            const uint16_t* source, uint4* stage, int thread) {
  const int height = int(g.source.size[2]), width = int(g.source.size[3]);
  const auto& stride = g.source.stride;
  const int octets_log = __ffs(t.depth * g.octets) - 1;
  const GemmSum first = gemm_sum(g, at.sum_class, at.block * g.block_sums);
#pragma unroll 1
  for (int i = thread; i < t.source_cells << octets_log; i += T::kConverterThreads) {
    const int cell = i >> octets_log, octet = i - (cell << octets_log);
    auto [image, h, w] = SourceCell(g, t, tile, cell);
    h += first.phase_h;
    w += first.phase_w;
    const int channel = first.channel + octet * kOctet;
    const bool inside = image < g.images && channel < g.sums && unsigned(h) < unsigned(height) &&
                        unsigned(w) < unsigned(width);
    const uint16_t* const from =
        source + image * stride[0] + tile.channel + channel + h * stride[2] + w * stride[3];
    ptx::copy_bytes_or_zeros<16>(uint32_t(__cvta_generic_to_shared(stage + octet * t.plane + cell)),
                                 inside ? from : source, inside);
  }
  ptx::copy_commit();
  ptx::copy_wait<0>();
}

// Reads the cells one by one, wherever they are.
template <typename T>
__device__ __forceinline__ void gather_source(const GemmProblem& g, const GemmTile& t,
                                              const SourceTile& tile, const Cursor& at,
                                              const uint16_t* source, uint4* stage, int thread) {
  const int height = int(g.source.size[2]), width = int(g.source.size[3]);
  const auto& stride = g.source.stride;
#pragma unroll 1
  for (int i = thread; i < t.depth * t.source_cells; i += T::kConverterThreads) {
    int cell = i, block = 0;
    for (; cell >= t.source_cells; cell -= t.source_cells) ++block;
    const auto [image, h, w] = SourceCell(g, t, tile, cell);
    const uint16_t* const from =
        source + tile.channel * stride[1] + image * stride[0] + h * stride[2] + w * stride[3];
    const auto read = [&](const GemmSum& sum, int64_t offset) {
      const bool inside = image < g.images && sum.channel < g.sums &&
                          unsigned(h + sum.phase_h) < unsigned(height) &&
                          unsigned(w + sum.phase_w) < unsigned(width);
      return inside ? from[offset] : uint16_t{0};
    };
    uint4* const place = stage + block * t.part + cell;
#pragma unroll 1
    for (int octet = 0; octet < g.octets; ++octet) {
      const int k = (at.block + block) * g.block_sums + octet * kOctet;
      const GemmSum first = gemm_sum(g, at.sum_class, k);
      uint16_t channels[kOctet];
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        GemmSum sum = first;
        if (g.mixes_phases())
          sum = gemm_sum(g, at.sum_class, k + j);
        else
          sum.channel += j << g.sum_kinds_log;
        channels[j] =
            read(sum, sum.channel * stride[1] + sum.phase_h * stride[2] + sum.phase_w * stride[3]);
      }
      place[octet * t.plane] =
          make_uint4(pair_of(channels[0], channels[1]), pair_of(channels[2], channels[3]),
                     pair_of(channels[4], channels[5]), pair_of(channels[6], channels[7]));
    }
  }
}

template <typename T>
__device__ __forceinline__ void run_transposers(const GemmProblem& g, const GemmTile& t,
                                                const GemmOperands& operands, uint8_t* shared,
                                                const GemmSharedMemory& memory, int group) {
  if (t.direct) return;
  Header& header = *reinterpret_cast<Header*>(shared);
  const int thread = converter_thread<T>(group);
  if (t.run > 0) {
    for (int i = thread; group == 0 && i < kMaxStageSums; i += T::kConverterThreads)
      note_sum_offsets<T>(g, t, header.sum_offsets, i);
    ptx::sync_threads<kConverterGroups * T::kConverterThreads>(kAllConvertersBarrier);
  }
  Cursor at(g, t);
  Stage stage, raw_stage;
  const auto skip = [&](int stages) {
    for (int i = 0; i < stages; ++i) {
      at.next(g, t);
      stage.next(t.source_stages);
      raw_stage.next(t.raw_stages);
    }
  };
  for (skip(group); !at.done(t); skip(kConverterGroups)) {
    const int raw = raw_stage.index();
    if (t.bulk) {  // as for float32
      ptx::barrier_wait(&header.raw_empty[raw], raw_stage.parity() ^ 1);
      ptx::barrier_wait(&header.raw_full[raw], raw_stage.parity());
    }
    ptx::barrier_wait(&header.source_empty[stage.index()], stage.parity() ^ 1);
    uint4* const converted =
        reinterpret_cast<uint4*>(shared + memory.sources) + stage.index() * t.stage_cells;
    const auto* const cells =
        reinterpret_cast<const uint16_t*>(shared + memory.raw + raw * t.raw_bytes);
    const auto transpose = [&]<int kRun>() {
      transpose_patches<T, kRun>(g, t, cells, header.raw[raw], header.sum_offsets, converted,
                                 thread);
    };
    if (t.by_octets)
      copy_octets<T>(g, t, SourceTile(g, t, at.index), at,
                     static_cast<const uint16_t*>(operands.source), converted, thread);
    else if (!t.bulk)
      gather_source<T>(g, t, SourceTile(g, t, at.index), at,
                       static_cast<const uint16_t*>(operands.source), converted, thread);
    else if (t.run == 0)
      transpose_rows<T>(g, t, cells, header.raw[raw], at.block * g.octets, converted,
                        &header.nowhere, thread);
    else if (t.run == 1)
      transpose.template operator()<1>();
    else if (t.run == 2)
      transpose.template operator()<2>();
    else
      transpose.template operator()<4>();
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.source_full[stage.index()]);
    if (t.bulk) ptx::barrier_arrive(&header.raw_empty[raw]);
  }
}

}  // namespace convops::cuda::implicit_gemm

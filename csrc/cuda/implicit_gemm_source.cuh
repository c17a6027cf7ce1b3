// What the converters of implicit_gemm's main kernel share, whatever the elements: which stages
// there are, where their tiles lie in the source, and the loader that copies them into the raw
// ring.
#pragma once

#include "cuda/implicit_gemm_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/thread.cuh"

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
      const int row_class = g.row_classes > 1 ? gemm_job(g, t, index).row_class : 0;
      for (; sum_class < g.sum_classes; ++sum_class)
        if (g.step_count(row_class, sum_class) > 0) return;
      sum_class = 0;
    }
  }
};

// Of the group.
template <typename T>
__device__ __forceinline__ int converter_thread(int group) {
  return ptx::thread_index() - (T::kFirstConverter + group * T::kConverterThreads);
}
template <typename T>
__device__ __forceinline__ void sync_group(int group) {
  ptx::sync_threads<T::kConverterThreads>(kConverterBarrier + group);
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

// A cell of such a tile: its image, and its first element's place there.
struct SourceCell {
  int image, h, w;

  __device__ SourceCell(const GemmProblem& g, const GemmTile& t, const SourceTile& tile, int cell)
      : image(tile.image) {
    const int row = t.by_pitch.quotient(cell), column = cell - row * t.pitch;
    int from_row = tile.cell_row + row;
    if (t.straddles)
      for (; from_row - g.h.first >= t.image_rows; from_row -= t.image_rows) ++image;
    h = g.h.source(from_row);
    w = g.w.source(tile.column + column);
  }
};

// The tile's first column, `w` in the source, in the map of a kind of rows and of channels.
template <typename T>
__device__ __forceinline__ int map_column(const GemmProblem& g, int kind, int w,
                                          int channel_kind = 0) {
  const auto& stride = g.source.stride;
  return w + (kind * int(stride[2]) + channel_kind * int(stride[1]) & (T::kVector - 1));
}

// One thread copies the tile as boxes, box i from the tile's row i (of elements) on, and where
// octets are of kinds a box for each. The copy engine writes zeros outside the tensor, but where a
// kind's rows begin before their first element.
template <typename T>
__device__ __forceinline__ void load_source_bulk(const GemmProblem& g, const GemmTile& t,
                                                 const GemmOperands& operands, int job, int block,
                                                 typename T::Raw* raw, RawNote& note,
                                                 uint64_t* full) {
  const SourceTile tile(g, t, job);
  const int kinds = 1 << t.source_kinds_log;
  const int first_h = g.h.source(tile.cell_row), first_w = g.w.source(tile.column);
  ptx::expect_bytes(full, kinds * t.raw_cells * t.raw_channels * int(sizeof(*raw)));
  note.job = job;
  const bool pads = kinds > 1 || T::kHalf && t.octets_apart;
  note.outside = pads ? max(0, -tile.column) : 0;
  uint32_t skews = 0;
#pragma unroll 1
  for (int i = 0; i < kinds; ++i) {
    const int h = first_h + i, kind = h & (kinds - 1), column = map_column<T>(g, kind, first_w);
    const int skew = column & (T::kVector - 1);
    skews |= skew << kSkewBits * i;
    const int channel = tile.channel + g.by_phases.quotient(block * g.block_sums);
    if (T::kHalf && t.octets_apart) {
#pragma unroll 1
      for (int octet = 0; octet < t.raw_channels / kOctet; ++octet) {
        const int first =
            tile.channel + gemm_sum(g, 0, block * g.block_sums + octet * kOctet).channel;
        const int channel_kind = first & ((1 << g.sum_kinds_log) - 1);
        const int from = map_column<T>(g, kind, first_w, channel_kind);
        const int32_t place[4] = {from & -T::kVector, h >> t.source_kinds_log,
                                  first >> g.sum_kinds_log, tile.image};
        ptx::copy_box(raw + i * t.raw_box + octet * t.raw_octet,
                      &operands.source_maps[(kind << g.sum_kinds_log) + channel_kind], place, full);
      }
      continue;
    }
    const int32_t place[4] = {column - skew, h >> t.source_kinds_log, channel, tile.image};
    ptx::copy_box(raw + i * t.raw_box, &operands.source_maps[kind], place, full);
  }
  note.skews = skews;
  ptx::barrier_arrive(full);  // what is noted is seen behind it
}

// Where the elements of a cell's sum lie in boxes, those together that are neighbours in a row: the
// same for all tiles (see copy_in_bulk in implicit_gemm_plan.cpp).
template <typename T>
__device__ __forceinline__ void note_sum_offsets(const GemmProblem& g, const GemmTile& t,
                                                 int* offsets, int thread) {
  if (thread * t.run >= t.depth * g.block_sums) return;
  const GemmSum sum = gemm_sum(g, 0, thread * t.run);
  const int last_kind = (1 << t.source_kinds_log) - 1, box = sum.phase_h & last_kind;
  // Cells begin with kind 0, but for their origin.
  const int kind = sum.phase_h - g.h.source_origin & last_kind;
  offsets[thread] =
      box * t.raw_box + (map_column<T>(g, kind, g.w.source(g.w.first)) & (T::kVector - 1)) +
      sum.phase_w + sum.channel * t.raw_cells + (sum.phase_h >> t.source_kinds_log) * t.raw_pitch;
}

// By one thread: fills raw stages by bulk copies.
template <typename T>
__device__ __forceinline__ void run_loader(const GemmProblem& g, const GemmTile& t,
                                           const GemmOperands& operands, uint8_t* shared,
                                           const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  Stage stage;
  for (Cursor at(g, t); !at.done(t); at.next(g, t), stage.next(t.raw_stages)) {
    const int i = stage.index();
    ptx::barrier_wait(&header.raw_empty[i], stage.parity() ^ 1);
    load_source_bulk<T>(g, t, operands, at.index, at.block,
                        reinterpret_cast<typename T::Raw*>(shared + memory.raw + i * t.raw_bytes),
                        header.raw[i], &header.raw_full[i]);
  }
}

// By one thread: fills source stages with whole cells (GemmTile::direct).
template <typename T>
__device__ __forceinline__ void run_direct_loader(const GemmProblem& g, const GemmTile& t,
                                                  const GemmOperands& operands, uint8_t* shared,
                                                  const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  Stage stage;
  for (Cursor at(g, t); !at.done(t); at.next(g, t), stage.next(t.source_stages)) {
    const int i = stage.index();
    const SourceTile tile(g, t, at.index);
    const int32_t place[4] = {tile.channel + at.block * g.block_sums, tile.column, tile.cell_row,
                              tile.image};
    ptx::barrier_wait(&header.source_empty[i], stage.parity() ^ 1);
    ptx::expect_bytes(&header.source_full[i], t.source_cells * t.depth * kBlockBytes);
    ptx::copy_box(shared + memory.sources + i * t.stage_cells * kOctet * 2,
                  &operands.source_maps[at.sum_class], place, &header.source_full[i]);
    ptx::barrier_arrive(&header.source_full[i]);
  }
}

}  // namespace convops::cuda::implicit_gemm

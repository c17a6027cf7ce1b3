// The producers of implicit_gemm_weight's main kernel for 16 bits, which need neither scale nor
// rounding: grad_output → raw stages; input → cells, by the way its memory allows (InputWay).
#pragma once

#include "cuda/implicit_gemm_weight_loader.cuh"
#include "cuda/ptx/mma.cuh"

namespace convops::cuda::implicit_gemm_weight {

// Where rows of a slot lie in boxes: elements of the map before the slot's first cell, which may be
// outside.
__device__ __forceinline__ int box_column(const WeightGemm& g, int octet, int h, int w) {
  const RowKinds& kinds = g.input_kinds;
  const bool inside = unsigned(h) < unsigned(g.height);
  return w + (inside ? kinds.begins[kinds.kind(octet & (kinds.channels - 1), h)] : 0);
}
// Boxes begin at multiples of 16 bytes.
constexpr int kVectorMask = vector_elements(2) - 1;

// Copies the input's rows for the movers, by one thread.
template <typename T>
__device__ __forceinline__ void load_input(const WeightGemm& g, const WeightOperands& operands,
                                           const Place& place, Header& header, uint8_t* raw) {
  const RowKinds& kinds = g.input_kinds;
  const int first_channel = place.group * g.group_channels() >> g.input_kinds_log;
  const int box_bytes = kOctet * weight_raw_pitch(T::pitch(g)) * 2;
  Stage stage;
  for (Slots<T> slots{Rows(g, place)}; !slots.row.done(); slots.next(g)) {
    const SlotPlace at(g, place, slots);
    ptx::barrier_wait(&header.input_empty[stage.index], stage.parity ^ 1);
    uint64_t* const full = &header.input_full[stage.index];
    uint8_t* to = raw + stage.index * T::kMoverBytes;
    for (int i = 0; i < T::kBlockOctets; ++i, to += box_bytes) {
      const int octet = at.channel / kOctet + i;
      const bool inside = unsigned(at.h) < unsigned(g.height);
      const int32_t box[4] = {
          box_column(g, octet, at.h, at.w) & ~kVectorMask, inside ? at.h / kinds.rows : -1,
          first_channel + (octet >> g.input_kinds_log) * kOctet, slots.row.image};
      const int kind = kinds.kind(octet & (kinds.channels - 1), inside ? at.h : 0);
      ptx::expect_bytes(full, box_bytes);
      ptx::copy_box(to, &operands.input_maps[kind], box, full);
    }
    ptx::barrier_arrive(full);
    stage.next(kMoverWarps);
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// A slot's places in shared memory: octets of cells, twice where the window's mirror has it.
template <typename T>
class SlotCells {
 public:
  __device__ SlotCells(const WeightGemm& g, uint8_t* cells, int slot)
      : pitch_(T::pitch(g)),
        first_(reinterpret_cast<uint4*>(cells) + slot * T::kOctets * pitch_),
        to_mirror_(slot < T::kTile.mirrored() ? T::ring(g) * T::kOctets * pitch_ : 0) {}

  __device__ uint4* octet(int octet) const {
    return first_ + octet / T::kOctets * (T::kGroupBytes / 16) + octet % T::kOctets * pitch_;
  }
  // Cells to the same in the mirror, or 0.
  __device__ int to_mirror() const { return to_mirror_; }
  __device__ void store(uint4* to, uint4 cell) const {
    *to = cell;
    if (to_mirror_ > 0) to[to_mirror_] = cell;
  }

 private:
  int pitch_;
  uint4* first_;
  int to_mirror_;
};

// From a raw stage: matrices of 8 channels by 8 cells, transposed; a lane gives the place of one of
// the cells.
template <typename T>
__device__ __forceinline__ void transpose_slot(const WeightGemm& g, const SlotPlace<T>& at,
                                               const uint8_t* raw, const SlotCells<T>& cells,
                                               uint4* nowhere, int lane) {
  constexpr int kSide = 8, kColumns = 4 * kSide;  // of a matrix, of an instruction
  const int in_matrix = lane % kSide, pitch = T::pitch(g), raw_pitch = weight_raw_pitch(pitch);
  const uint32_t to_nowhere = shared_address(nowhere), to_mirror = cells.to_mirror() * 16;
  const uint32_t first = shared_address(raw) + (lane - in_matrix + in_matrix * raw_pitch) * 2;
#pragma unroll 1
  for (int octet = 0; octet < T::kBlockOctets; ++octet) {
    const int column = box_column(g, at.channel / kOctet + octet, at.h, at.w);
    // What a box has of the memory before a row is not the row's: padding.
    const int outside = column == at.w ? 0 : min(max(-at.w, 0), pitch);
    int cell = lane - (column & kVectorMask);
    uint32_t from = first + octet * kOctet * raw_pitch * 2;
    uint32_t to = shared_address(cells.octet(octet) + cell);
    // At most the last instruction reads past the row, into what follows it in shared memory.
#pragma unroll 1
    for (int i = 0; i < raw_pitch; i += kColumns) {
      uint32_t matrices[4];
      ptx::load_transposed(matrices, from);
      const bool is_cell = cell >= outside && cell < pitch;
      ptx::store_matrices(is_cell ? to : to_nowhere, matrices);
      if (to_mirror > 0) ptx::store_matrices(is_cell ? to + to_mirror : to_nowhere, matrices);
      cell += kColumns;
      from += kColumns * 2;
      to += kColumns * 16;
    }
    for (int i = lane; i < outside; i += kWarp)
      cells.store(cells.octet(octet) + i, make_uint4(0, 0, 0, 0));
  }
}

// Octets of channels that are neighbours in the input, those of a cell by lanes side by side.
template <typename T>
__device__ __forceinline__ void copy_slot(const WeightGemm& g, const Place& place,
                                          const SlotPlace<T>& at, const uint16_t* image,
                                          const uint16_t* anywhere, const SlotCells<T>& cells,
                                          int lane) {
  const uint16_t* const row = image + place.group * g.channels + at.channel + at.h * g.row_stride;
  const bool has_row = unsigned(at.h) < unsigned(g.height);
#pragma unroll 2
  for (int i = lane; i < T::pitch(g) * T::kBlockOctets; i += kWarp) {
    const int cell = i / T::kBlockOctets, octet = i % T::kBlockOctets;
    const int w = at.w + cell * g.stride_w;
    const bool inside =
        has_row && unsigned(w) < unsigned(g.width) && at.channel + octet * kOctet < g.channels;
    const uint16_t* const from = inside ? row + octet * kOctet + w * g.column_stride : anywhere;
    uint4* const to = cells.octet(octet) + cell;
    ptx::copy_bytes_or_zeros<16>(shared_address(to), from, inside);
    if (cells.to_mirror() > 0)
      ptx::copy_bytes_or_zeros<16>(shared_address(to + cells.to_mirror()), from, inside);
  }
  ptx::copy_commit();
  ptx::copy_wait<0>();
}

// Element by element, phases of channels too.
template <typename T>
__device__ __forceinline__ void gather_slot(const WeightGemm& g, const Place& place,
                                            const SlotPlace<T>& at, const uint16_t* image,
                                            const SlotCells<T>& cells, int lane) {
  const uint16_t* const from =
      image + int64_t(place.group) * g.group_channels() * g.channel_stride + at.h * g.row_stride;
#pragma unroll 1
  for (int i = lane; i < T::pitch(g) * T::kBlockOctets; i += kWarp) {
    const int octet = i / T::pitch(g), cell = i - octet * T::pitch(g);
    const int w = at.w + cell * g.stride_w, first = at.channel + octet * kOctet;
    uint32_t pairs[4] = {};
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const int k = first + j, channel = g.by_phases.quotient(k);
      const int phase = k - channel * g.phases(), phase_h = g.by_phases_w.quotient(phase);
      const int column = w + phase - phase_h * g.phases_w;
      const bool inside = k < g.channels && unsigned(at.h + phase_h) < unsigned(g.height) &&
                          unsigned(column) < unsigned(g.width);
      const uint32_t x =
          inside
              ? from[channel * g.channel_stride + phase_h * g.row_stride + column * g.column_stride]
              : 0;
      pairs[j / 2] |= x << j % 2 * 16;
    }
    cells.store(cells.octet(octet) + cell, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
}

// Warps take slots by turns.
template <typename T>
__device__ __forceinline__ void run_movers(const WeightGemm& g, const WeightOperands& operands,
                                           const Place& place, Header& header, uint8_t* cells,
                                           const uint8_t* raw) {
  const int mover = int(threadIdx.x) / kWarp - T::kMovers, lane = int(threadIdx.x) % kWarp;
  const auto* const input = static_cast<const uint16_t*>(operands.input);
  const int ring = T::ring(g);
  Slots<T> slots{Rows(g, place)};
  Stage slot;
  uint32_t raw_parity = 0;
  const auto skip = [&](int count) {
    for (int i = 0; i < count; ++i, slots.next(g)) slot.next(ring);
  };
  for (skip(mover); !slots.row.done(); skip(kMoverWarps), raw_parity ^= 1) {
    const SlotPlace at(g, place, slots);
    const SlotCells<T> to(g, cells, slot.index);
    const uint16_t* const image = input + slots.row.image * g.image_stride;
    const bool boxes = g.input_way == InputWay::kBoxes;
    if (boxes) ptx::barrier_wait(&header.input_full[mover], raw_parity);
    ptx::barrier_wait(&header.cells_empty[slot.index], slot.parity ^ 1);
    __syncwarp();
    if (boxes)
      transpose_slot<T>(g, at, raw + mover * T::kMoverBytes, to, &header.nowhere, lane);
    else if (g.input_way == InputWay::kOctets)
      copy_slot<T>(g, place, at, image, input, to, lane);
    else
      gather_slot<T>(g, place, at, image, to, lane);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.cells_full[slot.index]);
    if (boxes) ptx::barrier_arrive(&header.input_empty[mover]);
  }
}

template <typename T>
__device__ __forceinline__ void run_producers(const WeightGemm& g, const WeightOperands& operands,
                                              const Place& place, Header& header, uint8_t* cells,
                                              uint8_t* input, uint8_t* raw) {
  const int warp = int(threadIdx.x) / kWarp;
  if (warp >= T::kMovers) {
    run_movers<T>(g, operands, place, header, cells, input);
  } else if (threadIdx.x % kWarp == 0) {
    if (warp == T::kLoaders)
      for (Loader<T> loader(g, place); !loader.done();) loader.load(g, operands, header, raw);
    else if (g.input_way == InputWay::kBoxes)
      load_input<T>(g, operands, place, header, input);
  }
}

}  // namespace convops::cuda::implicit_gemm_weight

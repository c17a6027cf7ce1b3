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
  return w + (inside ? kinds.begins[kinds.kind(octet, h)] : 0);
}
// Boxes begin at multiples of 16 bytes.
constexpr int kVectorMask = vector_elements(2) - 1;

// Copies a piece's rows for the movers.
template <typename T>
__device__ __forceinline__ void load_piece(const WeightGemm& g, const WeightOperands& operands,
                                           const Place& place, Header& header,
                                           const Pieces<T>& pieces, uint8_t* raw) {
  const RowKinds& kinds = g.input_kinds;
  const int first_channel = place.group * g.group_channels() >> kinds.channels_log;
  const int box_bytes = kOctet * weight_raw_pitch(T::pitch(g)) * 2;
  const SlotPlace at(g, place, pieces.slots);
  const bool inside = unsigned(at.h) < unsigned(g.height);
  uint64_t* const full = &header.input_full[pieces.raw.index];
  uint8_t* to = raw + pieces.raw.index * T::kPieceBytes;
  ptx::barrier_wait(&header.input_empty[pieces.raw.index], pieces.raw.parity ^ 1);
  for (int i = 0; i < T::kOctetsOfPiece; ++i, to += box_bytes) {
    const int octet = at.channel / kOctet + pieces.first_octet() + i;
    const int32_t box[4] = {
        box_column(g, octet, at.h, at.w) & ~kVectorMask, inside ? at.h >> kinds.rows_log : -1,
        first_channel + (octet >> kinds.channels_log) * kOctet, pieces.slots.row.image};
    const int kind = kinds.kind(octet, inside ? at.h : 0);
    ptx::expect_bytes(full, box_bytes);
    ptx::copy_box(to, &operands.input_maps[kind], box, full);
  }
  ptx::barrier_arrive(full);
}

// Copies grad_output, and the input for the movers, in the order in which they are needed: a stage
// of grad_output behind the first of its rows, for there may not be slots for the others until
// consumers have begun it.
template <typename T>
__device__ __forceinline__ void run_loader(const WeightGemm& g, const WeightOperands& operands,
                                           const Place& place, Header& header, uint8_t* input,
                                           uint8_t* raw) {
  Loader<T> loader(g, place);
  if (g.input_way == InputWay::kBoxes) {
    int rows = 0;  // of the stage
    for (Pieces<T> pieces{{Rows(g, place)}}; !pieces.done(); pieces.next(g)) {
      load_piece<T>(g, operands, place, header, pieces, input);
      if (!pieces.ends_row()) continue;
      if (rows == 0) loader.load(g, operands, header, raw);
      if (++rows == T::stage_rows(g)) rows = 0;
    }
  }
  while (!loader.done()) loader.load(g, operands, header, raw);
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
__device__ __forceinline__ void transpose_piece(const WeightGemm& g, const SlotPlace<T>& at,
                                                const uint8_t* raw, const SlotCells<T>& cells,
                                                uint4* nowhere, int first_octet, int lane) {
  constexpr int kSide = 8, kColumns = 4 * kSide;  // of a matrix, of an instruction
  const int in_matrix = lane % kSide, pitch = T::pitch(g), raw_pitch = weight_raw_pitch(pitch);
  const uint32_t to_nowhere = shared_address(nowhere), to_mirror = cells.to_mirror() * 16;
  const uint32_t first = shared_address(raw) + (lane - in_matrix + in_matrix * raw_pitch) * 2;
#pragma unroll 1
  for (int i = 0; i < T::kOctetsOfPiece; ++i) {
    const int octet = first_octet + i;
    const int column = box_column(g, at.channel / kOctet + octet, at.h, at.w);
    // What a box has of the memory before a row is not the row's: padding.
    const int outside = column == at.w ? 0 : min(max(-at.w, 0), pitch);
    int cell = lane - (column & kVectorMask);
    uint32_t from = first + i * kOctet * raw_pitch * 2;
    uint32_t to = shared_address(cells.octet(octet) + cell);
    // At most the last instruction reads past the row, into what follows it in shared memory.
#pragma unroll 4
    for (int j = 0; j < raw_pitch; j += kColumns) {
      uint32_t matrices[4];
      ptx::load_transposed(matrices, from);
      const bool is_cell = cell >= outside && cell < pitch;
      ptx::store_matrices(is_cell ? to : to_nowhere, matrices);
      if (to_mirror > 0) ptx::store_matrices(is_cell ? to + to_mirror : to_nowhere, matrices);
      cell += kColumns;
      from += kColumns * 2;
      to += kColumns * 16;
    }
    for (int j = lane; j < outside; j += kWarp)
      cells.store(cells.octet(octet) + j, make_uint4(0, 0, 0, 0));
  }
}

// Octets of channels that are neighbours in the input, those of a cell by lanes side by side.
template <typename T>
__device__ __forceinline__ void copy_piece(const WeightGemm& g, const Place& place,
                                           const SlotPlace<T>& at, const uint16_t* image,
                                           const uint16_t* anywhere, const SlotCells<T>& cells,
                                           int first_octet, int lane) {
  const uint16_t* const row = image + place.group * g.channels + at.channel + at.h * g.row_stride;
  const bool has_row = unsigned(at.h) < unsigned(g.height);
#pragma unroll 2
  for (int i = lane; i < T::pitch(g) * T::kOctetsOfPiece; i += kWarp) {
    const int cell = i / T::kOctetsOfPiece, octet = first_octet + i % T::kOctetsOfPiece;
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
}

// Element by element, phases of channels too.
template <typename T>
__device__ __forceinline__ void gather_piece(const WeightGemm& g, const Place& place,
                                             const SlotPlace<T>& at, const uint16_t* image,
                                             const SlotCells<T>& cells, int first_octet, int lane) {
  const uint16_t* const from =
      image + int64_t(place.group) * g.group_channels() * g.channel_stride + at.h * g.row_stride;
#pragma unroll 1
  for (int i = lane; i < T::pitch(g) * T::kOctetsOfPiece; i += kWarp) {
    const int part = i / T::pitch(g), cell = i - part * T::pitch(g), octet = first_octet + part;
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

// Warps take pieces by turns.
template <typename T>
__device__ __forceinline__ void run_movers(const WeightGemm& g, const WeightOperands& operands,
                                           const Place& place, Header& header, uint8_t* cells,
                                           const uint8_t* raw) {
  const int mover = int(threadIdx.x) / kWarp - T::kMovers, lane = int(threadIdx.x) % kWarp;
  const auto* const input = static_cast<const uint16_t*>(operands.input);
  const bool boxes = g.input_way == InputWay::kBoxes, octets = g.input_way == InputWay::kOctets;
  Pieces<T> pieces{{Rows(g, place)}};
  const auto skip = [&](int count) {
    for (int i = 0; i < count; ++i) pieces.next(g);
  };
  const auto announce = [&](int slot) {
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.cells_full[slot]);
  };
  int under_way[kCopiesAhead] = {}, begun = 0;  // slots, the oldest first, and how many pieces
  for (skip(mover); !pieces.done(); skip(kMoverWarps)) {
    const int slot = pieces.slot.index, first_octet = pieces.first_octet();
    const SlotPlace at(g, place, pieces.slots);
    const SlotCells<T> to(g, cells, slot);
    const uint16_t* const image = input + pieces.slots.row.image * g.image_stride;
    if (boxes) ptx::barrier_wait(&header.input_full[pieces.raw.index], pieces.raw.parity);
    ptx::barrier_wait(&header.cells_empty[slot], pieces.slot.parity ^ 1);
    __syncwarp();
    if (octets) {
      copy_piece<T>(g, place, at, image, input, to, first_octet, lane);
      if (++begun > kCopiesAhead) {
        ptx::copy_wait<kCopiesAhead>();
        announce(under_way[0]);
      }
      for (int i = 0; i < kCopiesAhead - 1; ++i) under_way[i] = under_way[i + 1];
      under_way[kCopiesAhead - 1] = slot;
    } else {
      if (boxes)
        transpose_piece<T>(g, at, raw + pieces.raw.index * T::kPieceBytes, to, &header.nowhere,
                           first_octet, lane);
      else
        gather_piece<T>(g, place, at, image, to, first_octet, lane);
      announce(slot);
      if (boxes) ptx::barrier_arrive(&header.input_empty[pieces.raw.index]);
    }
  }
  ptx::copy_wait<0>();
#pragma unroll
  for (int i = 0; i < kCopiesAhead; ++i)
    if (begun >= kCopiesAhead - i) announce(under_way[i]);
}

template <typename T>
__device__ __forceinline__ void run_producers(const WeightGemm& g, const WeightOperands& operands,
                                              const Place& place, Header& header, uint8_t* cells,
                                              uint8_t* input, uint8_t* raw) {
  const int warp = int(threadIdx.x) / kWarp;
  if (warp >= T::kMovers)
    run_movers<T>(g, operands, place, header, cells, input);
  else if (threadIdx.x % kWarp == 0)
    run_loader<T>(g, operands, place, header, input, raw);
}

}  // namespace convops::cuda::implicit_gemm_weight

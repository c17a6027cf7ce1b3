// What the warps of implicit_gemm_weight's main kernel share (implicit_gemm_weight_sm90.cu): their
// numbers, the traits of a kernel, where a block works, the rings in shared memory.
#pragma once

#include <cstdint>

#include "cuda/implicit_gemm_scale.cuh"
#include "cuda/implicit_gemm_weight.h"
#include "cuda/types.cuh"

namespace convops::cuda::implicit_gemm_weight {

using implicit_gemm::choose_scale;
using implicit_gemm::kHalfUnit;
using implicit_gemm::pack;
using implicit_gemm::pack_rest;
using implicit_gemm::Scale;

constexpr int kWarp = 32;
constexpr int kConsumerWarps = 8;
static_assert(kStagePixels / kStepPixels <= promoted_steps(3),
              "sums leave the tensor cores after a stage");
constexpr int kMaxStages = 4, kMaxConverterGroups = 4, kMaxGroupWarps = 4, kMaxInputStages = 3;
constexpr int kHeader = 5120;
// Of 16 bits one thread loads grad_output and the input, and warps take pieces of slots, two
// octets, by turns. A piece has a raw stage, or copies under way while others are begun.
constexpr int kLoaderWarps = 1, kMoverWarps = 3, kPieceOctets = 2;
constexpr int kRawPieces = 2 * kMoverWarps, kCopiesAhead = 2;
// So many rows, of the products that 16 bits need not be promoted for, are summed in the tensor
// cores.
constexpr int kPromotedRows = kMostHalfProducts / kStagePixels;
constexpr int kBoxAlignment = 1024;  // of boxes of swizzled rows

// Where a block works.
struct Place {
  int group, channel, out_channel;  // the first of the group's
  int tap_h, tap_w;                 // the first
  int split;
  int64_t begin, end;  // rows of grad_output

  __device__ Place(const WeightGemm& g, WeightTile tile, int index) {
    const auto next = [&](int size) {
      const int digit = index % size;
      index /= size;
      return digit;
    };
    channel = next(g.channel_tiles) * tile.channels();
    out_channel = next(g.out_channel_tiles) * tile.out_channels();
    tap_w = next(g.taps_w) * tile.kernel_w;
    tap_h = next(g.taps_h) * tile.kernel_h;
    group = next(g.groups);
    split = index;
    begin = g.rows * split / g.splits;
    end = g.rows * (split + 1) / g.splits;
  }
};

struct Header {
  Place place;  // here it takes no registers
  uint64_t raw_full[kMaxStages], raw_scaled[kMaxStages], raw_empty[kMaxStages];
  uint64_t cells_full[kMaxRing], cells_empty[kMaxRing];
  float cells_unit[kMaxRing];         // what 1 stands for
  float2 row_scale[kMaxStages][128];  // of an out channel: factor, and what 1 stands for
  uint32_t largest[kMaxConverterGroups][kMaxInputStages][kMaxGroupWarps];
  // Of 16 bits:
  uint64_t input_full[kRawPieces], input_empty[kRawPieces];
  uint4 nowhere;  // where movers put what is no cell
};
static_assert(sizeof(Header) <= kHeader);

// E: of the tensors' elements.
template <WeightTile tile, typename E, int kProducts_>
struct Traits {
  using Element = E;
  static constexpr WeightTile kTile = tile;
  // Elements of 16 bits are multiplied as they are: no scales.
  static constexpr bool kHalf = sizeof(E) == 2;
  using Raw = std::conditional_t<kHalf, uint16_t, float>;  // to those who move them
  static constexpr int kKernelW = tile.kernel_w, kProducts = kProducts_;
  static constexpr int kParts = kProducts == 3 ? 2 : 1;  // of a number: high, with three low
  static constexpr bool kLayered = tile.layers > 1;
  static_assert(!kLayered || tile.kernel_h * tile.kernel_w == 1);
  // What is known of the others where they are compiled.
  static constexpr bool kGeneral = kLayered || tile.narrow;
  __device__ static int pitch(const WeightGemm& g) { return tile.narrow ? g.pitch : kMostPitch; }
  __device__ static int stage_rows(const WeightGemm& g) { return tile.narrow ? g.stage_rows : 1; }
  __device__ static int ring(const WeightGemm& g) {
    return tile.narrow ? g.ring : kSlots - tile.mirrored();
  }
  __device__ static int channel_kinds_log(const WeightGemm& g) {
    return kGeneral || kHalf ? g.grad_kinds.channels_log : 0;
  }
  static constexpr int kSlots = tile.slots(kHalf);
  static constexpr int kWindow = tile.window();
  // Of a warpgroup: octets, columns of an instruction, sums of a thread for a tap of a row.
  static constexpr int kOctets = tile.octets, kColumns = kWindow * kOctets * kOctet;
  static constexpr int kSums = kColumns / 2;
  static_assert(kSums * kKernelW <= (kHalf ? 144 : 72),
                "two sets of sums (of 16 bits one) and the operands fit the registers");
  static constexpr int kBlockOctets = tile.slot_channels() / kOctet;
  static_assert(kHalf || kBlockOctets <= 2, "a converter has registers for so many");
  // Of 16 bits, of a slot:
  static constexpr int kOctetsOfPiece = kBlockOctets < kPieceOctets ? kBlockOctets : kPieceOctets;
  static constexpr int kPieces = kBlockOctets / kOctetsOfPiece;
  // Consumers wait for a window while a warp has begun so many pieces more than it has announced:
  // there must be slots for both.
  static_assert(!kHalf || kSlots - tile.mirrored() >=
                              tile.window() + (kCopiesAhead * kMoverWarps + kPieces - 1) / kPieces);
  // Cells of a slot or of several narrow ones, a thread's each.
  static constexpr int kCells = kStagePixels + (kKernelW > 1 ? kReach : 0);
  // Warps that find grad_output's scales, of which one thread loads it too, and that convert the
  // input, groups of which take slots by turns: layers are as much work as all of grad_output.
  static constexpr int kScalerWarps = kLayered ? 8 : 4;
  static constexpr int kConverterGroups = tile.layers;
  static constexpr int kGroupWarps = (kCells + kWarp - 1) / kWarp;
  static_assert(kConverterGroups <= kMaxConverterGroups && kGroupWarps <= kMaxGroupWarps);
  static constexpr int kScalers = kConsumerWarps, kConverters = kScalers + kScalerWarps;  // first
  static constexpr int kLoaders = kConsumerWarps, kMovers = kLoaders + kLoaderWarps;
  static constexpr int kWarps =
      kHalf ? kMovers + kMoverWarps : kConverters + kConverterGroups * kGroupWarps;
  static constexpr int kConsumerRegisters = kHalf ? 216 : kLayered ? 112 : tile.narrow ? 192 : 200;
  static constexpr int kProducerRegisters = kHalf ? 72 : tile.narrow ? 64 : 56;
  // What a warp's threads have at the launch. For more in all setmaxnreg would wait for ever.
  static constexpr int kRegisters = 65536 / (kWarps * kWarp) / 8 * 8;
  static_assert(kConsumerRegisters * kConsumerWarps +
                    kProducerRegisters * (kWarps - kConsumerWarps) <=
                kRegisters * kWarps);
  // Raw rows of the input, each thread's its own: one to convert and those on their way.
  static constexpr int kInputStages = kLayered ? 2 : 3;
  // Of a part, a warpgroup's octets.
  static constexpr int kGroupBytes = kSlots * kOctets * kMostPitch * kOctet * 2;
  static constexpr int kPartBytes = (kBlockOctets / kOctets) * kGroupBytes;
  static constexpr int kRawBytes = kTile.out_channels() * kMostPitch * int(sizeof(E));
  static constexpr int kInputFloats = kBlockOctets * kOctet * kCells;  // of a stage
  static constexpr int kGroupFloats = kInputStages * kInputFloats;     // of a group of converters
  // Of 16 bits: as many rows as a piece has channels.
  static constexpr int kPieceBytes = kOctetsOfPiece * kOctet * weight_raw_pitch(kMostPitch) * 2;
  static constexpr int kInputBytes =
      kHalf ? kRawPieces * kPieceBytes : kConverterGroups * kGroupFloats * 4;
  static constexpr int kRawAt = (kHeader + kParts * kPartBytes + kInputBytes + kBoxAlignment - 1) /
                                kBoxAlignment * kBoxAlignment;
  static_assert(!kHalf || kRawBytes % kBoxAlignment == 0);
  static constexpr int kRoom = (kMaxSharedMemory - kRawAt) / kRawBytes;
  static constexpr int kStages = kRoom < kMaxStages ? kRoom : kMaxStages;
  static_assert(kStages >= 2);
  static constexpr int kSharedBytes = kRawAt + kStages * kRawBytes;
};

// Walks through rows of grad_output in *runs* down a segment of an image: a run's rows are as far
// apart as the kernel's, so that a row's taps are rows of the input one after the other.
class Rows {
 public:
  __device__ Rows(const WeightGemm& g, const Place& place) : left_(int(place.end - place.begin)) {
    const int height = g.out_height, step = g.dilation_h;
    column_ = int(place.begin / height);
    const int row = int(place.begin % height);
    // Runs of one row more come first.
    const int shorter = height / step, longer = height % step;
    const int run =
        row < longer * (shorter + 1) ? row / (shorter + 1) : (row - longer) / max(1, shorter);
    y = run + (row - run * shorter - min(run, longer)) * step;
    set_column(g);
  }
  __device__ bool done() const { return left_ <= 0; }
  // Whether a run begins.
  __device__ bool next(const WeightGemm& g) {
    --left_;
    y += g.dilation_h;
    if (y < g.out_height) return false;
    y = y % g.dilation_h + 1;
    if (y >= min(g.dilation_h, g.out_height)) {
      y = 0;
      ++column_;
      set_column(g);
    }
    return true;
  }

  int image, x, y;  // x: the segment's first pixel

 private:
  // A segment's columns, one of each image, follow each other, so that blocks on different segments
  // read the same rows at the same time: what is fetched at a segment's ends serves both. Where an
  // image is one row its segments do, for the same reason.
  __device__ void set_column(const WeightGemm& g) {
    const bool by_segments = g.out_height > 1;
    const int inner = by_segments ? g.images : g.segments;
    const int outer = column_ / inner, rest = column_ - outer * inner;
    image = by_segments ? rest : outer;
    x = (by_segments ? outer : rest) * kStagePixels;
  }

  int column_, left_;
};

// A place in a ring of stages and the parity of its barriers' phase.
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ void next(int count) {
    if (++index < count) return;
    index = 0;
    parity ^= 1;
  }
};

// Walks through the slots of a block's rows: a run begins with the rows of all taps; a row has all
// layers.
template <typename T>
struct Slots {
  Rows row;
  int turn = 0;  // of the window

  __device__ void next(const WeightGemm& g) {
    if (row.done()) return;
    if (turn < T::kWindow - 1)
      ++turn;
    else if (row.next(g) || T::kLayered)
      turn = 0;
  }
};

// Walks through the pieces of the slots, and says where in both rings they are.
template <typename T>
struct Pieces {
  Slots<T> slots;
  Stage slot{}, raw{};
  int piece = 0;

  __device__ bool done() const { return slots.row.done(); }
  __device__ bool ends_row() const {
    return piece == T::kPieces - 1 && slots.turn == T::kWindow - 1;
  }
  __device__ int first_octet() const { return piece * T::kOctetsOfPiece; }
  __device__ void next(const WeightGemm& g) {
    raw.next(kRawPieces);
    if (++piece < T::kPieces) return;
    piece = 0;
    slots.next(g);
    slot.next(T::ring(g));
  }
};

// What a slot holds: cells from (h, w) of an image on, of the channels of the sum from `channel`.
template <typename T>
struct SlotPlace {
  int channel, h, w;

  __device__ SlotPlace(const WeightGemm& g, const Place& place, const Slots<T>& slots) {
    const int tap = place.tap_h + (T::kLayered ? 0 : slots.turn);
    channel = place.channel + (T::kLayered ? slots.turn * T::kTile.slot_channels() : 0);
    h = (slots.row.y + tap * g.dilation_h) * g.stride_h - g.padding_h;
    w = (slots.row.x + place.tap_w * g.dilation_w) * g.stride_w - g.padding_w;
  }
};

}  // namespace convops::cuda::implicit_gemm_weight

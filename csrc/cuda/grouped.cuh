// The kernel of grouped convolution: groups of few channels on tensor cores, by way of registers.
//
// mma.m16n8k8 multiplies 16 pixels × 8 channels by 8 × 8 weights of one tap. A thread reads, of two
// of the 8 channels, a *strip*: the source columns under 4 consecutive results of one row. So a tap
// along W is a choice of registers, and each element is loaded and split once for all taps. Strips
// come through a ring in shared memory that belongs to the thread alone: loads of the next steps
// are under way, and nobody waits for anybody.
//
//   lane               4 · strip + c; the 8 strips of a warp may lie anywhere
//   rows r, r + 8      cells m and m + 2 of strip r, in the m-th of two instructions
//   columns c, c + 4   channels c and c + 4 of the source
//
// Taps along H: a warp walks down a band of rows. A source row adds to the sums of every result row
// it is under; then these move on by a row, and the last is stored.
//
// Groups of fewer than 8 channels share the 8 by a block-diagonal weight; source channels past 8
// are further steps of a row, result channels past 8 further tiles of a warp or further blocks.
#pragma once

#include "cuda/grouped_taps.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/max.cuh"
#include "cuda/ptx/mma.cuh"

namespace convops::cuda::grouped {

// The weights of one tap as a lane's part of an 8×8 matrix: rows c and c + 4, column lane / 4.
template <int kProducts>
struct alignas(8 * Parts<kProducts>::kCount) WeightFragment {
  uint32_t part[Parts<kProducts>::kCount][2];
};

// The channels of a block: of the merged groups, and the first of its tiles among the results'.
struct Place {
  int first_group, source_channels, result_channels, first_channel;
};

__device__ __forceinline__ int64_t weight_offset(const Grouped& g, int group, int source,
                                                 int result) {
  return g.weight_first + group * g.weight_group + source * g.weight_source +
         result * g.weight_result;
}

// Packs the block's weights into fragments [step][tile][tap][lane]; whether all are plain.
template <typename Taps, int kProducts, int kTiles>
__device__ bool pack_weights(const Grouped& g, const Place& place, const float* weight,
                             WeightFragment<kProducts>* fragments) {
  constexpr int kTaps = Taps::kSize * Taps::kSize;
  bool plain = true;
#pragma unroll 4
  for (int i = threadIdx.x; i < g.steps * kTiles * kTaps * kWarp; i += kThreads) {
    const int lane = i % kWarp, tap = i / kWarp % kTaps, octets = i / kWarp / kTaps;
    const int result = place.first_channel + octets % kTiles * kOctet + lane / kQuad;
    const int group = result / g.result_channels;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source = octets / kTiles * kOctet + lane % kQuad + half * kQuad;
      float value = 0;
      if (result < place.result_channels && source < place.source_channels &&
          source / g.source_channels == group)
        value = weight[weight_offset(g, place.first_group + group, source % g.source_channels,
                                     result % g.result_channels) +
                       tap / Taps::kSize * g.weight_row + tap % Taps::kSize * g.weight_column];
      plain &= fabsf(value) < kLargestWeight;
      const auto parts = Parts<kProducts>::of(value);
#pragma unroll
      for (int part = 0; part < parts.kCount; ++part)
        fragments[i].part[part][half] = parts.part[part];
    }
  }
  return !__syncthreads_or(!plain);
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// What a thread has in shared memory: the columns of its strip of two channels, of kStages steps.
// Nobody else touches them, so there is nothing to synchronise. Lanes are the fastest index.
template <typename Taps>
struct alignas(16) Ring {
  struct alignas(16) Vector {
    float element[kCells];
  };
  struct Stage {
    Vector vectors[2][Taps::kVectors][kThreads];
    float others[2][Taps::kColumns - Taps::kVectors * kCells][kThreads];
  };
  Stage stages[kStages];
};

// The strip of a thread: where the next step's columns are.
template <typename Taps>
struct Strip {
  const float* next;  // column 0 of channel c of the step
  int row, octet;
  int rows;         // those from here on are not needed
  uint32_t inside;  // a bit for each column within the source

  template <int kCount>
  __device__ __forceinline__ void copy_columns(typename Ring<Taps>::Stage& stage, int half,
                                               const float* columns, uint32_t bits) const {
    int other = 0;
#pragma unroll
    for (int i = 0; i < Taps::kColumns; ++i) {
      const int k = i - Taps::kAligned;
      if (!Taps::in_vector(i))
        ptx::copy_bytes<4>(shared_address(&stage.others[half][other++][threadIdx.x]), columns + i,
                           bits >> i & 1);
      else if (k % kCount == 0)
        ptx::copy_bytes<4 * kCount>(
            shared_address(&stage.vectors[half][k / kCells][threadIdx.x].element[k % kCells]),
            columns + i, bits >> i & 1);
    }
  }

  // Starts to load two channels, zeros outside, and moves on to the next step. `channels`: from
  // channel c of the first octet on.
  __device__ __forceinline__ void load(const Grouped& g, int channels,
                                       typename Ring<Taps>::Stage& stage) {
    const uint32_t row_inside = unsigned(row) < unsigned(rows) ? inside : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* columns = next + half * kQuad * g.source_channel;
      const uint32_t bits = octet * kOctet + half * kQuad < channels ? row_inside : 0;
      if (g.source_vector == 4)
        copy_columns<4>(stage, half, columns, bits);
      else if (g.source_vector == 2)
        copy_columns<2>(stage, half, columns, bits);
      else
        copy_columns<1>(stage, half, columns, bits);
    }
    ptx::copy_commit();
    const bool row_ends = ++octet == g.steps;
    next += row_ends ? g.next_row : g.next_octet;
    row += row_ends;
    if (row_ends) octet = 0;
  }
};

// Reads a thread's columns as parts; whether they are plain.
template <typename Taps, int kProducts>
__device__ __forceinline__ bool read_parts(const typename Ring<Taps>::Stage& stage,
                                           Parts<kProducts> (&values)[2][Taps::kColumns]) {
  float largest = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    typename Ring<Taps>::Vector vectors[Taps::kVectors];
#pragma unroll
    for (int i = 0; i < Taps::kVectors; ++i) vectors[i] = stage.vectors[half][i][threadIdx.x];
    int other = 0;
#pragma unroll
    for (int i = 0; i < Taps::kColumns; ++i) {
      const int k = i - Taps::kAligned;
      const float value = Taps::in_vector(i) ? vectors[k / kCells].element[k % kCells]
                                             : stage.others[half][other++][threadIdx.x];
      largest = ptx::max_nan(largest, fabsf(value));
      values[half][i] = Parts<kProducts>::of(value);
    }
  }
  return largest < kLargestSource;
}

// Sums of a thread: of rows that are not complete, and last of the one that is. [delay][row phase]
// [column phase][tile][mma][as the instruction has them: cell m, m + 2 of two channels each].
template <typename Taps, int kTiles>
using Sums = float[Taps::kDelay + 1][Taps::kPhases][Taps::kPhases][kTiles][kMmas][4];

// Every row's sums become those of the row below.
template <typename Taps, int kTiles>
__device__ __forceinline__ void move_on(Sums<Taps, kTiles>& sums) {
#pragma unroll
  for (int delay = Taps::kDelay; delay >= 0; --delay)
#pragma unroll
    for (int i = 0; i < Taps::kPhases * Taps::kPhases * kTiles * kMmas * 4; ++i)
      (&sums[delay][0][0][0][0][0])[i] = delay ? (&sums[delay - 1][0][0][0][0][0])[i] : 0.f;
}

// Adds the products of one step by the instruction. A chain of sums in the tensor core, which cuts
// instead of rounding, is no longer than a row of taps. Taps along H have chains of their own, so
// that six are under way.
template <typename Taps, int kProducts, int kTiles>
__device__ __forceinline__ void add_products(const Parts<kProducts> (&values)[2][Taps::kColumns],
                                             const WeightFragment<kProducts>* fragments, int stride,
                                             int source, Sums<Taps, kTiles>& sums) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile, fragments += Taps::kSize * Taps::kSize * stride) {
    float chain[Taps::kSize][Taps::kPhases][kMmas][4] = {};
#pragma unroll
    for (int kw = 0; kw < Taps::kSize; ++kw) {
      WeightFragment<kProducts> b[Taps::kSize];
#pragma unroll
      for (int kh = 0; kh < Taps::kSize; ++kh)
        if (Taps::source(kh) == source) b[kh] = fragments[(kh * Taps::kSize + kw) * stride];
#pragma unroll
      for (int product = kProducts - 1; product >= 0; --product)  // small ones first
#pragma unroll
        for (int mma = 0; mma < kMmas; ++mma) {
          const int first = mma * Taps::kSources + Taps::position(kw);
          const int second = first + kMmas * Taps::kSources;
          const int part = product & 1;
          const uint32_t a[4] = {values[0][first].part[part], values[0][second].part[part],
                                 values[1][first].part[part], values[1][second].part[part]};
#pragma unroll
          for (int kh = 0; kh < Taps::kSize; ++kh)
            if (Taps::source(kh) == source)
              ptx::mma_tf32(chain[kh][Taps::phase(kw)][mma], a, b[kh].part[product >> 1]);
        }
    }
#pragma unroll
    for (int kh = 0; kh < Taps::kSize; ++kh) {
      if (Taps::source(kh) != source) continue;
#pragma unroll
      for (int phase = 0; phase < Taps::kPhases; ++phase)
#pragma unroll
        for (int i = 0; i < kMmas * 4; ++i) {
          float& sum = sums[Taps::delay(kh)][Taps::phase(kh)][phase][tile][i / 4][i % 4];
          sum = fmaf(chain[kh][phase][i / 4][i % 4], kUnscale, sum);
        }
    }
  }
}

// The same by fused multiply-adds, exact for all numbers: of a step in which some are not plain.
// `columns`: the strip's of channel 0.
template <typename Taps, int kTiles>
__device__ __forceinline__ void add_exactly(const Grouped& g, const Place& place,
                                            const float* columns, uint32_t inside,
                                            const float* weight, int step, int source,
                                            Sums<Taps, kTiles>& sums) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int result = place.first_channel + tile * kOctet + threadIdx.x % kQuad * 2 + side;
      if (result >= place.result_channels) continue;
      const int group = result / g.result_channels;
      const int end = min((step + 1) * kOctet, (group + 1) * g.source_channels);
#pragma unroll 1
      for (int channel = max(step * kOctet, group * g.source_channels); channel < end; ++channel) {
        float values[Taps::kColumns];
#pragma unroll
        for (int i = 0; i < Taps::kColumns; ++i)
          values[i] = inside >> i & 1 ? columns[channel * g.source_channel + i] : 0.f;
        const float* taps =
            weight + weight_offset(g, place.first_group + group,
                                   channel - group * g.source_channels, result % g.result_channels);
#pragma unroll
        for (int kh = 0; kh < Taps::kSize; ++kh) {
          if (Taps::source(kh) != source) continue;
#pragma unroll
          for (int kw = 0; kw < Taps::kSize; ++kw) {
            const float tap = taps[kh * g.weight_row + kw * g.weight_column];
#pragma unroll
            for (int cell = 0; cell < kCells; ++cell) {
              const int i = cell * Taps::kSources + Taps::position(kw);
              float& sum = sums[Taps::delay(kh)][Taps::phase(kh)][Taps::phase(kw)][tile]
                               [cell % kMmas][cell / kMmas * 2 + side];
              sum = fmaf(values[i], g.skips_outside && !(inside >> i & 1) ? 0.f : tap, sum);
            }
          }
        }
      }
    }
}

template <int kCount>
__device__ __forceinline__ void store_vectors(float* place, const float* values, int count) {
  struct alignas(kCount * sizeof(float)) Vector {
    float element[kCount];
  };
#pragma unroll
  for (int i = 0; i < kCells; i += kCount) {
    Vector vector;
#pragma unroll
    for (int k = 0; k < kCount; ++k) vector.element[k] = values[i + k];
    if (i < count) *reinterpret_cast<Vector*>(place + i) = vector;
  }
}

// Where a strip's results are stored.
struct Results {
  float* next;      // of the next row: the first cell, channel 2 · (lane % 4) of the first tile
  int rows;         // that are left
  int columns;      // from the first cell on
  uint32_t stored;  // a bit for each tile and side that has a channel
};

// Stores a row of cells and moves on to the next.
template <typename Taps, int kTiles>
__device__ __forceinline__ void store_cells(
    const Grouped& g, const float (&sums)[Taps::kPhases][Taps::kPhases][kTiles][kMmas][4],
    const float (&bias)[kTiles][2], Results& results) {
#pragma unroll
  for (int phase = 0; phase < Taps::kPhases; ++phase) {
    if (results.rows > 0)
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if (!(results.stored >> i & 1)) continue;
        float* line = results.next + (i / 2 * kOctet + i % 2) * g.result_channel;
        float values[Taps::kPhases * kCells];
#pragma unroll
        for (int k = 0; k < Taps::kPhases * kCells; ++k) {
          const int cell = k / Taps::kPhases;
          values[k] =
              sums[phase][k % Taps::kPhases][i / 2][cell % kMmas][cell / kMmas * 2 + i % 2] +
              bias[i / 2][i % 2];
        }
#pragma unroll
        for (int k = 0; k < Taps::kPhases * kCells; k += kCells) {
          if (g.result_vector == 4)
            store_vectors<4>(line + k, values + k, results.columns - k);
          else if (g.result_vector == 2)
            store_vectors<2>(line + k, values + k, results.columns - k);
          else
            store_vectors<1>(line + k, values + k, results.columns - k);
        }
      }
    results.next += g.result_row;
    --results.rows;
  }
}

// Blocks of a multiprocessor: as many as registers allow without spills.
template <typename Taps, int kProducts, int kTiles>
constexpr int kResidentBlocks = 4 - (kProducts > 1) - (kTiles > 1 || Taps::kPhases > 1);
// ptxas spills for sm_120 unless it may plan with one fewer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kSpareBlocks = 1;
#else
constexpr int kSpareBlocks = 0;
#endif

// kResident: one step and one tile; the weights stay in registers. Grid: x items, y merged groups ·
// blocks of tiles.
template <typename Taps, int kProducts, int kTiles, bool kResident>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Taps, kProducts, kTiles> - kSpareBlocks)
    grouped_kernel(const __grid_constant__ Grouped g, const float* __restrict__ source,
                   const float* __restrict__ weight, const float* __restrict__ bias,
                   float* __restrict__ result) {
  constexpr int kTaps = Taps::kSize * Taps::kSize;
  using Fragment = WeightFragment<kProducts>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto& ring = *reinterpret_cast<Ring<Taps>*>(shared);
  const auto fragments = reinterpret_cast<Fragment*>(shared + sizeof(ring));

  const int lane = threadIdx.x % kWarp;
  const int blocks = (g.merged * g.result_channels + kTiles * kOctet - 1) / (kTiles * kOctet);
  const int item = (blockIdx.x * kWarps + threadIdx.x / kWarp) * kStrips + lane / kQuad;
  Place place;
  place.first_group = blockIdx.y / blocks * g.merged;
  const int groups = min(g.merged, g.groups - place.first_group);
  place.source_channels = groups * g.source_channels;
  place.result_channels = groups * g.result_channels;
  place.first_channel = blockIdx.y % blocks * kTiles * kOctet;

  const bool inside = item < g.items;
  const int cell_w = item % g.strips * kCells;
  const int cell_h = item / g.strips % g.bands * g.rows;
  const int64_t image = inside ? item / g.strips / g.bands : 0;

  const int first_column = cell_w * Taps::kSources + g.origin_w;
  const int first_row = cell_h * Taps::kSources + g.origin_h;
  const int steps_down = g.rows + Taps::kDelay;
  // The first row's first column, of the first channel.
  const float* columns = source + image * g.source_image +
                         int64_t(place.first_group) * g.source_channels * g.source_channel +
                         first_row * g.source_row + first_column;
  Strip<Taps> strip{.next = columns + lane % kQuad * g.source_channel,
                    .row = first_row,
                    .octet = 0,
                    .rows = max(0, min(g.source_height, first_row + steps_down * Taps::kSources)),
                    .inside = 0};
#pragma unroll
  for (int i = 0; i < Taps::kColumns; ++i)
    if (inside && unsigned(first_column + i) < unsigned(g.source_width)) strip.inside |= 1u << i;
  const int channels = place.source_channels - lane % kQuad;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) strip.load(g, channels, ring.stages[stage]);

  const bool plain_weights = pack_weights<Taps, kProducts, kTiles>(g, place, weight, fragments);
  Fragment resident[kTaps];
  if constexpr (kResident)
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) resident[tap] = fragments[tap * kWarp + lane];

  const int result_channel = place.first_channel + lane % kQuad * 2;
  const int64_t group_result = int64_t(place.first_group) * g.result_channels;
  Results results;
  results.next = result + image * g.result_image +
                 (group_result + result_channel) * g.result_channel +
                 int64_t(cell_h) * Taps::kPhases * g.result_row + cell_w * Taps::kPhases;
  results.rows = inside ? g.result_height - cell_h * Taps::kPhases : 0;
  results.columns = g.result_width - cell_w * Taps::kPhases;
  results.stored = 0;
  float shift[kTiles][2] = {};
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int channel = result_channel + i / 2 * kOctet + i % 2;
    if (channel >= place.result_channels) continue;
    results.stored |= 1u << i;
    if (bias) shift[i / 2][i % 2] = bias[(group_result + channel) * g.bias_stride];
  }

  Sums<Taps, kTiles> sums = {};
  int stage = 0;
  for (int t = 0; t < steps_down; ++t) {
#pragma unroll
    for (int from = 0; from < Taps::kSources; ++from) {
      const int row = t * Taps::kSources + from;
      const bool row_inside = unsigned(first_row + row) < unsigned(g.source_height);
      for (int step = 0; step < (kResident ? 1 : g.steps); ++step) {
        ptx::copy_wait<kStages - 1>();
        Parts<kProducts> values[2][Taps::kColumns];
        const bool plain = read_parts<Taps, kProducts>(ring.stages[stage], values);
        strip.load(g, channels, ring.stages[stage]);
        stage = stage + 1 == kStages ? 0 : stage + 1;

        if (from == 0 && step == 0) move_on<Taps, kTiles>(sums);
        if (!__all_sync(~0u, plain) || !plain_weights)
          add_exactly<Taps, kTiles>(g, place, columns + row * g.source_row,
                                    row_inside ? strip.inside : 0, weight, step, from, sums);
        else if (__any_sync(~0u, row_inside))
          add_products<Taps, kProducts, kTiles>(
              values, kResident ? resident : fragments + step * kTiles * kTaps * kWarp + lane,
              kResident ? 1 : kWarp, from, sums);
      }
    }
    if (t >= Taps::kDelay) store_cells<Taps, kTiles>(g, sums[Taps::kDelay], shift, results);
  }
  ptx::copy_wait<0>();
}

}  // namespace convops::cuda::grouped

// The kernel of grouped convolution: groups of few channels on tensor cores, by way of registers.
//
// mma.m16n8k8 multiplies 16 pixels × 8 channels by 8 × 8 weights of one tap. A thread reads, of two
// of the 8 channels, a *strip*: the source columns under 4 consecutive results of one row. So a tap
// along W is a choice of registers, and each element is loaded and split once for all taps. Strips
// come through a ring in shared memory that belongs to the warp alone (grouped_strips.cuh): loads
// of the next steps are under way, and no warp waits for another.
//
//   lane               4 · strip + c; the 8 strips of a warp may lie anywhere
//   rows r, r + 8      cells m and m + 2 of strip r, in the m-th of two instructions
//   columns c, c + 4   channels c and c + 4 of the source
//
// Taps along H: a warp walks down a band of rows, from an image to the next. A source row adds to
// the sums of every result row it is under; then these move on by a row, and the last is stored: if
// it is finite. If not, the thread sums it again by fused multiply-adds, which keep what infinite
// and large numbers are; nothing else looks for them.
//
// Groups of fewer than 8 channels share the 8 by a block-diagonal weight; source channels past 8
// are further steps of a row, result channels past 8 further tiles of a warp or further blocks.
#pragma once

#include "cuda/grouped_strips.cuh"

namespace convops::cuda::grouped {

// The weights of one tap as a lane's part of an 8×8 matrix: rows c and c + 4, column lane / 4.
template <int kProducts>
struct alignas(8 * Tf32Parts<kProducts>::kCount) WeightFragment {
  uint32_t part[Tf32Parts<kProducts>::kCount][2];
};

__device__ __forceinline__ int64_t weight_offset(const Grouped& g, int group, int source,
                                                 int result) {
  return g.weight_first + group * g.weight_group + source * g.weight_source +
         result * g.weight_result;
}

// Packs the block's weights into fragments [step][tile][tap][lane], each warp those of some taps.
template <typename Taps, int kProducts, int kTiles>
__device__ __forceinline__ void pack_weights(const Grouped& g, const Place& place,
                                             const float* weight,
                                             WeightFragment<kProducts>* fragments) {
  constexpr int kTaps = Taps::kSize * Taps::kSize;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int octets = 0; octets < g.steps * kTiles; ++octets, fragments += kTaps * kWarp) {
    const int result = place.first_channel + octets % kTiles * kOctet + lane / kQuad;
    const int group = g.merged > 1 ? result / g.result_channels : 0;
    const float* from[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source =
          octets / kTiles * kOctet + lane % kQuad + half * kQuad - group * g.source_channels;
      exists[half] =
          result < place.result_channels && unsigned(source) < unsigned(g.source_channels);
      from[half] = weight + weight_offset(g, place.first_group + group, source,
                                          result - group * g.result_channels);
    }
#pragma unroll
    for (int i = 0; i < kTaps; i += kWarps) {
      const int tap = i + warp;
      if (tap >= kTaps) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float value = 0;
        if (exists[half])
          value =
              from[half][tap / Taps::kSize * g.weight_row + tap % Taps::kSize * g.weight_column];
        const auto parts = Tf32Parts<kProducts>::of(value);
#pragma unroll
        for (int part = 0; part < parts.kCount; ++part)
          fragments[tap * kWarp + lane].part[part][half] = parts.part[part];
      }
    }
  }
  __syncthreads();
}

// Sums of a thread: of rows that are not complete, and last of the one that is. [delay][row phase]
// [column phase][tile][mma][as the instruction has them: cell m, m + 2 of two channels each].
template <typename Taps, int kTiles>
using RowSums = float[Taps::kPhases][Taps::kPhases][kTiles][kMmas][4];
template <typename Taps, int kTiles>
using Sums = RowSums<Taps, kTiles>[Taps::kDelay + 1];

// Whether some sum of a row is not finite.
template <typename Taps, int kTiles>
__device__ __forceinline__ bool failed(const RowSums<Taps, kTiles>& sums) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < Taps::kPhases * Taps::kPhases * kTiles * kMmas * 4; ++i)
    zero = fmaf((&sums[0][0][0][0][0])[i], 0.f, zero);
  return !(zero == 0);
}

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
__device__ __forceinline__ void add_products(const Columns<Taps, kProducts>& columns,
                                             const WeightFragment<kProducts>* fragments, int stride,
                                             int source, Sums<Taps, kTiles>& sums) {
  constexpr float kUnscale = unscale(kProducts * Taps::kSize / Taps::kPhases);
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
          const auto& a = columns.part[mma * Taps::kSources + Taps::position(kw)][product & 1];
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

// The sums of a row of cells, complete at step `t`, once more: by fused multiply-adds, which is
// right for all numbers.
template <typename Taps, int kTiles>
__device__ __forceinline__ void sum_exactly(const Grouped& g, int t, int cell,
                                            uint32_t columns_inside, const float* source,
                                            const float* weight, RowSums<Taps, kTiles>& sums) {
  const Place place(g, kTiles);
  const Band<Taps> band(g, ptx::thread_index());
  const int image = band.image + (band.cell + t) / (g.cells_h + Taps::kDelay);
  const int row = cell * Taps::kSources + g.origin_h;
  const float* const columns = source + image * g.source_image +
                               int64_t(place.first_group) * g.source_channels * g.source_channel +
                               row * g.source_row + band.first_column(g);
#pragma unroll
  for (int i = 0; i < Taps::kPhases * Taps::kPhases * kTiles * kMmas * 4; ++i)
    (&sums[0][0][0][0][0])[i] = 0;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int result = place.first_channel + tile * kOctet + threadIdx.x % kQuad * 2 + side;
      if (result >= place.result_channels) continue;
      const int group = result / g.result_channels;
      const float* from = columns + group * g.source_channels * g.source_channel;
#pragma unroll 1
      for (int channel = 0; channel < g.source_channels; ++channel, from += g.source_channel) {
        const float* taps = weight + weight_offset(g, place.first_group + group, channel,
                                                   result % g.result_channels);
#pragma unroll
        for (int kh = 0; kh < Taps::kSize; ++kh) {
          const int down = Taps::position(kh);
          const uint32_t inside =
              unsigned(row + down) < unsigned(g.source_height) ? columns_inside : 0;
          float values[Taps::kColumns];
#pragma unroll
          for (int i = 0; i < Taps::kColumns; ++i)
            values[i] = inside >> i & 1 ? from[down * g.source_row + i] : 0.f;
#pragma unroll
          for (int kw = 0; kw < Taps::kSize; ++kw) {
            const float tap = taps[kh * g.weight_row + kw * g.weight_column];
#pragma unroll
            for (int cell = 0; cell < kCells; ++cell) {
              const int i = cell * Taps::kSources + Taps::position(kw);
              float& sum = sums[Taps::phase(kh)][Taps::phase(kw)][tile][cell % kMmas]
                               [cell / kMmas * 2 + side];
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
  float* next;      // of the row: the first cell, channel 2 · (lane % 4) of the first tile
  int row;          // of cells; negative where the image's first are not complete
  int columns;      // from the first cell on
  uint32_t stored;  // a bit for each tile and side that has a channel
};

template <typename Taps, int kTiles, int kCount>
__device__ __forceinline__ void store_cells(const Grouped& g, const RowSums<Taps, kTiles>& sums,
                                            const float (&bias)[kTiles][2],
                                            const Results& results) {
#pragma unroll
  for (int phase = 0; phase < Taps::kPhases; ++phase) {
    if (Taps::kPhases > 1 && results.row * Taps::kPhases + phase >= g.result_height) continue;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (!(results.stored >> i & 1)) continue;
      float* line =
          results.next + phase * g.result_row + (i / 2 * kOctet + i % 2) * g.result_channel;
      float values[Taps::kPhases * kCells];
#pragma unroll
      for (int k = 0; k < Taps::kPhases * kCells; ++k) {
        const int cell = k / Taps::kPhases;
        values[k] = sums[phase][k % Taps::kPhases][i / 2][cell % kMmas][cell / kMmas * 2 + i % 2] +
                    bias[i / 2][i % 2];
      }
#pragma unroll
      for (int k = 0; k < Taps::kPhases * kCells; k += kCells)
        store_vectors<kCount>(line + k, values + k, results.columns - k);
    }
  }
}

// Blocks of a multiprocessor: as many as registers allow without spills.
template <typename Taps, int kProducts, int kTiles>
constexpr int kResidentBlocks = 4 - (kProducts > 1) - (kTiles > 1 || Taps::kPhases > 1);
// ptxas spills for sm_120 unless it may plan with one fewer; not from the PTX of sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
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
  extern __shared__ __align__(16) char shared[];
  const auto fragments = reinterpret_cast<Fragment*>(shared + kWarps * kRingBytes<Taps>);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Place place(g, kTiles);
  const Band<Taps> band(g, threadIdx.x);
  const Seat<Taps> seat(band.strip == 0, band.strip + 1 == g.strips);
  const int first_column = band.first_column(g);
  const int first_row = band.cell * Taps::kSources + g.origin_h;
  const int64_t channel = int64_t(place.first_group) * g.source_channels + lane % kQuad;
  Strip<Taps> strip{.next = source + band.image * g.source_image + channel * g.source_channel +
                            first_row * g.source_row + first_column,
                    .row = first_row,
                    .octet = 0,
                    .rows = band.steps * Taps::kSources,
                    .inside = 0};
#pragma unroll
  for (int i = 0; i < Taps::kColumns; ++i)
    if (unsigned(first_column + i) < unsigned(g.source_width)) strip.inside |= 1u << i;
  const int channels = place.source_channels - lane % kQuad;
  int first_stage = warp * kRingBytes<Taps>;
  if constexpr (kKeeps<Taps>) ptx::keep(first_stage);
  const int last_stage = first_stage + (kStages - 1) * Stage<Taps>::kBytes;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage)
    strip.template load<kResident>(g, channels, seat,
                                   shared + first_stage + stage * Stage<Taps>::kBytes);

  pack_weights<Taps, kProducts, kTiles>(g, place, weight, fragments);
  Fragment resident[kTaps];
  if constexpr (kResident)
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) resident[tap] = fragments[tap * kWarp + lane];

  const int result_channel = place.first_channel + lane % kQuad * 2;
  const int64_t group_result = int64_t(place.first_group) * g.result_channels;
  Results results;
  results.row = band.cell - Taps::kDelay;
  results.next =
      result + band.image * g.result_image + (group_result + result_channel) * g.result_channel +
      int64_t(results.row) * Taps::kPhases * g.result_row + band.strip * kCells * Taps::kPhases;
  results.columns = g.result_width - band.strip * kCells * Taps::kPhases;
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
  int stage = first_stage, used = last_stage;
  const int steps = band.steps, most_steps = __reduce_max_sync(~0u, unsigned(band.steps));
  for (int t = 0; t < most_steps; ++t) {
#pragma unroll
    for (int from = 0; from < Taps::kSources; ++from) {
      for (int step = 0; step < (kResident ? 1 : g.steps); ++step) {
        ptx::copy_wait<kStages - 2>();
        __syncwarp();  // the whole warp's columns have arrived, those of the last step been read
        const Columns<Taps, kProducts> columns(shared + stage, seat);
        strip.template load<kResident>(g, channels, seat, shared + used);
        used = stage;
        stage = stage == last_stage ? first_stage : stage + Stage<Taps>::kBytes;

        if (from == 0 && step == 0) move_on<Taps, kTiles>(sums);
        add_products<Taps, kProducts, kTiles>(
            columns, kResident ? resident : fragments + step * kTiles * kTaps * kWarp + lane,
            kResident ? 1 : kWarp, from, sums);
      }
    }
    RowSums<Taps, kTiles>& complete = sums[Taps::kDelay];
    if (t >= Taps::kDelay && t < steps && results.row >= 0) {
      if (failed<Taps, kTiles>(complete))
        sum_exactly<Taps, kTiles>(g, t, results.row, strip.inside, source, weight, complete);
      if (g.result_vector == 4)
        store_cells<Taps, kTiles, 4>(g, complete, shift, results);
      else if (g.result_vector == 2)
        store_cells<Taps, kTiles, 2>(g, complete, shift, results);
      else
        store_cells<Taps, kTiles, 1>(g, complete, shift, results);
    }
    move(results.next, g.next_cell);
    if (++results.row == g.cells_h) {
      results.row = -Taps::kDelay;
      move(results.next, g.next_result);
    }
  }
  ptx::copy_wait<0>();
}

}  // namespace convops::cuda::grouped

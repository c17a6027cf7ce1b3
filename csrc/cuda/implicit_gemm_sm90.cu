// The main kernel of implicit_gemm: dense convolution of float32 tensors on Hopper's tensor cores.
//
// A persistent block of 16 warps walks over jobs (a block of rows on a tile of cells, see
// implicit_gemm.h); its warps pass data on through rings of stages in shared memory:
//
//   converters  7 warps  source → raw ring (cp.async, any strides, zeros outside) → scaled, rounded
//                        or split into fp16 → source ring
//   streamer    1 warp   packed weights → weight ring (bulk copies)
//   consumers   8 warps  two warpgroups: source ring × weight ring → registers → result
//
// What makes it fast: an element of the source is converted once for all kernel_h · kernel_w taps.
// In the source ring a cell's 8 channels are 16 bytes and cells lie one after the other, which is
// wgmma's K-major layout without swizzle; there a tap is nothing but another start address. The
// warpgroups run half a job apart, so one stores results while the other keeps the tensor cores
// busy.
//
// What makes it accurate: x = high + low in fp16, 22 bits; high·high + high·low + low·high are three
// products (ieee), high·high alone has TF32's 11 bits (tf32). fp16's range is met by a power of two
// for each source stage, from its largest element, and one for each row of the weight. The tensor
// core adds with 25 bits and cuts the rest off, so after at most kPromotedTaps taps its sums are
// added to float32 registers, where the stage's scale comes out again. Data that one scale does not
// fit (and NaN and Inf) mark the job; implicit_gemm_exact.cu computes it again.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <iterator>
#include <stdexcept>
#include <utility>

#include "cuda/check.h"
#include "cuda/implicit_gemm.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace convops::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kConsumerThreads = kConsumers * 4 * kWarp;
constexpr int kConverterThreads = kConverterWarps * kWarp;
constexpr int kThreads = kConsumerThreads + kWarp + kConverterThreads;
// Two accumulators and addresses for 256 threads, what is left for the other 256.
constexpr int kConsumerRegisters = 200, kProducerRegisters = 56;
static_assert(kThreads == 512 && 256 * (kConsumerRegisters + kProducerRegisters) <= 65536);

// 9 taps of three products are 27 truncated additions: an error of 5e-7 (docs/implicit_gemm.md).
constexpr int kPromotedTaps = 9;
// Halves of a source stage and of a row reach up to 2^14 ≤ largest < 2^15; sums are kept in the
// source's own scale, as if the row's largest weight were 1 to 2.
constexpr int kLargestExponent = 14;
constexpr float kSumUnit = 0x1p-14f;

template <int kProducts_, int kRowTile_, int kColumns_>
struct Traits {
  static constexpr int kProducts = kProducts_, kRowTile = kRowTile_, kColumns = kColumns_;
  // Planes of 8 channels: two of high parts, then two of low parts.
  static constexpr int kPlanes = kProducts == 3 ? 4 : 2;
  static constexpr int kWeightBytes = kPlanes * kRowTile * 16;
  static constexpr int kStagePitch = kColumns + kStagePadding;
  // Groups of instructions in flight: enough to hide the issue of the next.
  static constexpr int kInFlight = kProducts == 3 ? 1 : 2;
  // A pixel or channel smaller than this, after scaling, lost bits it should have: high and low
  // together resolve 2^-25, which is 19 bits of it (ieee); high alone 11 bits (tf32).
  static constexpr float kSmallest = kProducts == 3 ? 0x1p-6f : 0x1p-14f;
  static_assert(kStagePitch % 32 == 8 || kStagePitch % 32 == 24, "staging without bank conflicts");
};

// A channel of the source in one of its phases, from the place of the cell in channel and phase 0.
struct SumPlace {
  int64_t offset;
  int h, w;  // far outside where there is no such channel
};

// Barriers and notes at the start of shared memory.
struct Header {
  uint64_t weights_full[kMaxWeightStages], weights_empty[kMaxWeightStages];
  uint64_t source_full[kMaxSourceStages], source_empty[kMaxSourceStages];
  float source_unit[kMaxSourceStages];  // what 1 in the stage stands for
  uint64_t raw_full[kMaxRawStages];     // this and the next only with bulk copies
  int raw_skew[kMaxRawStages];
  int raw_job[kMaxRawStages];           // whose cells a stage holds; kNoJob: there is no more
  uint32_t channel_max[kMaxDepth * kSumBlock];  // bits of |x|, of the stage being converted
  SumPlace sum_places[kMaxDepth * kSumBlock];   // of the stage being copied, with mixed phases
};
static_assert(sizeof(Header) <= GemmSharedMemory::kHeader);

constexpr int kNoJob = -1;

// A place in a ring of stages and the parity of its barriers' phase.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void next(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Walks over the source stages this block needs: for its jobs, their classes that have taps, the
// class's blocks of channels.
struct Cursor {
  int index;  // of the job
  int row_class, sum_class = 0, block = 0;

  __device__ Cursor(const GemmProblem& g, const GemmTile& t) : index(blockIdx.x) {
    row_class = gemm_job(g, t, index).row_class;
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
    while (!done(t)) {
      for (; sum_class < g.sum_classes; ++sum_class)
        if (g.tap_count(row_class, sum_class) > 0) return;
      sum_class = 0;
      index += gridDim.x;
      row_class = gemm_job(g, t, index).row_class;
    }
  }
};

// ---- converters -------------------------------------------------------------------------------

// Read anew wherever it is used: what the compiler derives from it ahead of the loop would be more
// than the converters' registers hold.
__device__ __forceinline__ int converter_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread - kConsumerThreads - kWarp;
}

// Where the tile of a job lies in the source.
struct SourceTile {
  int job;  // whose tile it is
  int channel, image, cell_row, column;

  __device__ SourceTile(const GemmProblem& g, const GemmTile& t, int index) : job(index) {
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
  const int32_t place[4] = {tile.column - skew, tile.cell_row,
                            tile.channel + block * kSumBlock, tile.image};
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
      header.sum_places[thread] = {sum.channel * channel_stride +
                                       sum.phase_h * g.source.stride[2] +
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
__device__ __forceinline__ void find_channel_max(Header& header, const GemmTile& t,
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
    if (lane == 0) header.channel_max[k] = largest;
  }
}

struct Scale {
  float factor;  // what elements are multiplied with
  float unit;    // what 1 stands for then
  bool fits;     // all channels
};

template <typename T>
__device__ __forceinline__ Scale choose_scale(const Header& header, const GemmTile& t) {
  const int lane = threadIdx.x % kWarp, channels = t.depth * kSumBlock;
  const uint32_t a = lane < channels ? header.channel_max[lane] : 0;
  const uint32_t b = lane + kWarp < channels ? header.channel_max[lane + kWarp] : 0;
  const uint32_t largest = __reduce_max_sync(~0u, max(a, b));
  // Of the channels that are not all zeros: zeros are exact.
  const uint32_t smallest = __reduce_min_sync(~0u, min(a - 1, b - 1));
  if (largest == 0) return {1, 1, true};
  constexpr int kBias = 127;
  const int exponent = int(largest >> 23) - kBias;
  // Sums are kept in units of the source times at most 2: leave them room at both ends.
  if (exponent > 109 || exponent < -99) return {0, 0, false};
  const float factor = __uint_as_float(unsigned(kBias + kLargestExponent - exponent) << 23);
  const float unit = __uint_as_float(unsigned(kBias - kLargestExponent + exponent) << 23);
  // One product keeps 11 bits of channels down to 2^-28 of the largest, few tell them from zero.
  const bool fits = T::kProducts == 1 || smallest + 1 >= __float_as_uint(unit * T::kSmallest) ||
                    smallest == ~0u;
  return {factor, unit, fits};
}

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __half2 halves = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&halves);
}

// Writes the cells' high and low parts; whether every cell's channels fit the scale.
template <typename T>
__device__ __forceinline__ bool convert_source(const GemmTile& t, const float* raw, int skew,
                                               uint4* stage, const Scale& scale, int thread) {
  bool fits = true;
  for (int i = thread; i < t.depth * t.source_cells; i += kConverterThreads) {
    int cell = i, block = 0;
    for (; cell >= t.source_cells; cell -= t.source_cells) ++block;
    const int row = t.by_pitch.quotient(cell);
    const float* const values =
        raw + block * kSumBlock * t.raw_cells + row * (t.raw_pitch - t.pitch) + cell + skew;
    uint4* const place = stage + block * T::kPlanes * t.plane + cell;
    float largest = 0;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = values[(8 * part + 2 * j) * t.raw_cells] * scale.factor;
        const float b = values[(8 * part + 2 * j + 1) * t.raw_cells] * scale.factor;
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
    fits &= largest >= T::kSmallest || largest == 0;
  }
  return fits;
}

// A job with a channel whose weights fp16 cannot hold is bad whatever its source.
template <typename T>
__device__ __forceinline__ void mark_bad_rows(const GemmProblem& g, const GemmTile& t,
                                              const GemmOperands& operands, int index, int thread) {
  const GemmJob job = gemm_job(g, t, index);
  const int row = job.row_block * T::kRowTile + thread;
  if (thread < T::kRowTile && row < g.class_rows &&
      operands.bad_rows[job.group * g.rows + gemm_row(g, job.row_class, row).channel])
    operands.bad_jobs[index] = 1;
}

template <typename T>
__device__ __forceinline__ void run_converters(const GemmProblem& g, const GemmTile& t,
                                               const GemmOperands& operands, uint8_t* shared,
                                               const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  uint8_t* const raw = shared + memory.raw;

  Cursor at(g, t);
  SourceTile tile(g, t, at.index);
  mark_bad_rows<T>(g, t, operands, at.index, converter_thread());
  const auto load_next = [&](int slot) {
    const bool leads = converter_thread() == 0;
    if (leads) header.raw_job[slot] = at.done(t) ? kNoJob : at.index;
    if (!at.done(t)) {
      if (at.index != tile.job) {
        tile = SourceTile(g, t, at.index);
        mark_bad_rows<T>(g, t, operands, at.index, converter_thread());
      }
      uint8_t* const place = raw + slot * t.raw_bytes();
      if (!t.bulk)
        load_source(g, t, tile, at.sum_class, at.block, operands.source, header,
                    uint32_t(__cvta_generic_to_shared(place)), converter_thread());
      else if (leads)
        load_source_bulk(t, operands, tile, at.block, place, header.raw_skew[slot],
                         &header.raw_full[slot]);
      at.next(g, t);
    }
    ptx::copy_commit();  // an empty group where nothing is left: the count below stays right
  };
  for (int slot = 0; slot < t.raw_stages - 1; ++slot) load_next(slot);
  ptx::sync_threads<1, kConverterThreads>();

  Stage raw_stage, stage;
  for (int job; (job = header.raw_job[raw_stage.index]) != kNoJob;) {
    if (t.bulk)
      ptx::barrier_wait(&header.raw_full[raw_stage.index], raw_stage.parity);
    else if (t.raw_stages == 2)
      ptx::copy_wait<0>();
    else if (t.raw_stages == 3)
      ptx::copy_wait<1>();
    else
      ptx::copy_wait<2>();
    ptx::sync_threads<1, kConverterThreads>();  // all have their cells, and are done with the last
    load_next(raw_stage.index == 0 ? t.raw_stages - 1 : raw_stage.index - 1);
    const float* const cells =
        reinterpret_cast<const float*>(raw + raw_stage.index * t.raw_bytes());
    find_channel_max(header, t, cells, converter_thread());
    ptx::sync_threads<1, kConverterThreads>();
    const Scale scale = choose_scale<T>(header, t);

    ptx::barrier_wait(&header.source_empty[stage.index], stage.parity ^ 1);
    uint4* const converted = reinterpret_cast<uint4*>(shared + memory.sources) +
                             stage.index * t.depth * t.plane * T::kPlanes;
    const int skew = t.bulk ? header.raw_skew[raw_stage.index] : 0;
    const bool fits = convert_source<T>(t, cells, skew, converted, scale, converter_thread()) && scale.fits;
    if (!fits) operands.bad_jobs[job] = 1;
    if (converter_thread() == 0) header.source_unit[stage.index] = scale.unit;
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.source_full[stage.index]);
    stage.next(t.source_stages);
    raw_stage.next(t.raw_stages);
  }
}

// ---- streamer ---------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void run_streamer(const GemmProblem& g, const GemmTile& t,
                                             const GemmOperands& operands, uint8_t* shared,
                                             const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  Stage stage;
  for (int index = blockIdx.x; index < t.jobs; index += gridDim.x) {
    const GemmJob job = gemm_job(g, t, index);
    const uint8_t* packed = operands.packed_weights + gemm_weight_step(g, t, job) * T::kWeightBytes;
    const int steps = g.steps(job.row_class);
    for (int step = 0; step < steps; ++step, packed += T::kWeightBytes) {
      ptx::barrier_wait(&header.weights_empty[stage.index], stage.parity ^ 1);
      ptx::copy_bulk(shared + memory.weights + stage.index * T::kWeightBytes, packed,
                     T::kWeightBytes, &header.weights_full[stage.index]);
      stage.next(t.weight_stages);
    }
  }
}

// ---- consumers --------------------------------------------------------------------------------

// The instructions of a tap: a = weights, b = source; the small products first.
template <typename T>
__device__ __forceinline__ void multiply_tap(float (&sums)[T::kColumns / 2], ptx::Matrix a,
                                             ptx::Matrix b, int plane, int accumulate) {
  if constexpr (T::kProducts == 3) {
    const ptx::Matrix a_low = a + 2 * T::kRowTile, b_low = b + 2 * plane;  // 16 bytes a row or cell
    ptx::wgmma(sums, a, b_low, accumulate);
    ptx::wgmma(sums, a_low, b, 1);
    ptx::wgmma(sums, a, b, 1);
  } else {
    ptx::wgmma(sums, a, b, accumulate);
  }
}

// A row of the warpgroup's tile as its results need it.
struct RowPlace {
  float scale, bias;
  int64_t offset;  // of the row's first result in row 0 of its image's cells
  int phase_h;     // past every height where there is no such row
  int count;       // results in a row of the tile that lie in the tensor
};

static_assert(sizeof(RowPlace) == GemmSharedMemory::kRowPlaceBytes);

template <typename T>
__device__ __forceinline__ RowPlace find_row(const GemmProblem& g, const GemmTile& t,
                                             const GemmOperands& operands, const GemmJob& job) {
  const int warp = threadIdx.x / kWarp;
  const int row = job.row_block * T::kRowTile + (T::kRowTile == 128 ? warp * 16 : warp % 4 * 16) +
                  threadIdx.x % 16;
  if (row >= g.class_rows) return {0, 0, 0, 1 << 30, 0};
  const GemmRow where = gemm_row(g, job.row_class, row);
  const int channel = job.group * g.rows + where.channel;
  const int left = int(g.result.size[3]) - job.column * g.w.block - where.phase_w;
  return {operands.row_scales[channel],
          operands.bias ? operands.bias[channel * g.bias_stride] : 0.f,
          channel * g.result.stride[1] + where.phase_h * g.result.stride[2] +
              (int64_t(job.column) * g.w.block + where.phase_w) * g.result.stride[3],
          where.phase_h,
          t.woven ? min(t.width * g.w.block, left)
                  : min(t.width, (left + g.w.block - 1) / g.w.block)};
}

// The rows of cells a warpgroup computes, from the first one's place in its image.
struct ResultRows {
  int image, row;
  float* first;      // image's row in channel 0, column 0
  int64_t row_step;  // from cell to cell
  int64_t image_step;  // besides, where the next image begins


  __device__ ResultRows(const GemmProblem& g, const GemmTile& t, int tall_row, float* result) {
    image = t.by_image_rows.quotient(tall_row);
    row = t.by_image_rows.remainder(tall_row);
    row_step = g.h.block * g.result.stride[2];
    first = result + image * g.result.stride[0] + row * row_step;
    image_step = g.result.stride[0] - t.image_rows * row_step;
  }
  // Row r of the tile in the row of `place`; nullptr where it is not in the tensor.
  __device__ float* find(const GemmProblem& g, const GemmTile& t, const RowPlace& place,
                         int r) const {
    float* to = first + place.offset + r * row_step;
    int in_image = row + r, its_image = image;
    for (; in_image >= t.image_rows; in_image -= t.image_rows) {
      ++its_image;
      to += image_step;
    }
    return its_image < g.images && in_image < g.cells_h &&
                   in_image * g.h.block + place.phase_h < int(g.result.size[2])
               ? to
               : nullptr;
  }
};

// Floats between an address and the multiple of 16 bytes before it.
__device__ __forceinline__ int misalignment(const float* p) {
  return int(reinterpret_cast<uintptr_t>(p) / 4 % 4);
}

// Eight of the warp's rows to slots of shared memory: one for each row of the tile in each line, a
// line being the rows whose results are woven together. A slot's elements lie as far from a multiple
// of 16 bytes as they will in the result.
template <typename T, bool kPaired>
__device__ __forceinline__ void stage_results(const GemmTile& t, const ResultRows& rows,
                                              const RowPlace& place, int row, int half,
                                              float* staged,
                                              const float (&totals)[T::kColumns / 2]) {
  constexpr int kGroups = T::kColumns / 8, kBatch = 4;  // groups of eight columns
  const int woven_log = kPaired ? 0 : t.woven >> 1;     // of 1, 2 and 4
  const int phase = row & (t.woven - 1);
  float* const line = staged + (row >> woven_log) * t.line + phase;
  const int first = misalignment(rows.first + place.offset - phase);
#pragma unroll 1
  for (int r = 0; r < t.height; ++r) {
    const int begin = r * t.pitch;
    int skew = first + r * int(rows.row_step & 3);
    if (t.straddles) skew += t.by_image_rows.quotient(rows.row + r) * int(rows.image_step & 3);
    const int column = int(threadIdx.x % 4) * 2 - begin;
    float* const slot = line + r * t.slot + (skew & 3) + (column << woven_log);
#pragma unroll
    for (int batch = 0; batch < kGroups; batch += kBatch) {
      if (8 * (batch + kBatch) <= begin || 8 * batch >= begin + t.width) continue;
#pragma unroll
      for (int i = batch; i < batch + kBatch && i < kGroups; ++i) {
        const float a = totals[4 * i + 2 * half], b = totals[4 * i + 2 * half + 1];
        if constexpr (kPaired) {
          if (unsigned(column + 8 * i) < unsigned(t.width))
            *reinterpret_cast<float2*>(slot + 8 * i) = make_float2(a, b);
        } else {
          if (unsigned(column + 8 * i) < unsigned(t.width)) slot[8 * i << woven_log] = a;
          if (unsigned(column + 8 * i + 1) < unsigned(t.width)) slot[8 * i + 1 << woven_log] = b;
        }
      }
    }
  }
}

// Writes slots to the result: their whole vectors of 16 bytes by all lanes, one slot after another,
// what is left at the ends by one lane each.
__device__ __forceinline__ void store_slots(const GemmProblem& g, const GemmTile& t,
                                            const ResultRows& rows, const RowPlace* places,
                                            int lines, const float* staged) {
  const int lane = threadIdx.x % kWarp, slots = lines * t.height;
  for (int first = 0; first < slots; first += kWarp) {
    float* to = nullptr;
    int from = 0, vectors = 0;
    if (first + lane < slots) {
      const int line = t.by_height.quotient(first + lane), r = first + lane - line * t.height;
      const RowPlace& place = places[line * t.woven];
      to = rows.find(g, t, place, r);
      if (to) {
        const int skew = misalignment(to), head = min((4 - skew) & 3, place.count);
        from = line * t.line + r * t.slot + skew;
        vectors = (place.count - head) / 4;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (i < head) to[i] = staged[from + i];
          const int j = head + 4 * vectors + i;
          if (j < place.count) to[j] = staged[from + j];
        }
        to += head;
        from += head;
      }
    }
#pragma unroll 2
    for (int i = 0; i < min(slots - first, kWarp); ++i) {
      const int count = __shfl_sync(~0u, vectors, i);
      const auto* source = reinterpret_cast<const float4*>(staged + __shfl_sync(~0u, from, i));
      auto* destination = reinterpret_cast<float4*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(to), i));
      float4 a, b;
      if (lane < count) a = source[lane];
      if (lane + kWarp < count) b = source[lane + kWarp];
      if (lane < count) destination[lane] = a;
      if (lane + kWarp < count) destination[lane + kWarp] = b;
      for (int j = lane + 2 * kWarp; j < count; j += kWarp) destination[j] = source[j];
    }
  }
}

// Writes eight rows element by element, for results that are no neighbours in memory.
template <typename T>
__device__ __forceinline__ void store_apart(const GemmProblem& g, const GemmTile& t,
                                            const ResultRows& rows, const RowPlace* places,
                                            const float* staged) {
  const int64_t step = g.result.stride[3] * g.w.block;
#pragma unroll 1
  for (int row = 0; row < 8; ++row)
#pragma unroll 1
    for (int r = 0; r < t.height; ++r) {
      float* const to = rows.find(g, t, places[row], r);
      if (!to) continue;
      const float* const from = staged + row * T::kStagePitch + r * t.pitch;
#pragma unroll 1
      for (int i = threadIdx.x % kWarp; i < places[row].count; i += kWarp) to[i * step] = from[i];
    }
}

// The results of a warp's 16 rows, through its part of shared memory.
template <typename T>
__device__ __forceinline__ void store_results(const GemmProblem& g, const GemmTile& t,
                                              const GemmJob& job, const RowPlace* places,
                                              float* result, float* staged,
                                              float (&totals)[T::kColumns / 2]) {
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp / 4;
  const ResultRows rows(g, t, job.row + (T::kRowTile == 128 ? 0 : group * t.height), result);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPlace& place = places[8 * half + lane / 4];
#pragma unroll
    for (int i = 0; i < T::kColumns / 4; ++i) {
      float& total = totals[i / 2 * 4 + 2 * half + i % 2];
      total = fmaf(total, place.scale, place.bias);
    }
    if (!t.woven) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < T::kColumns / 8; ++i)
        *reinterpret_cast<float2*>(&staged[lane / 4 * T::kStagePitch + 8 * i + lane % 4 * 2]) =
            make_float2(totals[4 * i + 2 * half], totals[4 * i + 2 * half + 1]);
      __syncwarp();
      store_apart<T>(g, t, rows, places + 8 * half, staged);
      continue;
    }
    __syncwarp();
    if (t.paired)
      stage_results<T, true>(t, rows, place, lane / 4, half, staged, totals);
    else
      stage_results<T, false>(t, rows, place, lane / 4, half, staged, totals);
    __syncwarp();
    store_slots(g, t, rows, places + 8 * half, 8 / t.woven, staged);
  }
}

template <typename T>
__device__ __forceinline__ void run_consumers(const GemmProblem& g, const GemmTile& t,
                                              const GemmOperands& operands, uint8_t* shared,
                                              const GemmSharedMemory& memory) {
  Header& header = *reinterpret_cast<Header*>(shared);
  const int warp = threadIdx.x / kWarp, group = warp / 4;
  const bool leads = threadIdx.x % kWarp == 0;
  float* const staged = reinterpret_cast<float*>(
      shared + memory.staged + warp * t.staged_floats * 4);
  RowPlace* const places =
      reinterpret_cast<RowPlace*>(shared + GemmSharedMemory::kRowPlaces) + warp * 16;

  // Warpgroups share a job: each has 64 of the rows, or half of the cells.
  const ptx::Matrix a0 = ptx::matrix(
      uint32_t(__cvta_generic_to_shared(shared + memory.weights)) +
          (T::kRowTile == 128 ? group * 64 * 16 : 0),
      T::kRowTile * 16);
  const ptx::Matrix b0 = ptx::matrix(
      uint32_t(__cvta_generic_to_shared(shared + memory.sources)) +
          (T::kRowTile == 128 ? 0 : group * t.height * t.pitch * 16),
      t.plane * 16);

  Stage source, weights, released;
  const auto release_weights = [&] {
    if (leads) ptx::barrier_arrive(&header.weights_empty[released.index]);
    released.next(t.weight_stages);
  };

  float totals[T::kColumns / 2];
  for (int index = blockIdx.x; index < t.jobs; index += gridDim.x) {
    const GemmJob job = gemm_job(g, t, index);
    __syncwarp();
    if (threadIdx.x % kWarp < 16)
      places[threadIdx.x % kWarp] = find_row<T>(g, t, operands, job);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; ++i) totals[i] = 0;

    for (int sum_class = 0; sum_class < g.sum_classes; ++sum_class) {
      const int begin = g.tap_begin[job.row_class][sum_class];
      const int end = g.tap_begin[job.row_class][sum_class + 1];
      if (begin == end) continue;
      for (int block = 0; block < g.sum_blocks; block += t.depth) {
        ptx::barrier_wait(&header.source_full[source.index], source.parity);
        const float unit = header.source_unit[source.index] * kSumUnit;
        const int steps = min(t.depth, g.sum_blocks - block) * (end - begin);
        ptx::Matrix b = b0 + source.index * t.depth * t.plane * T::kPlanes;
        for (int step = 0, tap = begin; step < steps;) {
          float sums[T::kColumns / 2];  // the first instruction does not add to it
          const int promoted = T::kProducts == 3 ? min(steps - step, kPromotedTaps) : steps - step;
#pragma unroll 1
          for (int i = 0; i < promoted; ++i) {
            const int offset = g.taps[tap].offset;
            ptx::barrier_wait(&header.weights_full[weights.index], weights.parity);
            ptx::wgmma_fence();
            multiply_tap<T>(sums, a0 + weights.index * (T::kWeightBytes / 16), b + offset, t.plane,
                            i > 0);
            ptx::wgmma_commit();
            weights.next(t.weight_stages);
            if (++tap == end) {
              tap = begin;
              b = b + t.plane * T::kPlanes;
            }
            ptx::wgmma_wait<T::kInFlight>();
            if (i >= T::kInFlight) release_weights();
          }
          ptx::wgmma_wait<0>();
          for (int i = min(promoted, T::kInFlight); i > 0; --i) release_weights();
          step += promoted;
#pragma unroll
          for (int i = 0; i < T::kColumns / 2; ++i) totals[i] = fmaf(sums[i], unit, totals[i]);
        }
        if (leads) ptx::barrier_arrive(&header.source_empty[source.index]);
        source.next(t.source_stages);
      }
    }
    store_results<T>(g, t, job, places, operands.result, staged, totals);
  }
}

// ---- kernel -----------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    implicit_gemm_kernel(const __grid_constant__ GemmProblem g, const __grid_constant__ GemmTile t,
                         const __grid_constant__ GemmOperands operands) {
  extern __shared__ __align__(128) uint8_t shared[];
  Header& header = *reinterpret_cast<Header*>(shared);
  const GemmSharedMemory memory(t, T::kProducts);
  if (threadIdx.x == 0) {
    for (int i = 0; i < t.weight_stages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.weights_full[i], 1);
      ::cuda::ptx::mbarrier_init(&header.weights_empty[i], kConsumers * 4);
    }
    for (int i = 0; i < t.source_stages; ++i) {
      ::cuda::ptx::mbarrier_init(&header.source_full[i], kConverterThreads);
      ::cuda::ptx::mbarrier_init(&header.source_empty[i], kConsumers * 4);
    }
    for (int i = 0; i < t.raw_stages; ++i) ::cuda::ptx::mbarrier_init(&header.raw_full[i], 1);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp;
  if (warp < kConsumers * 4) {
    ptx::raise_registers<kConsumerRegisters>();
    run_consumers<T>(g, t, operands, shared, memory);
  } else {
    ptx::lower_registers<kProducerRegisters>();
    if (warp > kConsumers * 4)
      run_converters<T>(g, t, operands, shared, memory);
    else if (threadIdx.x % kWarp == 0)
      run_streamer<T>(g, t, operands, shared, memory);
  }
}

template <typename T>
void launch(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands, int processors,
            cudaStream_t stream) {
  const int bytes = GemmSharedMemory(t, T::kProducts).bytes;
  const auto kernel = implicit_gemm_kernel<T>;
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedMemory));
  kernel<<<min(t.jobs, processors), kThreads, bytes, stream>>>(g, t, operands);
  CONVOPS_LAUNCH_CHECK("implicit_gemm");
}

}  // namespace

void multiply_sm90(const GemmProblem& g, const GemmTile& t, const GemmOperands& operands,
                   int processors, void* stream) {
  bool launched = false;
  // One instantiation for every tile of kGemmColumns and both row tiles.
  const auto try_tile = [&]<int kRowTile, int kColumns>() {
    if (t.row_tile != kRowTile || t.columns != kColumns) return;
    launched = true;
    if (g.products == 3)
      launch<Traits<3, kRowTile, kColumns>>(g, t, operands, processors, cudaStream_t(stream));
    else
      launch<Traits<1, kRowTile, kColumns>>(g, t, operands, processors, cudaStream_t(stream));
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (try_tile.template operator()<64, kGemmColumns[i]>(), ...);
    (try_tile.template operator()<128, kGemmColumns[i]>(), ...);
  }(std::make_integer_sequence<int, int(std::size(kGemmColumns))>());
  if (!launched) throw std::logic_error("implicit_gemm has no kernel for its tile");
}

}  // namespace convops::cuda

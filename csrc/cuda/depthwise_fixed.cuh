// Depthwise convolution with the taps of the kernel known at compile time.
//
// A thread owns kRows × kColumns results. It walks down the rows of its window once, reads each by
// vectors of shared memory and adds its products to all the sums they belong to; the weights stay
// in registers.
#pragma once

#include "cuda/definition.cuh"
#include "cuda/depthwise_tile.cuh"

namespace convops::cuda::depthwise {

// kTransposed: backward-input of a stride. Its results are taken in cells of kStride × kStride:
// with a = h + padding, cell a / kStride, result a of a cell meets the taps kh = a mod kStride
// only. kShift_: the window begins so many columns before the first that is needed, where copies of
// four elements are aligned; -1 where it begins with it. kPhase_: what the padding leaves when it
// is divided by the stride; cells begin with the first result then, whose rows are stored as
// vectors. With 0 for any padding they begin with a = 0, up to kStride - 1 places before it.
template <int kH_, int kW_, int kStride_, bool kTransposed_ = false, int kShift_ = -1,
          int kPhase_ = 0>
struct Shape {
  static constexpr int kH = kH_, kW = kW_, kStride = kStride_;
  static constexpr bool kTransposed = kTransposed_;
  // Whether it is backward-input's, too: at stride 1 that is forward with the weight turned.
  static constexpr bool kBackward = kTransposed || kStride == 1;
  static constexpr bool kAligned = kShift_ >= 0;
  static constexpr int kShift = kAligned ? kShift_ : 0;
  static constexpr int kPhase = kPhase_;
  static constexpr int kTaps = kH * kW;
  static constexpr int kTapsInShared = (kTaps + 3) / 4 * 4;
  // Sides of images are multiples of 7 as a rule; cells need an even number. At a stride the
  // windows are large, the planes of results small: more threads hide more of the loads.
  static constexpr int kRows = kTransposed ? 8 : kStride > 1 ? 4 : 7;
  static constexpr int kColumns = 4;  // a vector of 16 bytes of float32
  // Registers for the weights, the sums and a row of the window, and no more: blocks hide each
  // other's loads.
  static constexpr int kMinBlocks = kTaps >= 49 ? 5 : kTaps >= 20 ? 6 : 8;
  // From thread to thread, in `from`.
  static constexpr int kRowStep = kTransposed ? kRows / kStride : kRows * kStride;
  static constexpr int kColumnStep = kTransposed ? kColumns / kStride : kColumns * kStride;
  static constexpr int kHaloRows = kTransposed ? (kH - 1) / kStride : kH - kStride;
  static constexpr int kHaloColumns = kTransposed ? (kW - 1) / kStride : kW - kStride;
  static constexpr int kWindowRows = kRowStep + kHaloRows;
  static constexpr int kWindowColumns = kColumnStep + kHaloColumns;
  // Elements that can be read at once, whatever the thread.
  static constexpr int kChunk = kColumnStep < 4 ? kColumnStep : 4;

  // Of kTransposed: elements of a window before the one that a cell's first tap meets.
  static __host__ __device__ constexpr int before(int k) { return (k - 1 - kPhase) / kStride; }
  // The tap, of k, with which element `from` of a window enters result `to`; none if not below k.
  static __host__ __device__ constexpr unsigned tap(int from, int to, int k) {
    if (!kTransposed) return unsigned(from - to * kStride);
    return unsigned(to + kPhase + kStride * (before(k) - from));
  }
};

// Words of shared memory that a thread reads of a row; one more holds the end of a late row.
template <typename Shape, typename T>
constexpr int kWindowWords = [] {
  constexpr int kNeeded =
      sizeof(T) == 4 || Shape::kAligned
          ? (Shape::kShift + Shape::kWindowColumns + kPerWord<T> - 1) / kPerWord<T>
          : Shape::kWindowColumns / 2 + 1;
  constexpr int kChunkWords = Shape::kChunk / kPerWord<T>;
  return (kNeeded + kChunkWords - 1) / kChunkWords * kChunkWords;
}();

template <typename Shape, typename T>
__device__ __forceinline__ void read_window(const uint32_t* row, int shift,
                                            float (&values)[Shape::kWindowColumns]) {
  constexpr int kWords = kWindowWords<Shape, T>, kChunkWords = Shape::kChunk / kPerWord<T>;
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; i += kChunkWords) {
    if constexpr (kChunkWords == 4) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(row + i);
      words[i] = chunk.x, words[i + 1] = chunk.y, words[i + 2] = chunk.z, words[i + 3] = chunk.w;
    } else if constexpr (kChunkWords == 2) {
      const uint2 chunk = *reinterpret_cast<const uint2*>(row + i);
      words[i] = chunk.x, words[i + 1] = chunk.y;
    } else {
      words[i] = row[i];
    }
  }
#pragma unroll
  for (int i = 0; i < Shape::kWindowColumns; ++i) {
    const int element = i + Shape::kShift;
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[element]);
    } else {
      uint32_t pair = words[element / 2];
      if constexpr (!Shape::kAligned) pair = __funnelshift_r(pair, words[i / 2 + 1], 16 * shift);
      const uint16_t bits = element % 2 ? pair >> 16 : pair;
      values[i] = convert<float>(reinterpret_cast<const T&>(bits));
    }
  }
}

// sums += the window's products.
template <typename Shape, typename T>
__device__ __forceinline__ void add_products(const uint32_t* window, int pitch, const float* taps,
                                             int shift, int shift_step,
                                             float (&sums)[Shape::kRows][Shape::kColumns]) {
  float weight[Shape::kTapsInShared];
#pragma unroll
  for (int i = 0; i < Shape::kTapsInShared; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(taps + i);
    weight[i] = four.x, weight[i + 1] = four.y, weight[i + 2] = four.z, weight[i + 3] = four.w;
  }
#pragma unroll
  for (int h = 0; h < Shape::kWindowRows; ++h) {
    float values[Shape::kWindowColumns];
    read_window<Shape, T>(window + h * pitch, shift ^ (h & shift_step), values);
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
      const unsigned kh = Shape::tap(h, row, Shape::kH);
      if (kh >= Shape::kH) continue;
#pragma unroll
      for (int w = 0; w < Shape::kWindowColumns; ++w)
#pragma unroll
        for (int column = 0; column < Shape::kColumns; ++column) {
          const unsigned kw = Shape::tap(w, column, Shape::kW);
          if (kw < Shape::kW) sums[row][column] += weight[kh * Shape::kW + kw] * values[w];
        }
    }
  }
}

// Where a stretch of results begins within a vector of memory.
template <typename T>
__device__ __forceinline__ int vector_offset(const T* place) {
  return reinterpret_cast<uintptr_t>(place) / sizeof(T) % kPerVector<T>;
}

// The rows and columns of the block's results within the plane: [begin, end).
struct Range {
  int begin, end;
  __device__ Range(int first, int count, int size)
      : begin(max(first, 0)), end(min(first + count, size)) {}
  __device__ int count() const { return end - begin; }
};

// Stretches lie one after the other in shared memory, each as far into its first vector as in
// memory; so vectors can be copied.
template <typename T>
__device__ __forceinline__ void store_stretches(const Parameters& p, const Place& place, Range rows,
                                                Range columns, const T* staged, T* to) {
  const Tile& tile = p.tile;
  const int count = place.count;
  const bool of_rows = tile.store == Store::kRow;
  const int stretches = tile.store == Store::kBlock ? 1 : of_rows ? count * rows.count() : count;
  const int length =
      of_rows ? columns.count()
              : (tile.store == Store::kBlock ? count : 1) * rows.count() * columns.count();
  const int vectors = (length + kPerVector<T> - 1) / kPerVector<T> + 1;
  const int threads = stretches == 1 ? blockDim.x : kWarp;  // of a stretch
  for (int i = threadIdx.x / threads; i < stretches; i += blockDim.x / threads) {
    const int plane = of_rows ? i / rows.count() : i, row = of_rows ? i % rows.count() : 0;
    T* const result =
        to + place.planes[plane].to + (rows.begin + row) * p.to.stride[2] + columns.begin;
    const T* const from = staged + plane * tile.plane_pitch + row * tile.row_pitch;
    const int offset = vector_offset(result);
    for (int vector = threadIdx.x % threads; vector < vectors; vector += threads) {
      const int first = vector * kPerVector<T> - offset;
      if (first >= 0 && first + kPerVector<T> <= length) {
        *reinterpret_cast<uint4*>(result + first) =
            *reinterpret_cast<const uint4*>(from + vector * kPerVector<T>);
      } else {
#pragma unroll
        for (int j = 0; j < kPerVector<T>; ++j)
          if (first + j >= 0 && first + j < length)
            result[first + j] = from[vector * kPerVector<T> + j];
      }
    }
  }
}

// kCount neighbours, aligned to their size.
template <int kCount, typename T>
__device__ __forceinline__ void store_vector(T* place, const float* sums) {
  struct alignas(kCount * sizeof(T)) Vector {
    T values[kCount];
  } vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.values[i] = convert<T>(sums[i]);
  *reinterpret_cast<Vector*>(place) = vector;
}

// Stores a thread's four results of a row in which only pairs are aligned; for all lanes of a warp.
// Where vectors begin in the middle of the four, a lane stores its last two with the first two of
// the next lane: sectors written in two goes, by pairs, took kb82 from 0.53 to 0.68 ms.
struct Neighbours {
  bool stores, pair_only;  // whether the row has this thread's results; only two of them
  bool left, right;        // whether the lanes beside this one have the results beside its own
};
template <typename T>
__device__ __forceinline__ void store_pairs(T* result, const float (&sums)[4],
                                            const Neighbours& lanes) {
  const float late[4] = {sums[2], sums[3], __shfl_down_sync(~0u, sums[0], 1),
                         __shfl_down_sync(~0u, sums[1], 1)};
  if (!lanes.stores) return;
  if (reinterpret_cast<uintptr_t>(result) % (4 * sizeof(T)) == 0) {
    if (lanes.pair_only)
      store_vector<2>(result, sums);
    else
      store_vector<4>(result, sums);
    return;
  }
  if (!lanes.left) store_vector<2>(result, sums);
  if (lanes.right)
    store_vector<4>(result + 2, late);
  else if (!lanes.pair_only)
    store_vector<2>(result + 2, late);
}

// Four neighbours of a row into shared memory, where the row may begin anywhere. Lanes are four
// elements apart; each quarter of a warp begins with another of its four, so that float32 meets
// every bank once.
template <typename T>
__device__ __forceinline__ void stage_four(T* place, const float (&sums)[4], int column0,
                                           int width) {
  const int turn = threadIdx.x / 8 % 4;
  const bool odd = turn & 1, far = turn & 2;
  const float once[4] = {odd ? sums[1] : sums[0], odd ? sums[2] : sums[1], odd ? sums[3] : sums[2],
                         odd ? sums[0] : sums[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = (i + turn) % 4;
    if (unsigned(column0 + column) < unsigned(width))
      place[column] = convert<T>(far ? once[(i + 2) % 4] : once[i]);
  }
}

template <typename Shape, typename T>
__global__ void __launch_bounds__(kMaxThreads, Shape::kMinBlocks)
    fixed_kernel(const __grid_constant__ Parameters p, const T* __restrict__ from,
                 const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ to) {
  extern __shared__ __align__(16) uint32_t shared[];
  __shared__ Place place;
  const Tile& tile = p.tile;
  float* const taps = reinterpret_cast<float*>(shared);
  uint32_t* const windows = shared + tile.planes * Shape::kTapsInShared;
  const int column_thread = threadIdx.x % tile.lanes, rest = threadIdx.x / tile.lanes;
  const int strip = rest % tile.strips, plane = rest / tile.strips;
  find_place(p, blockIdx.x, place);
  __syncthreads();

  const bool works = plane < place.count;
  const int h0 = tile.window_h + place.tile_h * tile.step_h;
  const int w0 = tile.window_w + place.tile_w * tile.step_w;
  load_windows(p, place, from, h0, w0, windows);
  const bool mine = load_weights(p, place, weight, Shape::kH, Shape::kW, taps);
  const bool finite = await_windows(p, place, from, h0, w0, windows, mine);
  float sums[Shape::kRows][Shape::kColumns] = {};
  if (works) {
    const int row = strip * Shape::kRowStep;
    const int shift =
        word_shift(from + place.planes[plane].from + (h0 + row) * p.from.stride[2] + w0);
    add_products<Shape, T>(windows + (plane * tile.window_rows + row) * tile.pitch +
                               column_thread * Shape::kColumnStep / kPerWord<T>,
                           tile.pitch, taps + plane * Shape::kTapsInShared, shift,
                           sizeof(T) == 4 ? 0 : int(p.from.stride[2] & 1), sums);
  }

  const int height = int(p.to.size[2]), width = int(p.to.size[3]);
  const int row_first = tile.first_h + place.tile_h * tile.rows;
  const int column_first = tile.first_w + place.tile_w * tile.columns;
  const int row0 = row_first + strip * Shape::kRows;
  const int column0 = column_first + column_thread * Shape::kColumns;
  if (Shape::kBackward && !finite && p.is_backward()) {
    if (!works) return;
#pragma unroll 1
    for (int row = max(row0, 0); row < min(row0 + Shape::kRows, height); ++row)
#pragma unroll 1
      for (int column = max(column0, 0); column < min(column0 + Shape::kColumns, width); ++column)
        to[place.planes[plane].to + row * p.to.stride[2] + column] =
            convert<T>(backward_input_element(p.problem, from, weight, place.planes[plane].image,
                                              place.planes[plane].channel, row, column));
    return;
  }
  if (bias && works) {
    const float shift = convert<float>(bias[place.planes[plane].channel * p.problem.bias_stride]);
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row)
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) sums[row][column] += shift;
  }
  if (!is_staged(tile.store)) {
    T* result = to + (works ? place.planes[plane].to : 0) + row0 * p.to.stride[2] + column0;
    const int lane = threadIdx.x % kWarp;
    Neighbours lanes{.pair_only = column0 + 2 >= width,
                     .left = lane > 0 && column_thread > 0,
                     .right = lane + 1 < kWarp && column_thread + 1 < tile.lanes &&
                              column0 + Shape::kColumns < width};
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row, result += p.to.stride[2]) {
      lanes.stores = works && column0 < width && unsigned(row0 + row) < unsigned(height);
      if (tile.store == Store::kPairs)
        store_pairs(result, sums[row], lanes);
      else if (lanes.stores)
        store_vector<4>(result, sums[row]);
    }
    return;
  }

  const Range rows(row_first, tile.rows, height), columns(column_first, tile.columns, width);
  T* const staged = reinterpret_cast<T*>(windows);
  __syncthreads();
  if (works) {
    const T* const begin = to + place.planes[tile.store == Store::kBlock ? 0 : plane].to +
                           rows.begin * p.to.stride[2] + columns.begin;
    T* target = staged + plane * tile.plane_pitch + column0 - columns.begin +
                (row0 - rows.begin) * tile.row_pitch;
    int offset = vector_offset(begin);
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row, target += tile.row_pitch) {
      const int local = row0 + row - rows.begin;
      if (tile.store == Store::kRow) offset = vector_offset(begin + local * p.to.stride[2]);
      if (unsigned(local) < unsigned(rows.count()))
        stage_four(target + offset, sums[row], column0, width);
    }
  }
  __syncthreads();
  store_stretches(p, place, rows, columns, staged, to);
}

}  // namespace convops::cuda::depthwise

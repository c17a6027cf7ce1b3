// The block of depthwise_large (depthwise_large.cu tells what it computes): what it stages, what it
// stores, and the slow way for infinities. The arithmetic in between is a Core: FmaCore or MmaCore.
#pragma once

#include "cuda/types.cuh"

namespace convops::cuda::large {

constexpr int kMaxThreads = 256;
constexpr int kWarp = 32;
// Blocks a multiprocessor that registers allow without spills: on sm_90, and fewer elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int min_blocks(int sm90) { return sm90; }
#else
constexpr int min_blocks(int sm90) { return sm90 - 1; }
#endif

// All planes of a tensor. The turned weight is one with negative strides; strides count elements.
struct Planes {
  int64_t image, channel, row, column;
  int height, width;
};

//   result[r, q] = sum over i, j of source[r + i - pad_h, q + j - pad_w] · filter[i, j]
//
// of every channel. An item is one image or, where the images are summed, one tile of the filter of
// one image; a block takes `items_each` of them, `stage_items` at a time.
struct Correlation {
  Planes source, filter, result;
  int pad_h, pad_w;
  bool sum;               // over the images, of which the filter has planes too: backward-weight
  bool padding_is_zeros;  // that are multiplied: not in backward-input
  int64_t channels, items, items_each, chunks;
  int64_t bias_stride;

  int tile_rows, tile_columns;      // of the result, that a block computes
  int filter_rows, filter_columns;  // of the filter, in shared memory at once
  int filter_tiles_w, filter_tiles;
  int stage_items;
  int splits;  // of a filter's rows among groups of threads, whose sums are added
  // Elements of shared memory: a row of zeros, the source's items, the filter's items.
  int source_pitch, source_item, filter_pitch, filter_item, filter_begin, elements;

  // Items that are summed have groups of their own, others share one; rows of results of a group:
  __host__ __device__ int groups() const { return sum ? stage_items * splits : splits; }
  __host__ __device__ int rows() const { return sum ? tile_rows : stage_items * tile_rows; }
};

// Exact quotients of 0 <= n < 2^22, as of elements of shared memory: (n + 1/2) / divisor is further
// from an integer than its rounding errors reach.
struct Divider {
  float factor;
  __device__ explicit Divider(int divisor) : factor(1.0f / float(divisor)) {}
  __device__ int operator()(int n) const { return int((float(n) + 0.5f) * factor); }
};

// Where a block is.
struct Place {
  int64_t channel, chunk;
  int row, column, rows, columns;  // its tile of the result, cut at the borders
};

// A stage: which items, and what of their planes meets the tile.
struct Stage {
  int64_t first;  // image
  int items;
  int filter_row, filter_column, filter_rows, filter_columns;
  int source_row, source_column;  // of the source, under row 0 and column 0 of tile and filter
  int row, row_end, column, column_end;  // those inside of the source

  __device__ Stage(const Correlation& p, const Place& place, int64_t item, int items_)
      : first(p.filter_tiles > 1 ? item / p.filter_tiles : item), items(items_) {
    const int tile = int(item - first * p.filter_tiles);
    const int tile_h = p.filter_tiles > 1 ? tile / p.filter_tiles_w : 0;
    filter_row = tile_h * p.filter_rows;
    filter_column = (tile - tile_h * p.filter_tiles_w) * p.filter_columns;
    filter_rows = min(p.filter_rows, p.filter.height - filter_row);
    filter_columns = min(p.filter_columns, p.filter.width - filter_column);
    source_row = place.row + filter_row - p.pad_h;
    source_column = place.column + filter_column - p.pad_w;
    row = max(0, source_row);
    row_end = max(row, min(p.source.height, source_row + place.rows + filter_rows - 1));
    column = max(0, source_column);
    column_end =
        max(column, min(p.source.width, source_column + place.columns + filter_columns - 1));
  }
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// The largest magnitude of what it has seen, as bits: those of infinities and NaN are the largest.
template <typename T>
struct Largest {
  unsigned bits = 0;
  __device__ void see(T value) {
    if constexpr (sizeof(T) == 4)
      bits = max(bits, __float_as_uint(value) & 0x7fffffffu);
    else
      bits = max(bits, unsigned(reinterpret_cast<const uint16_t&>(value)) & 0x7fffu);
  }
  __device__ bool is_finite() const {
    constexpr unsigned kInfinity = sizeof(T) == 4              ? 0x7f800000
                                   : std::is_same_v<T, __half> ? 0x7c00
                                                               : 0x7f80;
    return bits < kInfinity;
  }
};

// Whether planes of `rows` whole rows can be moved four elements at a time.
template <typename T>
__device__ __forceinline__ bool is_dense(const T* at, const Planes& planes, int rows, int columns) {
  return planes.column == 1 && planes.row == columns && rows * columns % 4 == 0 &&
         planes.image % 4 == 0 && uintptr_t(at) % sizeof(Four<T>) == 0;
}

// Calls store(item, row, column, value) for each element of a rectangle of `items` planes, spread
// over the block, kWide neighbours a load; whether all are finite.
template <int kWide, typename T, typename F>
__device__ __forceinline__ bool load(const T* __restrict__ from, const Planes& planes, int items,
                                     int rows, int columns, F&& store) {
  constexpr int kBatch = 2;  // loads of a thread in flight
  const int each = rows * columns, total = each * items, step = kWide * int(blockDim.x);
  const Divider by_each(each), by_columns(columns);
  Largest<T> largest;
#pragma unroll 1
  for (int begin = kWide * int(threadIdx.x); begin < total; begin += kBatch * step) {
    Four<T> fours[kBatch];  // of which kWide are used
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int e = begin + b * step, item = by_each(e), rest = e - item * each;
      const T* image = from + item * planes.image;
      const int row = by_columns(rest), column = rest - row * columns;
      if (e >= total) continue;
      if constexpr (kWide == 4)
        fours[b] = *reinterpret_cast<const Four<T>*>(image + rest);
      else
        fours[b].values[0] = image[row * planes.row + column * planes.column];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int e = begin + b * step, item = by_each(e), rest = e - item * each;
      int row = by_columns(rest), column = rest - row * columns;
      if (e >= total) continue;
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        largest.see(fours[b].values[k]);
        store(item, row, column, fours[b].values[k]);
        if (++column == columns) column = 0, ++row;
      }
    }
  }
  return largest.is_finite();
}

template <typename T, typename F>
__device__ __forceinline__ bool load(const T* __restrict__ from, const Planes& planes, int items,
                                     int rows, int columns, F&& store) {
  return is_dense(from, planes, rows, columns) ? load<4>(from, planes, items, rows, columns, store)
                                               : load<1>(from, planes, items, rows, columns, store);
}

// One result of items [first, end) by its definition. A core multiplies also what the definition
// does not, by zeros, and leaves out rows of padding; with an infinity or NaN that shows.
template <typename T>
__device__ __noinline__ float by_definition(const Correlation& p, const T* source, const T* filter,
                                            int64_t first, int64_t end, int r, int q) {
  float sum = 0;
#pragma unroll 1
  for (int64_t item = first; item < end; ++item) {
    const int64_t image = item / p.filter_tiles;
    const int tile = int(item % p.filter_tiles);
    const int row = tile / p.filter_tiles_w * p.filter_rows;
    const int column = tile % p.filter_tiles_w * p.filter_columns;
#pragma unroll 1
    for (int i = row; i < min(row + p.filter_rows, p.filter.height); ++i)
#pragma unroll 1
      for (int j = column; j < min(column + p.filter_columns, p.filter.width); ++j) {
        const int h = r + i - p.pad_h, w = q + j - p.pad_w;
        const bool inside =
            unsigned(h) < unsigned(p.source.height) && unsigned(w) < unsigned(p.source.width);
        if (!inside && !p.padding_is_zeros) continue;
        const float factor =
            inside ? convert<float>(
                         source[image * p.source.image + h * p.source.row + w * p.source.column])
                   : 0.0f;
        sum +=
            factor *
            convert<float>(filter[image * p.filter.image + i * p.filter.row + j * p.filter.column]);
      }
  }
  return sum;
}

// Grid: x chunk of items, y channel, z tile of the result. `partial`
// [chunk][channel][row][column] takes the results where chunks of a sum are left to be added.
template <typename Core>
__global__ void __launch_bounds__(kMaxThreads, Core::kBlocksPerProcessor)
    kernel(const __grid_constant__ Correlation p, const typename Core::T* __restrict__ source,
           const typename Core::T* __restrict__ filter, const typename Core::T* __restrict__ bias,
           typename Core::T* __restrict__ result, float* __restrict__ partial) {
  using T = typename Core::T;
  extern __shared__ uint4 memory[];
  const auto shared = reinterpret_cast<typename Core::Element*>(memory);

  Place place;
  const int tiles_w = (p.result.width + p.tile_columns - 1) / p.tile_columns;
  const int tile_h = Divider(tiles_w)(blockIdx.z);
  place.channel = blockIdx.y;
  place.chunk = blockIdx.x;
  place.row = tile_h * p.tile_rows;
  place.column = (int(blockIdx.z) - tile_h * tiles_w) * p.tile_columns;
  place.rows = min(p.tile_rows, p.result.height - place.row);
  place.columns = min(p.tile_columns, p.result.width - place.column);
  source += place.channel * p.source.channel;
  filter += place.channel * p.filter.channel;
  const int64_t first = place.chunk * p.items_each, end = min(first + p.items_each, p.items);

  Core core(p);
  bool finite = true;
#pragma unroll 1
  for (int64_t item = first; item < end; item += p.stage_items) {
    const Stage stage(p, place, item, int(min(int64_t(p.stage_items), end - item)));
    // What lies around the planes stays zero, unless tiles meet other borders.
    if (item == first || p.filter_tiles > 1) {
      __syncthreads();
      constexpr int kPerVector = sizeof(uint4) / sizeof(*shared);
#pragma unroll 1
      for (int e = threadIdx.x; e < p.elements / kPerVector; e += int(blockDim.x))
        memory[e] = uint4{};
    }
    __syncthreads();
    const T* from = source + stage.first * p.source.image + stage.row * p.source.row +
                    stage.column * p.source.column;
    const int shift = stage.column - stage.source_column;
    finite &= load(from, p.source, stage.items, stage.row_end - stage.row,
                   stage.column_end - stage.column, [&](int i, int row, int column, T value) {
                     shared[(row + 1) * p.source_pitch + i * p.source_item + column + shift] =
                         value;
                   });
    from = filter + stage.first * p.filter.image + stage.filter_row * p.filter.row +
           stage.filter_column * p.filter.column;
    finite &= load(from, p.filter, p.sum ? stage.items : 1, stage.filter_rows, stage.filter_columns,
                   [&](int i, int row, int column, T value) {
                     Core::store_filter(
                         shared + p.filter_begin + i * p.filter_item + row * p.filter_pitch, column,
                         value);
                   });
    finite = __syncthreads_and(finite);
    core.add(p, stage, place, shared);
  }

  // [group][item][row][column]; the groups' are added.
  __syncthreads();
  const auto sums = reinterpret_cast<float*>(memory);
  core.store_sums(p, sums);
  __syncthreads();
  const int plane = p.tile_rows * p.tile_columns;
  const int group = p.rows() * p.tile_columns, groups = p.groups();
  const float shift = bias ? convert<float>(bias[place.channel * p.bias_stride]) : 0.0f;
  const int items = p.sum ? 1 : int(end - first), each = place.rows * place.columns;
  result += (p.sum ? 0 : first * p.result.image) + place.channel * p.result.channel +
            place.row * p.result.row + place.column * p.result.column;
  if (finite && !p.sum && each == plane && is_dense(result, p.result, place.rows, place.columns)) {
    const Divider by_each(each);
#pragma unroll 1
    for (int e = 4 * int(threadIdx.x); e < items * each; e += 4 * int(blockDim.x)) {
      const int item = by_each(e);
      Four<T> four;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float value = sums[e + k];
#pragma unroll 1
        for (int i = 1; i < groups; ++i) value += sums[e + k + i * group];
        four.values[k] = convert<T>(bias ? value + shift : value);
      }
      *reinterpret_cast<Four<T>*>(result + item * p.result.image + (e - item * each)) = four;
    }
    return;
  }
  const Divider by_each(each), by_columns(place.columns);
#pragma unroll 1
  for (int e = threadIdx.x; e < items * each; e += int(blockDim.x)) {
    const int item = by_each(e), rest = e - item * each;
    const int row = by_columns(rest), column = rest - row * place.columns;
    const int r = place.row + row, q = place.column + column;
    float value = 0;
    if (finite)
#pragma unroll 1
      for (int i = 0; i < groups; ++i)
        value += sums[i * group + item * plane + row * p.tile_columns + column];
    else
      value = by_definition(p, source, filter, first + item, p.sum ? end : first + item + 1, r, q);
    if (bias) value += shift;
    if (partial)
      partial[((place.chunk * p.channels + place.channel) * p.result.height + r) * p.result.width +
              q] = value;
    else
      result[item * p.result.image + row * p.result.row + column * p.result.column] =
          convert<T>(value);
  }
}

}  // namespace convops::cuda::large

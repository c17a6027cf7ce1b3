// What the kernels of depthwise convolution share: a block's tile of the tensor that is read, in
// shared memory with its halo, zeros outside; and its weights.
//
// The tile keeps the tensor's own type in words of 4 bytes, so that cp.async fills it without
// passing registers whatever the alignment of float32 rows. A row of 16-bit elements that begins in
// the middle of a word is `shift` = 1 element late in its words; readers take it back.
#pragma once

#include "cuda/ptx/copy.cuh"
#include "cuda/types.cuh"
#include "problem.h"

namespace convops::cuda::depthwise {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 128;  // of a block
constexpr int kMaxPlanes = 32;    // of a block
// Without asking for more; several blocks a multiprocessor need less anyway.
constexpr int kMaxSharedBytes = 46 * 1024;
constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kPerWord = 4 / sizeof(T);
template <typename T>
constexpr int kPerVector = kVectorBytes / sizeof(T);

// How results reach memory: from a thread's registers by fours or pairs where rows are aligned to
// that; else through shared memory, which lays out stretches of memory (of all planes of the block,
// of the rows of a plane, or of a row) as the tensor does, to be stored by whole vectors.
enum class Store { kFours, kPairs, kBlock, kPlane, kRow };
CONVOPS_HOST_DEVICE constexpr bool is_staged(Store store) {
  return store != Store::kFours && store != Store::kPairs;
}

// A block's share: strips × threads a row × planes threads, and the window of `from` under them.
struct Tile {
  int planes, strips, lanes;  // threads along planes, rows and columns (fastest)
  int rows, columns;          // results of a plane
  int tiles_h, tiles_w;       // of a plane
  int phases_h, phases_w;     // of results that share their taps (backward-input, run-time taps)
  int first_h, first_w;       // the first result of tile 0; may be -1
  int window_h, window_w;     // the first element of its window in `from`
  int step_h, step_w;         // of windows, from tile to tile
  int window_rows, words, pitch;  // words read of a row, words between rows
  int taps;                       // of a plane in shared memory, a multiple of 4
  Store store;
  int plane_pitch, row_pitch;  // of results in shared memory, in elements
  int load_lanes;              // threads that load a row, a power of two
  int copy_words;              // 1, 2 or 4 at a time
  int threads, shared_bytes;
  int64_t count;  // of tiles
};

// What forward and backward-input tell the kernels: `from` is read, `to` written. A weight turned
// by 180 degrees is one with negative strides.
struct Parameters {
  ConvProblem problem;
  Tile tile;
  Tensor4 from, to;
  int64_t planes;  // of `to`
  int multiplier;  // output channels of an input channel
  int sums;        // planes of `from` that add up: the multiplier, for backward-input
  int64_t weight_first, weight_row, weight_column;

  __device__ bool is_backward() const { return problem.direction == Direction::kBackwardInput; }
};

// Offsets of a plane of the result, of the (first) plane it is made of, and of its weights.
struct Plane {
  int64_t from, to, weight;
  int64_t image, channel;
};

// A 64-bit division costs several times as much as one of 32 bits; nearly always that is enough.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return a <= UINT32_MAX && b <= UINT32_MAX ? uint32_t(a) / uint32_t(b) : a / b;
}

__device__ __forceinline__ Plane find_plane(const Parameters& p, int64_t index) {
  const int64_t channels = p.to.size[1], image = divide(index, channels);
  const int64_t channel = index - image * channels;
  const int64_t source = p.is_backward() ? channel * p.multiplier
                                         : int64_t(unsigned(channel) / unsigned(p.multiplier));
  const int64_t filter = p.is_backward() ? source : channel;
  return {image * p.from.stride[0] + source * p.from.stride[1],
          image * p.to.stride[0] + channel * p.to.stride[1],
          p.weight_first + filter * p.problem.weight.stride[0], image, channel};
}

// What the threads of a block look up of a tile.
struct Place {
  int tile_h, tile_w, phase_h, phase_w;
  int count;  // of planes
  Plane planes[kMaxPlanes];
};

// Makes the place of a tile, in shared memory; to be read after a barrier.
__device__ __forceinline__ void find_place(const Parameters& p, int64_t index, Place& place) {
  const Tile& tile = p.tile;
  if (threadIdx.x >= tile.planes || index >= tile.count) return;
  unsigned rest = index;
  const unsigned phase_w = rest % tile.phases_w;
  rest /= tile.phases_w;
  const unsigned phase_h = rest % tile.phases_h;
  rest /= tile.phases_h;
  const unsigned tile_w = rest % tile.tiles_w;
  rest /= tile.tiles_w;
  const unsigned tile_h = rest % tile.tiles_h;
  const int64_t first = int64_t(rest / tile.tiles_h) * tile.planes;
  if (first + threadIdx.x < p.planes)
    place.planes[threadIdx.x] = find_plane(p, first + threadIdx.x);
  if (threadIdx.x != 0) return;
  place.tile_h = tile_h, place.tile_w = tile_w;
  place.phase_h = phase_h, place.phase_w = phase_w;
  place.count = int(min(int64_t(tile.planes), p.planes - first));
}

// 1 where the row's first element is the second of its word.
template <typename T>
__device__ __forceinline__ int word_shift(const T* row) {
  return sizeof(T) == 4 ? 0 : (reinterpret_cast<uintptr_t>(row) >> 1) & 1;
}

// Starts the copies of the windows of all planes, kWords words at a time; the window's first
// element is (h0, w0). More than one word: none of them crosses the end of a row.
template <int kWords, typename T>
__device__ __forceinline__ void copy_windows(const Parameters& p, const Place& place, const T* from,
                                             int h0, int w0, uint32_t* windows) {
  constexpr int kElements = kWords * kPerWord<T>;
  const Tile& tile = p.tile;
  const int height = int(p.from.size[2]), width = int(p.from.size[3]);
  const int lane = threadIdx.x & (tile.load_lanes - 1), row_step = blockDim.x / tile.load_lanes;
  const int64_t line_step = row_step * p.from.stride[2];
  uint32_t target = uint32_t(__cvta_generic_to_shared(windows)) +
                    4 * (int(threadIdx.x / tile.load_lanes) * tile.pitch + lane * kWords);
  int plane = 0, row = threadIdx.x / tile.load_lanes;
  while (true) {
    for (; row >= tile.window_rows; ++plane) row -= tile.window_rows;
    if (plane >= place.count) return;
    const T* line = from + place.planes[plane].from + (h0 + row) * p.from.stride[2] + w0;
    for (; row < tile.window_rows; row += row_step, line += line_step) {
      const bool row_inside = unsigned(h0 + row) < unsigned(height);
      int element = lane * kElements - (kElements == 2 ? word_shift(line) : 0);
      uint32_t word_target = target;
#pragma unroll 4
      for (int word = lane * kWords; word < tile.words; word += tile.load_lanes * kWords) {
        bool inside = row_inside && unsigned(w0 + element) < unsigned(width);
        if constexpr (kElements == 2)
          inside |= row_inside && unsigned(w0 + element + 1) < unsigned(width);
        ptx::copy_bytes<4 * kWords>(word_target, line + element, inside);
        element += tile.load_lanes * kElements;
        word_target += 4 * kWords * tile.load_lanes;
      }
      target += 4 * row_step * tile.pitch;
    }
  }
}

// Words that a row begins or ends within brought a neighbour of the row along: makes it zero.
template <typename T>
__device__ __forceinline__ void clear_neighbours(const Parameters& p, const Place& place,
                                                 const T* from, int h0, int w0, uint32_t* windows) {
  const Tile& tile = p.tile;
  const int width = int(p.from.size[3]);
  for (int i = threadIdx.x; i < place.count * tile.window_rows; i += blockDim.x) {
    const int plane = i / tile.window_rows, row = i % tile.window_rows;
    const int shift =
        word_shift(from + place.planes[plane].from + (h0 + row) * p.from.stride[2] + w0);
    const int begin = shift - w0, end = begin + width;
    uint32_t* const words = windows + i * tile.pitch;
    if (begin > 0 && begin % 2 != 0 && begin / 2 < tile.words) words[begin / 2] &= 0xffff0000u;
    if (end > 0 && end % 2 != 0 && end / 2 < tile.words) words[end / 2] &= 0x0000ffffu;
  }
}

// Fills the windows of all planes; they are there after the barrier that follows.
template <typename T>
__device__ __forceinline__ void load_windows(const Parameters& p, const Place& place, const T* from,
                                             int h0, int w0, uint32_t* windows) {
  switch (p.tile.copy_words) {
    case 4:
      return copy_windows<4>(p, place, from, h0, w0, windows);
    case 2:
      return copy_windows<2>(p, place, from, h0, w0, windows);
    default:
      return copy_windows<1>(p, place, from, h0, w0, windows);
  }
}

// Waits for the windows. True if `flag` is of all threads.
template <typename T>
__device__ __forceinline__ bool await_windows(const Parameters& p, const Place& place,
                                              const T* from, int h0, int w0, uint32_t* windows,
                                              bool flag) {
  ptx::copy_commit();
  ptx::copy_wait<0>();
  if (kPerWord<T> == 2 && p.tile.copy_words == 1) {
    __syncthreads();
    clear_neighbours(p, place, from, h0, w0, windows);
  }
  return __syncthreads_and(flag);
}

// The weights of all planes as float32, in the order of the window's taps. False if this thread saw
// one that is not finite.
template <typename T>
__device__ __forceinline__ bool load_weights(const Parameters& p, const Place& place,
                                             const T* weight, int kernel_h, int kernel_w,
                                             float* taps) {
  constexpr int kAtOnce = 8;  // loads of a thread under way
  const int area = kernel_h * kernel_w, total = place.count * area;
  bool finite = true;
  for (int begin = threadIdx.x; begin < total; begin += kAtOnce * blockDim.x) {
    float values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * blockDim.x, plane = i / area, tap = i % area;
      if (i < total)
        values[j] =
            convert<float>(weight[place.planes[plane].weight + tap / kernel_w * p.weight_row +
                                  tap % kernel_w * p.weight_column]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * blockDim.x;
      if (i >= total) break;
      taps[i / area * p.tile.taps + i % area] = values[j];
      finite &= bool(isfinite(values[j]));
    }
  }
  return finite;
}

}  // namespace convops::cuda::depthwise

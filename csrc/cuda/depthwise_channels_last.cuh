// What the kernels of depthwise_channels_last stand on: the window of a convolution as constants,
// how a problem is cut into tiles, and the ring of rows in shared memory that blocks read from
// (that of a warp: depthwise_channels_last_warps.cuh).
//
// Positions are rows or columns of the result, counted so that tap k of position q reads source
// row (q · kDown + kSize - 1 - k) / kUp + first where kUp divides: the weight is turned, as in the
// mathematical convolution, and inserted zeros are never multiplied.
//
//                          kUp      kDown    source        result
//   forward                1        stride   input         output
//   backward-input         stride   1        grad_output   grad_input
//   backward-weight        1        stride   input         (grad_output is read at positions)
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>

#include "algorithm.h"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda::depthwise_channels_last {

constexpr int kWarp = 32;
// Coordinates are int: a side times the stride plus padding and a kernel must fit.
constexpr int64_t kMaxSide = int64_t{1} << 29;
// What a kernel may use without asking: 48 KiB a block.
constexpr int kSharedBytes = 48 * 1024;

template <int kH_, int kW_, int kUp_, int kDown_, int kColumns_ = 4>
struct Window {
  static constexpr int kH = kH_, kW = kW_, kUp = kUp_, kDown = kDown_;
  static constexpr int kTaps = kH * kW;
  static_assert(kUp == 1 || kDown == 1);
  static_assert((kH - 1) % (kUp * kDown) == 0 && (kW - 1) % (kUp * kDown) == 0);
  static_assert(kH >= kUp && kW >= kUp);

  // A step takes kDown rows of the source and completes kUp rows of positions, kLag steps after the
  // first row that they need. Until then they are among the kOpen rows that a step adds to.
  static constexpr int kLag = (kH - 1) / (kUp * kDown);
  static constexpr int kOpen = 1 + (kH - 1) / kDown;
  // Columns of positions that a thread owns, and of the source that it reads for them.
  static constexpr int kColumns = kColumns_;
  static constexpr int kReads = ((kColumns - 1) * kDown + kW - 1) / kUp + 1;
  static_assert(kColumns % kUp == 0);

  // Columns of the source under `columns` positions.
  __host__ __device__ static constexpr int span(int columns) {
    return ((columns - 1) * kDown + kW - 1) / kUp + 1;
  }
};

// Calls f(open, kh, j, kw, read) for all products of row `row` of a step: of tap (kh, kw) and a
// thread's read `read`, for its position j of open row `open`.
template <typename W, typename F>
__device__ __forceinline__ void for_products(int row, F&& f) {
#pragma unroll
  for (int open = 0; open < W::kOpen; ++open) {
    const int kh = open * W::kDown - row * W::kUp;
    if (kh < 0 || kh >= W::kH) continue;
#pragma unroll
    for (int read = 0; read < W::kReads; ++read)
#pragma unroll
      for (int j = 0; j < W::kColumns; ++j) {
        const int kw = j * W::kDown + W::kW - 1 - read * W::kUp;
        if (kw >= 0 && kw < W::kW) f(open, kh, j, kw, read);
      }
  }
}

constexpr int kMaxWarps = 8;  // of a block
// Channels of a thread: neighbours, loaded and stored together. Two where they are 16 bits and the
// registers last, so that a warp's access is 128 bytes.
template <typename W, typename T>
constexpr int kVector = sizeof(T) == 2 && W::kTaps <= 9 ? 2 : 1;
template <typename W, typename T>
constexpr int kChannels = kWarp * kVector<W, T>;  // of a block
// Blocks a multiprocessor that the registers leave. ptxas fits them for compute capability 9.0 and
// spills for others, which get what it needs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <typename W, typename T>
constexpr int kBlocks = W::kTaps > 25                  ? 2
                        : W::kTaps * kVector<W, T> > 9 ? 3
                                                       : 4;
template <typename W>
constexpr int kWeightBlocks = W::kTaps > 9 ? 2 : 3;
#else
template <typename W, typename T>
constexpr int kBlocks = W::kTaps > 9 ? 1 : 2;
template <typename W>
constexpr int kWeightBlocks = W::kTaps > 9 ? 1 : 2;
#endif
// Stages of the ring, all but one of them on the way; steps a stage, which share a barrier.
constexpr int kStages = 3;
template <typename W>
constexpr int kSteps = W::kTaps == 9 && W::kDown == 1 ? 2 : 1;

// A tensor that is read or written, channels dense.
struct Image {
  int64_t image_stride, row_stride;
  int column_stride;  // int, so that an offset is one multiplication
  int height, width;

  explicit Image(const Tensor4& t)
      : image_stride(t.stride[0]),
        row_stride(t.stride[2]),
        column_stride(int(t.stride[3])),
        height(int(t.size[2])),
        width(int(t.size[3])) {}
};

// Where a tile lies. Channels and images are 64-bit only in offsets.
struct Tile {
  int channel, column, row, image;  // the first of each; column and row are positions
};

// How the positions are cut into tiles: all of a block's warps side by side along W, `rows` high.
// Tiles that share rows are neighbours in the order of blocks, so that they meet in L2.
struct Tiling {
  int warps, rows;
  int channel_tiles, column_tiles, strips;
  unsigned count;  // of all tiles of one channel tile

  // kChannels: of a block; kColumns: of a warp.
  template <int kChannels, int kColumns>
  __device__ Tile tile(unsigned channel_tile, unsigned index) const {
    const unsigned line = index / unsigned(column_tiles), image = line / unsigned(strips);
    return {int(channel_tile) * kChannels, int(index - line * column_tiles) * warps * kColumns,
            int(line - image * strips) * rows, int(image)};
  }
};

// Bytes of the ring: rows of the source, and of positions where a kernel reads those too.
template <typename W, typename T>
constexpr int ring_bytes(int warps, bool reads_positions) {
  const int columns = warps * W::kColumns;
  const int pixels = W::kDown * W::span(columns) + (reads_positions ? columns : 0);
  return kStages * kSteps<W> * pixels * kChannels<W, T> * int(sizeof(T));
}

// What a kernel's tiles are made of.
struct Shape {
  int channels, columns;  // of a block; of a warp
  int most_warps;         // of a block
  int busy_warps;         // a multiprocessor with fewer takes as long for a step
  bool skips_outside;     // rows above and below the source cost no steps
};

// `height` and `width` count positions.
template <typename W>
Tiling make_tiling(const ConvProblem& p, int64_t height, int64_t width, int64_t most_rows,
                   const Device& device, const Shape& shape) {
  const int64_t groups = ceil_divide(width, shape.columns);
  const int64_t column_tiles = ceil_divide(groups, shape.most_warps);
  const int64_t warps = ceil_divide(groups, column_tiles);
  const int64_t channel_tiles = ceil_divide(p.in_channels(), shape.channels);

  // Strips trade steps of warming up, and filling the ring, for even loads.
  constexpr int64_t kFill = 3;
  constexpr int64_t kTried = 32;  // numbers of strips: a microsecond
  int64_t best_rows = 1, best_cost = INT64_MAX;
  const int64_t fewest = ceil_divide(height, most_rows);
  for (int64_t strips = fewest; strips < fewest + kTried && strips <= height; ++strips) {
    const int64_t rows = round_up(ceil_divide(height, strips), W::kUp);
    const int64_t blocks = p.batch() * channel_tiles * column_tiles * ceil_divide(height, rows);
    const int64_t load = ceil_divide(blocks, device.processors) * warps;
    const int64_t lag = shape.skips_outside && strips == 1 ? 0 : W::kLag;
    const int64_t cost = std::max<int64_t>(load, shape.busy_warps) * (rows / W::kUp + lag + kFill);
    if (cost < best_cost) {
      best_cost = cost;
      best_rows = rows;
    }
  }
  const int64_t strips = ceil_divide(height, best_rows);
  return {int(warps),        int(best_rows), int(channel_tiles),
          int(column_tiles), int(strips),    unsigned(p.batch() * strips * column_tiles)};
}

// The shape of kernels whose blocks have a ring; `shared_bytes(warps)` must not exceed
// kSharedBytes.
template <typename W, typename T, typename F>
Shape block_shape(F&& shared_bytes) {
  int most_warps = kMaxWarps;
  while (most_warps > 1 && shared_bytes(most_warps) > kSharedBytes) --most_warps;
  return {kChannels<W, T>, W::kColumns, most_warps, 14, false};
}

// The windows that are compiled. Stride 1, where warps have rings: as many columns as the registers
// last for; then those of forward and backward-weight, and of backward-input with a stride.
template <typename... Windows>
struct WindowList {};
using Small = WindowList<Window<3, 3, 1, 1>>;
using Large = WindowList<Window<5, 5, 1, 1, 8>, Window<7, 7, 1, 1, 7>>;
using Strided = WindowList<Window<3, 3, 1, 2>, Window<5, 5, 1, 2>, Window<7, 7, 1, 2>>;
using Inserted = WindowList<Window<3, 3, 2, 1>, Window<5, 5, 2, 1>, Window<7, 7, 2, 1>>;

// Calls f with the problem's window; false if it is not in the list.
template <typename F, typename... Windows>
bool with_window(const ConvProblem& p, F&& f, WindowList<Windows...>) {
  const bool backward = p.direction == Direction::kBackwardInput;
  const auto matches = [&](auto window) {
    using W = decltype(window);
    const int64_t stride = backward ? W::kUp : W::kDown, other = backward ? W::kDown : W::kUp;
    return p.kernel().h == W::kH && p.kernel().w == W::kW && p.stride.h == stride &&
           p.stride.w == stride && other == 1;
  };
  return ((matches(Windows{}) && (f(Windows{}), true)) || ...);
}

// Calls f with a value of the dtype's C++ type; float64 has no kernels.
template <typename F>
void with_type(DType dtype, F&& f) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (sizeof(tag) < 8) f(tag);
  });
}

// A tensor that the ring is filled from.
struct Source {
  Image image;
  int chunk_bytes;  // of a copy: 16 or 4; 2 where nothing wider is aligned

  Source(const Tensor4& t, const void* data, DType dtype) : image(t) {
    const int64_t size = element_size(dtype);
    uint64_t bits = reinterpret_cast<uintptr_t>(data) | uint64_t(t.size[1] * size);
    for (const int dimension : {0, 2, 3})
      if (t.size[dimension] > 1) bits |= uint64_t(t.stride[dimension] * size);
    chunk_bytes = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
    // Whose strides may be anything: addresses outside of the tensor must be aligned, too.
    if (t.size[2] == 1) image.row_stride = 0;
    if (t.size[3] == 1) image.column_stride = 0;
  }
};

// Copies one row of a tile's columns and channels after the other to shared memory, zeros where the
// tensor ends. A thread has the same chunk of a pixel in every row, in every `step_`-th column;
// channels past the last are left as they are, nobody stores what becomes of them.
template <typename T, int kChannels>
class Copier {
 public:
  // `image`: the tile's first channel of its image. Rows from `row` on; from `end_row` on, zeros.
  __device__ Copier(const Source& source, const T* image, int row, int end_row, int first_column,
                    int columns, int channels)
      : image_(source.image),
        bytes_(source.chunk_bytes),
        row_(row),
        end_row_(end_row),
        end_(first_column + columns) {
    constexpr int kPixelBytes = kChannels * int(sizeof(T));
    const int chunk = max(4, bytes_), chunks = kPixelBytes / chunk;
    const int byte = threadIdx.x % chunks * chunk;
    column_ = first_column + threadIdx.x / chunks;
    step_ = blockDim.x / chunks;
    if (byte >= channels * int(sizeof(T))) column_ = end_;
    place_ = threadIdx.x * chunk / int(sizeof(T));
    from_ = image + row * image_.row_stride + int64_t(column_) * image_.column_stride +
            byte / int(sizeof(T));
    half_ = channels * int(sizeof(T)) - byte == 2;
  }

  // The next kRows rows, to rows `pitch` elements apart.
  template <int kRows>
  __device__ __forceinline__ void copy_rows(T* to, int pitch) {
    if (bytes_ == 16)
      copy_chunks<kRows, 16>(to, pitch);
    else if (sizeof(T) == 4 || bytes_ == 4)
      copy_chunks<kRows, 4>(to, pitch);
    else if constexpr (sizeof(T) == 2)
      copy_chunks<kRows, 2>(to, pitch);
    row_ += kRows;
    from_ += kRows * image_.row_stride;
  }

 private:
  template <int kRows, int kBytes>
  __device__ __forceinline__ void copy_chunks(T* to, int pitch) const {
    const T* from = from_;
    T* place = to + place_;
#pragma unroll 1
    for (int column = column_; column < end_; column += step_) {
      const bool column_inside = unsigned(column) < unsigned(image_.width);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const bool inside = column_inside && unsigned(row_ + row) < unsigned(end_row_);
        const T* const source = from + row * image_.row_stride;
        T* const target = place + row * pitch;
        if constexpr (kBytes > 2) {
          __pipeline_memcpy_async(target, source, kBytes, inside ? 0 : kBytes);
        } else {
          // No asynchronous copy has 2 bytes. The barrier before the stage is read orders these.
          target[0] = inside ? source[0] : convert<T>(0.0f);
          target[1] = inside && !half_ ? source[1] : convert<T>(0.0f);
        }
      }
      from += int64_t(step_) * image_.column_stride;
      place += step_ * kChannels;
    }
  }

  const Image& image_;
  const T* from_;
  int bytes_, row_, end_row_, end_, column_, step_, place_;
  bool half_;  // of the chunk's two channels only one is the tensor's
};

// A place in the ring that goes round with the stages.
template <typename T>
struct RingPlace {
  T* place;
  T* end;
  int stage_size;

  __device__ RingPlace(T* ring, int stage_size_, int offset)
      : place(ring + offset), end(place + kStages * stage_size_), stage_size(stage_size_) {}
  __device__ __forceinline__ void next() {
    place += stage_size;
    if (place == end) place -= kStages * stage_size;
  }
};

// A thread's neighbouring channels as sums are kept: `kCount` from shared memory.
template <int kCount, typename T>
__device__ __forceinline__ void load_channels(const T* from, float (&to)[kCount]) {
  struct alignas(kCount * sizeof(T)) Vector {
    T elements[kCount];
  };
  const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
  for (int v = 0; v < kCount; ++v) to[v] = convert<float>(vector.elements[v]);
}

}  // namespace convops::cuda::depthwise_channels_last

// Forward and backward-input without a walk, for float32 3×3 and for small problems: a thread has a
// patch of positions and four neighbouring channels, asks for all that it needs of the source at
// once, multiplies, stores and is done. Nothing waits for a row before it, which is what small
// problems take their time for, no lane idles, however few channels there are, and memory has as
// much to do at any time as registers can hold. The rows and columns that patches share come out of
// the caches.
//
// A block's threads lie along channels, columns and rows of patches, in this order. Its weights are
// copied to shared memory as they lie, all taps of a channel one after the other; a thread reads
// those of its channels as vectors, without bank conflicts: 4 · taps words apart are 4 banks apart.
#include "cuda/check.h"
#include "cuda/depthwise_channels_last_patches.h"
#include "cuda/depthwise_channels_last_pixels.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::depthwise_channels_last {
namespace {

constexpr int kPatchChannels = 4;  // of a thread
constexpr int kMostThreads = 256;  // of a block

// A window whose positions a thread has kRows × kColumns of. The registers leave kBlocks a
// multiprocessor; ptxas fits them for compute capability 9.0 and may spill for others.
template <int kSize, int kUp_, int kDown_, int kRows_, int kColumns_, int kBlocks_>
struct Patch : Window<kSize, kSize, kUp_, kDown_, kColumns_> {
  static constexpr int kRows = kRows_;
  static constexpr int kBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
      kBlocks_;
#else
      1;
#endif
  static constexpr int kReadRows = ((kRows - 1) * kDown_ + kSize - 1) / kUp_ + 1;
  static_assert(kRows % kUp_ == 0);
};
// Large patches read less twice, small ones are more threads, and less code, which a call reads
// from memory, too.
using LargePatches =
    WindowList<Patch<3, 1, 1, 4, 2, 2>, Patch<3, 1, 2, 2, 2, 1>, Patch<3, 2, 1, 4, 2, 2>>;
template <typename T>
using SmallPatches =
    WindowList<Patch<3, 1, 1, sizeof(T) / 2, sizeof(T) / 2, 2>, Patch<3, 1, 2, 1, 1, 2>,
               Patch<3, 2, 1, 2, 2, 2>, Patch<5, 1, 1, 1, 1, 1>, Patch<5, 1, 2, 1, 1, 1>,
               Patch<5, 2, 1, 2, 2, 1>>;

struct Grid {
  Divisor channel_tiles, column_tiles, strips;
};

// A thread's patch: its first position and channel.
struct Place {
  int image, row, column, channel;
  int block_vector;  // the block's first vector of channels

  template <typename W>
  static __device__ __forceinline__ Place of_thread(const Grid& grid) {
    const int line = grid.channel_tiles.quotient(blockIdx.x),
              strips = grid.column_tiles.quotient(line), image = grid.strips.quotient(strips);
    const int vector = grid.channel_tiles.remainder(blockIdx.x) * blockDim.x;
    const int columns = (line - strips * int(grid.column_tiles.value)) * blockDim.y,
              rows = (strips - image * int(grid.strips.value)) * blockDim.z;
    return {image, (rows + int(threadIdx.z)) * W::kRows, (columns + int(threadIdx.y)) * W::kColumns,
            (vector + int(threadIdx.x)) * kPatchChannels, vector};
  }
};

// Computes a thread's results once more by the definition; `taps` are those of its channels. It
// finds its place anew, so that the registers that would remember it are free for the loads.
template <typename W, typename T>
__device__ __noinline__ void store_patch_by_definition(const Pixels& p, const Grid& grid,
                                                       const T* taps, const T* source, T* result) {
  const Place at = Place::of_thread<W>(grid);
#pragma unroll 1
  for (int v = 0; v < kPatchChannels; ++v)
    store_by_definition<W, false>(
        p, Tile{0, 0, at.row, at.image}, at.column, at.channel + v,
        [&](int tap) { return convert<float>(taps[v * W::kTaps + tap]); }, 0.0f, source, result);
}

template <typename W, typename T, bool kBackward>
__global__ void __launch_bounds__(kMostThreads, W::kBlocks)
    patches_kernel(const __grid_constant__ Pixels p, const __grid_constant__ Grid grid,
                   const T* source,  // not __restrict__: loads might move behind the barrier
                   const T* __restrict__ weight, const T* __restrict__ bias,
                   T* __restrict__ result) {
  constexpr int kV = kPatchChannels;
  struct alignas(kV * sizeof(T)) Vector {
    T elements[kV];
  };
  extern __shared__ uint4 shared[];
  Vector* const weights = reinterpret_cast<Vector*>(shared);

  const auto [image, row, column, channel, vector] = Place::of_thread<W>(grid);

  const int chunks = min(int(blockDim.x), p.channels / kV - vector) * W::kTaps;
  for (int i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; i < chunks;
       i += blockDim.x * blockDim.y * blockDim.z)
    ptx::copy_bytes<sizeof(Vector)>(
        uint32_t(__cvta_generic_to_shared(weights + i)),
        reinterpret_cast<const Vector*>(weight) + int64_t(vector) * W::kTaps + i);
  ptx::copy_commit();

  const int source_row = p.source_row + row / W::kUp * W::kDown,
            source_column = p.source_column + column / W::kUp * W::kDown;
  const T* from = source + image * p.source.image.image_stride + channel +
                  source_row * p.source.image.row_stride +
                  int64_t(source_column) * p.source.image.column_stride;
  Vector values[W::kReadRows][W::kReads];
#pragma unroll
  for (int i = 0; i < W::kReadRows; ++i, from += p.source.image.row_stride)
#pragma unroll
    for (int j = 0; j < W::kReads; ++j) {
#pragma unroll
      for (int v = 0; v < kV; ++v) values[i][j].elements[v] = convert<T>(0.0f);
      if (channel < p.channels && unsigned(source_row + i) < unsigned(p.source.image.height) &&
          unsigned(source_column + j) < unsigned(p.source.image.width))
        values[i][j] =
            *reinterpret_cast<const Vector*>(from + int64_t(j) * p.source.image.column_stride);
    }
  float sums[W::kRows][W::kColumns][kV] = {};
  ptx::copy_wait<0>();
  __syncthreads();

  Vector taps[W::kTaps];  // in memory's order, [channel][tap]
#pragma unroll
  for (int i = 0; i < W::kTaps; ++i) taps[i] = weights[threadIdx.x * W::kTaps + i];
  const auto weight_of = [&](int tap, int v) {
    const int place = v * W::kTaps + (kBackward ? tap : W::kTaps - 1 - tap);
    return convert<float>(taps[place / kV].elements[place % kV]);
  };
#pragma unroll
  for (int tap = 0; tap < W::kTaps; ++tap)
#pragma unroll
    for (int i = 0; i < W::kRows; ++i)
#pragma unroll
      for (int j = 0; j < W::kColumns; ++j) {
        const int h = i * W::kDown + W::kH - 1 - tap / W::kW,
                  w = j * W::kDown + W::kW - 1 - tap % W::kW;
        if (h % W::kUp != 0 || w % W::kUp != 0) continue;
#pragma unroll
        for (int v = 0; v < kV; ++v)
          sums[i][j][v] +=
              weight_of(tap, v) * convert<float>(values[h / W::kUp][w / W::kUp].elements[v]);
      }

  if (channel >= p.channels) return;
  if (!kBackward && bias)  // not before: until here the registers are full
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const float shift = convert<float>(bias[(channel + v) * p.bias_stride]);
#pragma unroll
      for (int i = 0; i < W::kRows * W::kColumns; ++i)
        sums[i / W::kColumns][i % W::kColumns][v] += shift;
    }
  const int result_row = row + p.result_row, result_column = column + p.result_column;
  T* to = result + image * p.result.image_stride + channel + result_row * p.result.row_stride +
          int64_t(result_column) * p.result.column_stride;
#pragma unroll
  for (int i = 0; i < W::kRows; ++i, to += p.result.row_stride)
    if (unsigned(result_row + i) < unsigned(p.result.height))
      store_row<W>(to, p.result.column_stride, -result_column, p.result.width - result_column, kV,
                   true, sums[i]);

  if constexpr (kBackward) {
    // The zeros around the source do not count, but an infinite weight has made NaN of them.
    float zero = 0;
#pragma unroll
    for (int i = 0; i < W::kRows * W::kColumns * kV; ++i)
      zero += sums[i / kV / W::kColumns][i / kV % W::kColumns][i % kV] * 0.0f;
    if (zero == 0) return;
    store_patch_by_definition<W>(
        p, grid, reinterpret_cast<const T*>(weights) + threadIdx.x * kV * W::kTaps, source, result);
  }
}

template <typename W, typename T, bool kBackward>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const Tensor4& to = p.result();
  // Where the padding is odd, position 0 lies before the result's first row.
  const int64_t height = to.size[2] + (kBackward ? p.padding.h % W::kUp : 0);
  const int64_t width = to.size[3] + (kBackward ? p.padding.w % W::kUp : 0);
  constexpr int64_t kMostStack = 64;  // CUDA's limit of blockDim.z
  // A block's threads: even shares of the channels, then of the columns, then of the rows.
  const int64_t vectors = p.in_channels() / kPatchChannels,
                columns = ceil_divide(width, int64_t{W::kColumns}),
                rows = ceil_divide(height, int64_t{W::kRows});
  const int64_t channel_tiles = ceil_divide(vectors, int64_t{kWarp}),
                x = ceil_divide(vectors, channel_tiles);
  // Whole rows where they are so short, else as small blocks as pay for their weights.
  const int64_t threads = x * columns <= kMostThreads ? kMostThreads : kMostThreads / 2;
  const int64_t column_tiles = ceil_divide(columns, threads / x),
                y = ceil_divide(columns, column_tiles);
  const int64_t strips = ceil_divide(rows, std::min(threads / (x * y), kMostStack)),
                z = ceil_divide(rows, strips);
  const int64_t blocks = p.batch() * strips * column_tiles * channel_tiles;
  if (blocks == 0) return;
  const Tiling tiling{.rows = W::kRows};
  const dim3 shape{unsigned(x), unsigned(y), unsigned(z)};
  const int64_t weight_bytes = x * kPatchChannels * W::kTaps * int64_t(sizeof(T));
  patches_kernel<W, T, kBackward>
      <<<unsigned(blocks), shape, weight_bytes, static_cast<cudaStream_t>(execution.stream)>>>(
          Pixels(p, operands, tiling),
          Grid{Divisor(channel_tiles), Divisor(column_tiles), Divisor(strips)},
          static_cast<const T*>(kBackward ? operands.output : operands.input),
          static_cast<const T*>(operands.weight), static_cast<const T*>(operands.bias),
          static_cast<T*>(kBackward ? operands.input : operands.output));
  CONVOPS_LAUNCH_CHECK("depthwise_channels_last by patches");
}

// Vectors of channels, wherever a thread finds them.
bool has_vectors(const ConvProblem& p, const Operands& operands) {
  const Tensor4& w = p.weight;
  const auto aligned = [&](const Tensor4& t, const void* data) {
    return Source(t, data, p.dtype).chunk_bytes == 16;
  };
  return aligned(p.input, operands.input) && aligned(p.output, operands.output) &&
         reinterpret_cast<uintptr_t>(operands.weight) % 16 == 0 && w.is_contiguous();
}

}  // namespace

Patches which_patches(const ConvProblem& p, const Device& device) {
  const auto nothing = [](auto) {};
  // Products that keep a multiprocessor busy for as long as a walk takes to begin.
  constexpr double kFewProducts = 48 * 1024;
  if (p.flops() <= 2 * kFewProducts * device.processors &&
      with_window(p, nothing, SmallPatches<float>{}))
    return Patches::kSmall;
  // Of 16 bits walks are faster.
  return p.dtype == DType::kFloat32 && with_window(p, nothing, LargePatches{}) ? Patches::kLarge
                                                                               : Patches::kNone;
}

bool run_patches(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const Patches patches = which_patches(p, *execution.device);
  if (patches == Patches::kNone || !has_vectors(p, operands)) return false;
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto f = [&](auto window) {
      using W = decltype(window);
      if constexpr (W::kUp == 1)
        if (!Pixels::backward(p)) launch<W, T, false>(p, operands, execution);
      if constexpr (W::kDown == 1)
        if (Pixels::backward(p)) launch<W, T, true>(p, operands, execution);
    };
    if (patches == Patches::kSmall)
      with_window(p, f, SmallPatches<T>{});
    else if constexpr (sizeof(T) == 4)
      with_window(p, f, LargePatches{});
  });
  return true;
}

}  // namespace convops::cuda::depthwise_channels_last

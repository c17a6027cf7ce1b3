// im2col: columns(tap, pixel) = input(channel, oh · stride - padding + kh · dilation, ...), zero
// outside.
//
// One thread owns kVector neighbouring output pixels of one channel and walks the kernel's taps:
// the pixels' coordinates are divided out once, each tap is one vector store coalesced over the
// warp, and the overlapping loads of neighbours meet in L1. Bound by the stores: kernel height ·
// width times the input. H200, 64×512×1024, 3×3: 0.42 ms with vectors of 4, 0.67 ms with single
// elements; the stores alone take 0.29 ms.
//
// Where channels are neighbours (channels_last), tiles of channels × pixels turn round in shared
// memory, so that loads are coalesced as well.
#include "cuda/check.h"
#include "cuda/im2col.h"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T value[kSize];
};

// Index: 32 bits where the chunk's pixels fit; 64-bit divisions cost several times as much.
template <typename T, typename Index, int kSize>
__global__ void __launch_bounds__(kThreads)
    im2col_kernel(const __grid_constant__ ConvProblem p, const T* __restrict__ input,
                  const __grid_constant__ Columns columns, Index pixels) {
  const Index first = (Index(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (first >= pixels) return;
  const Index width = Index(p.output.size[3]), rows = Index(columns.chunk.rows);
  const Index line = first / width;
  Index ow = first % width, row = line % rows, image = line / rows;
  T* out_pixel = static_cast<T*>(columns.data) + image * columns.image_stride +
                 (row * int64_t(width) + ow) * columns.pixel_stride;
  const T* image_data[kSize];
  int h0[kSize], w0[kSize];
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    image_data[v] = input + (columns.chunk.image + image) * p.input.stride[0];
    h0[v] = int((columns.chunk.row + row) * p.stride.h - p.padding.h);
    w0[v] = int(ow * p.stride.w - p.padding.w);
    // Past the last pixel it is repeated, into the row's padding.
    if (first + v + 1 < pixels && ++ow == width) {
      ow = 0;
      if (++row == rows) {
        row = 0;
        ++image;
      }
    }
  }
  const int in_h = int(p.input.size[2]), in_w = int(p.input.size[3]);
  const int kernel_h = int(p.weight.size[2]), kernel_w = int(p.weight.size[3]);
  const int dilation_h = int(p.dilation.h), dilation_w = int(p.dilation.w);

  for (int64_t channel = blockIdx.y; channel < p.input.size[1]; channel += gridDim.y) {
    const int64_t plane = channel * p.input.stride[1];
    T* out = out_pixel + channel * kernel_h * kernel_w * columns.tap_stride;
    for (int kh = 0; kh < kernel_h; ++kh) {
      for (int kw = 0; kw < kernel_w; ++kw) {
        Vector<T, kSize> values;
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          const int h = h0[v] + kh * dilation_h, w = w0[v] + kw * dilation_w;
          const bool inside = unsigned(h) < unsigned(in_h) && unsigned(w) < unsigned(in_w);
          values.value[v] =
              inside ? image_data[v][plane + h * p.input.stride[2] + w * p.input.stride[3]]
                     : convert<T>(AccumulateType<T>(0));
        }
        *reinterpret_cast<Vector<T, kSize>*>(out) = values;
        out += columns.tap_stride;
      }
    }
  }
}

// A warp loads neighbouring channels of a pixel and stores neighbouring pixels of a channel.
constexpr int kTile = 32, kTileRows = 8, kTilePixels = kTile / kTileRows;  // of a thread

template <typename T, typename Index>
__global__ void __launch_bounds__(kTile* kTileRows)
    im2col_channels_kernel(const __grid_constant__ ConvProblem p, const T* __restrict__ input,
                           const __grid_constant__ Columns columns, Index pixels) {
  __shared__ T tile[kTile][kTile + 1];
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  const Index width = Index(p.output.size[3]), rows = Index(columns.chunk.rows);
  const Index first = Index(blockIdx.x) * kTile;
  const T* image_data[kTilePixels];
  int h0[kTilePixels], w0[kTilePixels];
#pragma unroll
  for (int i = 0; i < kTilePixels; ++i) {
    const Index pixel = min(first + y + i * kTileRows, pixels - 1);
    const Index line = pixel / width;
    image_data[i] = input + (columns.chunk.image + line / rows) * p.input.stride[0];
    h0[i] = int((columns.chunk.row + line % rows) * p.stride.h - p.padding.h);
    w0[i] = int(pixel % width * p.stride.w - p.padding.w);
  }
  const Index image = (first + x) / (rows * width);
  T* const out_pixel = static_cast<T*>(columns.data) + image * columns.image_stride +
                       (first + x - image * rows * width) * columns.pixel_stride;
  const int in_h = int(p.input.size[2]), in_w = int(p.input.size[3]);
  const int kernel_h = int(p.weight.size[2]), kernel_w = int(p.weight.size[3]);
  const int taps = kernel_h * kernel_w;
  const int channels = int(p.input.size[1]);

  for (int begin = int(blockIdx.y) * kTile; begin < channels; begin += int(gridDim.y) * kTile) {
    for (int tap = 0; tap < taps; ++tap) {
      const int down = tap / kernel_w * int(p.dilation.h);
      const int right = tap % kernel_w * int(p.dilation.w);
#pragma unroll
      for (int i = 0; i < kTilePixels; ++i) {
        const int h = h0[i] + down, w = w0[i] + right;
        const bool inside = unsigned(h) < unsigned(in_h) && unsigned(w) < unsigned(in_w);
        tile[y + i * kTileRows][x] =
            inside && begin + x < channels
                ? image_data[i][begin + x + h * p.input.stride[2] + w * p.input.stride[3]]
                : convert<T>(AccumulateType<T>(0));
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTile; i += kTileRows)
        if (begin + y + i < channels && first + x < pixels)
          out_pixel[(int64_t(begin + y + i) * taps + tap) * columns.tap_stride] = tile[x][y + i];
      __syncthreads();
    }
  }
}

// Whether that is worth it: a warp's loads are of whole sectors.
template <typename T>
bool has_neighbouring_channels(const ConvProblem& p) {
  constexpr int64_t kSector = 32;
  return p.input.stride[1] == 1 && p.input.stride[3] > 1 &&
         p.in_channels() * int64_t(sizeof(T)) >= kSector;
}

template <typename T>
void launch_channels(const ConvProblem& p, const void* input, const Columns& columns,
                     cudaStream_t stream) {
  const int64_t pixels = columns.chunk.pixels(p), blocks = ceil_divide(pixels, int64_t{kTile});
  const dim3 grid(unsigned(blocks),
                  channel_blocks(ceil_divide(p.in_channels(), int64_t{kTile}), blocks));
  const dim3 block(kTile, kTileRows);
  const T* data = static_cast<const T*>(input);
  if (pixels + kTile <= INT32_MAX)
    im2col_channels_kernel<T, int32_t><<<grid, block, 0, stream>>>(p, data, columns, pixels);
  else
    im2col_channels_kernel<T, int64_t><<<grid, block, 0, stream>>>(p, data, columns, pixels);
  CONVOPS_LAUNCH_CHECK("im2col of channels_last");
}

template <typename T, int kSize>
void launch(const ConvProblem& p, const void* input, const Columns& columns, cudaStream_t stream) {
  const int64_t pixels = columns.chunk.pixels(p);
  constexpr int kBlock = kThreads * kSize;
  const int64_t blocks = (pixels + kBlock - 1) / kBlock;
  const dim3 grid(unsigned(blocks), channel_blocks(p.in_channels(), blocks));
  const T* data = static_cast<const T*>(input);
  if (pixels + kBlock <= INT32_MAX)
    im2col_kernel<T, int32_t, kSize><<<grid, kThreads, 0, stream>>>(p, data, columns, pixels);
  else
    im2col_kernel<T, int64_t, kSize><<<grid, kThreads, 0, stream>>>(p, data, columns, pixels);
  CONVOPS_LAUNCH_CHECK("im2col");
}

// Whether every kVector pixels from a multiple of it on are neighbours in aligned memory, and a row
// has room for a last incomplete vector.
bool stores_vectors(const ConvProblem& p, const Columns& columns) {
  const int64_t image_pixels = columns.chunk.rows * p.output_size().w;
  const int64_t pixels = columns.chunk.pixels(p);
  if (columns.pixel_stride != 1 || columns.tap_stride % kVector != 0) return false;
  if (columns.image_stride == image_pixels || columns.chunk.images == 1)
    return columns.tap_stride >= (pixels + kVector - 1) / kVector * kVector;
  return image_pixels % kVector == 0 && columns.image_stride % kVector == 0;
}

}  // namespace

void im2col(const ConvProblem& problem, const void* input, const Columns& columns, void* stream) {
  dispatch(problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (has_neighbouring_channels<T>(problem))
      launch_channels<T>(problem, input, columns, static_cast<cudaStream_t>(stream));
    else if (stores_vectors(problem, columns))
      launch<T, kVector>(problem, input, columns, static_cast<cudaStream_t>(stream));
    else
      launch<T, 1>(problem, input, columns, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace convops::cuda

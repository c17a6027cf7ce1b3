// Depthwise convolution with channel multiplier 1: every channel is a plane of its own, too thin
// for a GEMM. Bound by memory, so each thread reuses what it loads from registers. Any strides,
// sizes and padding; the kernels of the table below. float32 is IEEE whatever the precision asked
// for.
//
// A thread owns one column and kRows consecutive rows of outputs (a strip) of one plane. It walks
// the input rows under the strip once, loads the kernel's width of neighbours of each, and adds
// their products to all the sums they belong to:
//
//                    sums of a thread        registers besides       between threads
//   forward          kRows outputs           the channel's weights   nothing
//   backward-input   the same kernel on grad_output with the weight turned by 180 degrees
//   backward-weight  one of every tap        kRows of grad_output    block, then chunks of blocks
//
// Lanes lie along W, so loads are coalesced and the overlaps of neighbours meet in L1; where the
// channels are the dense dimension (channels_last) lanes lie along them. Column, strip, channel and
// image are one flat index, so the lanes of small planes do not idle.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

// 14 of 64 rows loaded twice for 7×7, 2 for 3×3; more rows a thread leave small planes fewer
// threads than the chip has places for.
constexpr int kRows = 8;
constexpr int kThreads = 128;
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
// Coordinates are int: a side times the stride (2) plus a kernel must fit.
constexpr int64_t kMaxSide = int64_t{1} << 29;

template <int kH_, int kW_, int kStride_>
struct Shape {
  static constexpr int kH = kH_, kW = kW_, kStride = kStride_;
  static constexpr int kTaps = kH * kW;
  static constexpr int kInputRows = (kRows - 1) * kStride + kH;  // under a strip
};
// Output rows between two branches out of a strip that ends early. The branches also keep ptxas
// from moving all loads to the top, which spills.
template <typename Shape>
constexpr int kRowsPerBranch = Shape::kTaps == 49 ? 2 : 4;
// Sums or weights of 7×7 in float64 spill on one of the default architectures.
template <typename Shape, typename T>
constexpr bool kIsCompiled = Shape::kTaps < 49 || sizeof(T) < 8;
template <typename... Shapes>
struct ShapeList {};
// The kernels that are compiled.
using AllShapes =
    ShapeList<Shape<3, 3, 1>, Shape<5, 5, 1>, Shape<7, 7, 1>, Shape<3, 1, 1>, Shape<1, 3, 1>,
              Shape<3, 7, 1>, Shape<7, 3, 1>, Shape<3, 3, 2>, Shape<5, 5, 2>, Shape<7, 7, 2>>;

// Calls f with the shape of the problem; false if it is not compiled.
template <typename F, typename... Shapes>
bool with_shape(const ConvProblem& p, F&& f, ShapeList<Shapes...>) {
  const auto matches = [&](auto shape) {
    return p.kernel().h == shape.kH && p.kernel().w == shape.kW && p.stride.h == shape.kStride &&
           p.stride.w == shape.kStride;
  };
  return ((matches(Shapes{}) && (f(Shapes{}), true)) || ...);
}

// Strips of all planes a flat index runs over, columns fastest.
struct Strips {
  int64_t columns, strips;
  int64_t planes;
  bool fits_32;  // 64-bit divisions cost several times as much

  Strips(int64_t height, int64_t width, int64_t planes_)
      : columns(width), strips((height + kRows - 1) / kRows), planes(planes_) {
    fits_32 = count() <= INT32_MAX;
  }
  __host__ __device__ int64_t count() const { return columns * strips * planes; }
};
// A quotient and remainder of a flat index.
struct Split {
  int64_t quotient;
  int remainder;
};
__host__ __device__ __forceinline__ Split split(int64_t index, int64_t size, bool fits_32) {
  if (fits_32) {
    const uint32_t quotient = uint32_t(index) / uint32_t(size);
    return {int64_t(quotient), int(uint32_t(index) - quotient * uint32_t(size))};
  }
  return {index / size, int(index % size)};
}

// A tensor that is read with padding. Sizes are of a plane.
struct Source {
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int height, width;
  int pad_h, pad_w;

  Source(const Tensor4& t, int64_t pad_h_, int64_t pad_w_)
      : image_stride(t.stride[0]),
        channel_stride(t.stride[1]),
        row_stride(t.stride[2]),
        column_stride(t.stride[3]),
        height(int(t.size[2])),
        width(int(t.size[3])),
        pad_h(int(pad_h_)),
        pad_w(int(pad_w_)) {}
};

// Calls f(r, values) for each input row r under the strip whose first output is (oh, ow); zeros
// outside. Ends early where the strip has no more outputs, `rows`. kDense: the column stride is 1,
// so neighbours are at constant offsets.
template <typename Shape, bool kDense, typename T, typename F>
__host__ __device__ __forceinline__ void walk_rows(const Source& source, const T* plane, int oh,
                                                   int ow, int rows, F&& f) {
  using Sum = AccumulateType<T>;
  const int h0 = oh * Shape::kStride - source.pad_h, w0 = ow * Shape::kStride - source.pad_w;
  const int64_t step = kDense ? 1 : source.column_stride;
  int64_t offset = h0 * source.row_stride + w0 * step;
#pragma unroll
  for (int r = 0; r < Shape::kInputRows; ++r, offset += source.row_stride) {
    constexpr int kFirst = Shape::kH - Shape::kStride;  // where a strip of no outputs would end
    const int ended = (r - kFirst) / Shape::kStride;    // outputs that need no row from r on
    if (r > kFirst && (r - kFirst) % Shape::kStride == 0 && ended % kRowsPerBranch<Shape> == 0 &&
        rows <= ended)
      break;
    const bool row_inside = unsigned(h0 + r) < unsigned(source.height);
    Sum values[Shape::kW];
#pragma unroll
    for (int kw = 0; kw < Shape::kW; ++kw) {
      const bool inside = row_inside && unsigned(w0 + kw) < unsigned(source.width);
      values[kw] = inside ? convert<Sum>(plane[offset + kw * step]) : Sum(0);
    }
    f(r, values);
  }
}

// The row of the strip that tap row kh multiplies with input row r; -1 if none.
template <typename Shape>
__host__ __device__ constexpr int strip_row(int r, int kh) {
  const int row = r - kh;
  return row >= 0 && row % Shape::kStride == 0 && row / Shape::kStride < kRows
             ? row / Shape::kStride
             : -1;
}

// What forward and backward-input tell the kernel. The turned weight is one with negative strides.
struct Pixels {
  Strips strips;
  Source source;
  int64_t channels;
  bool channels_fastest;
  int64_t weight_first, weight_channel, weight_row, weight_column;
  int64_t bias_stride;
  int64_t result_image, result_channel, result_row, result_column;
  int result_height;
};

template <typename Shape, typename T, bool kDense>
__host__ __device__ __forceinline__ void compute_pixels(const Pixels& p, const T* source,
                                                        const T* weight, const T* bias, T* result,
                                                        int64_t index) {
  using Sum = AccumulateType<T>;
  const bool fits_32 = p.strips.fits_32, channels_fastest = !kDense && p.channels_fastest;
  int64_t channel = 0, image = 0, rest = index;
  if (channels_fastest) {
    const Split s = split(rest, p.channels, fits_32);
    channel = s.remainder;
    rest = s.quotient;
  }
  const Split line = split(rest, p.strips.columns, fits_32);
  const Split plane = split(line.quotient, p.strips.strips, fits_32);
  image = plane.quotient;
  if (!channels_fastest) {
    const Split s = split(image, p.channels, fits_32);
    channel = s.remainder;
    image = s.quotient;
  }
  const int ow = line.remainder, oh = plane.remainder * kRows;

  Sum taps[Shape::kH][Shape::kW];
  const T* channel_weight = weight + p.weight_first + channel * p.weight_channel;
#pragma unroll
  for (int kh = 0; kh < Shape::kH; ++kh)
#pragma unroll
    for (int kw = 0; kw < Shape::kW; ++kw)
      taps[kh][kw] = convert<Sum>(channel_weight[kh * p.weight_row + kw * p.weight_column]);

  Sum sums[kRows] = {};
  const T* source_plane =
      source + image * p.source.image_stride + channel * p.source.channel_stride;
  walk_rows<Shape, kDense>(p.source, source_plane, oh, ow, p.result_height - oh,
                           [&](int r, const Sum(&values)[Shape::kW]) {
#pragma unroll
                             for (int kh = 0; kh < Shape::kH; ++kh) {
                               const int row = strip_row<Shape>(r, kh);
                               if (row < 0) continue;
#pragma unroll
                               for (int kw = 0; kw < Shape::kW; ++kw)
                                 sums[row] += taps[kh][kw] * values[kw];
                             }
                           });

  const Sum shift = bias ? convert<Sum>(bias[channel * p.bias_stride]) : Sum(0);
  T* place = result + image * p.result_image + channel * p.result_channel + oh * p.result_row +
             ow * p.result_column;
#pragma unroll
  for (int row = 0; row < kRows; ++row, place += p.result_row)
    if (oh + row < p.result_height) *place = convert<T>(bias ? sums[row] + shift : sums[row]);
}

// Grid: x the flat index of strips.
// At least 1 block a multiprocessor: ptxas then takes the registers that the loads in flight need
// instead of spilling to reach an occupancy; so in the other kernels.
template <typename Shape, typename T, bool kDense>
__global__ void __launch_bounds__(kThreads, 1)
    pixels_kernel(const __grid_constant__ Pixels p, const T* __restrict__ source,
                  const T* __restrict__ weight, const T* __restrict__ bias,
                  T* __restrict__ result) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < p.strips.count())
    compute_pixels<Shape, T, kDense>(p, source, weight, bias, result, index);
}

// Backward-weight. A chunk is a range of a channel's strips (of all images).
struct Taps {
  Strips strips;  // of one channel
  Source input;
  int64_t channels, chunks;
  int64_t grad_image, grad_channel, grad_row, grad_column;
  int grad_height;

  // The strips of a chunk are [first(chunk), first(chunk + 1)).
  __host__ __device__ int64_t first(int64_t chunk) const {
    // Not count · chunk / chunks: the product may exceed 64 bits for no gain.
    const int64_t each = (strips.count() + chunks - 1) / chunks;
    return chunk * each < strips.count() ? chunk * each : strips.count();
  }
};

// Adds the products of one strip. Rows past the last are left out, not multiplied by zero: an
// infinite input in reach of a strip's last output row must not make NaN.
template <typename Shape, typename T, bool kDense>
__host__ __device__ __forceinline__ void add_strip(
    const Taps& p, const T* input, const T* grad, int64_t channel, int64_t index,
    AccumulateType<T> (&sums)[Shape::kH][Shape::kW]) {
  using Sum = AccumulateType<T>;
  const Split line = split(index, p.strips.columns, p.strips.fits_32);
  const Split plane = split(line.quotient, p.strips.strips, p.strips.fits_32);
  const int ow = line.remainder, oh = plane.remainder * kRows;
  const int64_t image = plane.quotient;
  const int rows = p.grad_height - oh;

  Sum gradient[kRows];
  const T* place =
      grad + image * p.grad_image + channel * p.grad_channel + oh * p.grad_row + ow * p.grad_column;
#pragma unroll
  for (int row = 0; row < kRows; ++row, place += p.grad_row)
    gradient[row] = row < rows ? convert<Sum>(*place) : Sum(0);

  const T* input_plane = input + image * p.input.image_stride + channel * p.input.channel_stride;
  walk_rows<Shape, kDense>(p.input, input_plane, oh, ow, rows,
                           [&](int r, const Sum(&values)[Shape::kW]) {
#pragma unroll
                             for (int kh = 0; kh < Shape::kH; ++kh) {
                               const int row = strip_row<Shape>(r, kh);
                               if (row < 0) continue;
                               if (row < rows) {
#pragma unroll
                                 for (int kw = 0; kw < Shape::kW; ++kw)
                                   sums[kh][kw] += gradient[row] * values[kw];
                               }
                             }
                           });
}

// Partial sums lie [channel][tap][chunk]. Grid: x channel · chunks + chunk; lanes along W.
template <typename Shape, typename T, bool kDense>
__global__ void __launch_bounds__(kThreads, 1)
    taps_kernel(const __grid_constant__ Taps p, const T* __restrict__ input,
                const T* __restrict__ grad, AccumulateType<T>* __restrict__ partial) {
  using Sum = AccumulateType<T>;
  __shared__ Sum shared[kWarps][Shape::kTaps];
  const int64_t channel = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const int64_t end = p.first(chunk + 1);
  Sum sums[Shape::kH][Shape::kW] = {};
  for (int64_t index = p.first(chunk) + threadIdx.x; index < end; index += kThreads)
    add_strip<Shape, T, kDense>(p, input, grad, channel, index, sums);

#pragma unroll
  for (int tap = 0; tap < Shape::kTaps; ++tap) {
    Sum sum = sums[tap / Shape::kW][tap % Shape::kW];
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp][tap] = sum;
  }
  __syncthreads();
  static_assert(Shape::kTaps <= kThreads);
  if (threadIdx.x >= Shape::kTaps) return;
  Sum sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp][threadIdx.x];
  partial[(channel * Shape::kTaps + threadIdx.x) * p.chunks + chunk] = sum;
}

// The same with a lane a channel, for tensors whose channels are dense: a warp has a chunk of 32
// channels to itself, so nothing is left to add in the block. Grid: x tiles of channels · blocks.
template <typename Shape, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    taps_channels_kernel(const __grid_constant__ Taps p, const T* __restrict__ input,
                         const T* __restrict__ grad, AccumulateType<T>* __restrict__ partial) {
  using Sum = AccumulateType<T>;
  const int64_t tiles = (p.channels + kWarp - 1) / kWarp;
  const int64_t channel = blockIdx.x % tiles * kWarp + threadIdx.x % kWarp;
  const int64_t chunk = blockIdx.x / tiles * kWarps + threadIdx.x / kWarp;
  if (channel >= p.channels || chunk >= p.chunks) return;
  const int64_t end = p.first(chunk + 1);
  Sum sums[Shape::kH][Shape::kW] = {};
  for (int64_t index = p.first(chunk); index < end; ++index)
    add_strip<Shape, T, false>(p, input, grad, channel, index, sums);
#pragma unroll
  for (int tap = 0; tap < Shape::kTaps; ++tap)
    partial[(channel * Shape::kTaps + tap) * p.chunks + chunk] =
        sums[tap / Shape::kW][tap % Shape::kW];
}

// Adds the chunks, a warp an element, in an order that depends on their number only; rounds once.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Tensor4 weight,
                  const AccumulateType<T>* __restrict__ partial, int64_t chunks,
                  T* __restrict__ result) {
  const int64_t element = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (element >= weight.numel()) return;
  AccumulateType<T> sum = 0;
  for (int64_t chunk = threadIdx.x % kWarp; chunk < chunks; chunk += kWarp)
    sum += partial[element * chunks + chunk];
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
  if (threadIdx.x % kWarp != 0) return;
  const int64_t kw = element % weight.size[3], line = element / weight.size[3];
  const int64_t kh = line % weight.size[2], channel = line / weight.size[2];
  result[channel * weight.stride[0] + kh * weight.stride[2] + kw * weight.stride[3]] =
      convert<T>(sum);
}

// Whether lanes along channels coalesce better than lanes along W.
bool channels_dense(const Tensor4& t) {
  return t.stride[1] == 1 && t.stride[3] != 1 && t.size[1] > 1;
}

int64_t chunk_bytes(const ConvProblem& p) {
  return p.weight.numel() * (p.dtype == DType::kFloat64 ? 8 : 4);
}

int64_t wanted_chunks(const ConvProblem& p, const Device& device) {
  // Several blocks a multiprocessor; and no thread adds more strips than this one after the other,
  // which bounds the rounding error of large images.
  constexpr int64_t kBlocksPerProcessor = 8, kStripsPerThread = 64;
  const int64_t strips = Strips(p.output.size[2], p.output.size[3], p.batch()).count();
  const int64_t blocks = kBlocksPerProcessor * device.processors;
  // Warps a channel, and threads of a chunk that share a channel.
  const bool channels = channels_dense(p.input);
  const int64_t tiles = channels ? ceil_divide(p.in_channels(), kWarp) : p.in_channels();
  const int64_t threads = channels ? 1 : kThreads;
  const int64_t fill = blocks * (channels ? kWarps : 1) / std::max<int64_t>(1, tiles);
  const int64_t chunks = std::max(fill, ceil_divide(strips, threads * kStripsPerThread));
  return std::max<int64_t>(1, std::min(chunks, ceil_divide(strips, threads)));
}

template <typename Shape, typename T>
void launch_pixels(const ConvProblem& p, const Operands& operands, cudaStream_t stream) {
  const bool input = p.direction == Direction::kBackwardInput;
  const Tensor4& from = input ? p.output : p.input;
  const Tensor4& to = input ? p.input : p.output;
  const Tensor4& w = p.weight;
  const Pixels pixels{
      .strips = Strips(to.size[2], to.size[3], to.size[0] * to.size[1]),
      .source = Source(from, input ? Shape::kH - 1 - p.padding.h : p.padding.h,
                       input ? Shape::kW - 1 - p.padding.w : p.padding.w),
      .channels = p.in_channels(),
      .channels_fastest = channels_dense(from),
      .weight_first =
          input ? (Shape::kH - 1) * w.stride[2] + (Shape::kW - 1) * w.stride[3] : int64_t{0},
      .weight_channel = w.stride[0],
      .weight_row = input ? -w.stride[2] : w.stride[2],
      .weight_column = input ? -w.stride[3] : w.stride[3],
      .bias_stride = p.bias_stride,
      .result_image = to.stride[0],
      .result_channel = to.stride[1],
      .result_row = to.stride[2],
      .result_column = to.stride[3],
      .result_height = int(to.size[2])};
  const auto source = static_cast<const T*>(input ? operands.output : operands.input);
  const auto weight = static_cast<const T*>(operands.weight);
  const auto bias = static_cast<const T*>(operands.bias);
  const auto result = static_cast<T*>(input ? operands.input : operands.output);
  const auto blocks = unsigned(ceil_divide(pixels.strips.count(), kThreads));
  if (from.stride[3] == 1)
    pixels_kernel<Shape, T, true>
        <<<blocks, kThreads, 0, stream>>>(pixels, source, weight, bias, result);
  else
    pixels_kernel<Shape, T, false>
        <<<blocks, kThreads, 0, stream>>>(pixels, source, weight, bias, result);
  CONVOPS_LAUNCH_CHECK("depthwise");
}

template <typename Shape, typename T>
void launch_taps(const ConvProblem& p, const Operands& operands, const Execution& execution,
                 cudaStream_t stream) {
  // Fewer chunks where the workspace is short.
  const int64_t affordable = execution.workspace_bytes / chunk_bytes(p);
  const Taps taps{
      .strips = Strips(p.output.size[2], p.output.size[3], p.batch()),
      .input = Source(p.input, p.padding.h, p.padding.w),
      .channels = p.in_channels(),
      .chunks = std::max<int64_t>(1, std::min(wanted_chunks(p, *execution.device), affordable)),
      .grad_image = p.output.stride[0],
      .grad_channel = p.output.stride[1],
      .grad_row = p.output.stride[2],
      .grad_column = p.output.stride[3],
      .grad_height = int(p.output.size[2])};
  const auto input = static_cast<const T*>(operands.input);
  const auto grad = static_cast<const T*>(operands.output);
  const auto partial = static_cast<AccumulateType<T>*>(execution.workspace);
  if (channels_dense(p.input)) {
    const int64_t blocks = ceil_divide(taps.channels, kWarp) * ceil_divide(taps.chunks, kWarps);
    taps_channels_kernel<Shape, T>
        <<<unsigned(blocks), kThreads, 0, stream>>>(taps, input, grad, partial);
  } else {
    const auto blocks = unsigned(taps.channels * taps.chunks);
    if (p.input.stride[3] == 1)
      taps_kernel<Shape, T, true><<<blocks, kThreads, 0, stream>>>(taps, input, grad, partial);
    else
      taps_kernel<Shape, T, false><<<blocks, kThreads, 0, stream>>>(taps, input, grad, partial);
  }
  CONVOPS_LAUNCH_CHECK("depthwise backward-weight");
  reduce_kernel<T><<<unsigned(ceil_divide(p.weight.numel(), kWarps)), kThreads, 0, stream>>>(
      p.weight, partial, taps.chunks, static_cast<T*>(operands.weight));
  CONVOPS_LAUNCH_CHECK("depthwise backward-weight reduction");
}

class Depthwise final : public Algorithm {
 public:
  std::string name() const override { return "depthwise"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (!p.is_depthwise()) return "not depthwise";
    if (p.group_out_channels() != 1)
      return "channel multiplier " + std::to_string(p.group_out_channels());
    const Pair kernel = p.kernel();
    if ((p.dilation.h > 1 && kernel.h > 1) || (p.dilation.w > 1 && kernel.w > 1)) return "dilated";
    if (!with_shape(p, [](auto) {}, AllShapes{}))
      return "no kernel of " + std::to_string(kernel.h) + 'x' + std::to_string(kernel.w) +
             ", stride " + std::to_string(p.stride.h) + 'x' + std::to_string(p.stride.w) +
             " is compiled";
    if (p.dtype == DType::kFloat64 && kernel.h * kernel.w == 49)
      return "no float64 kernel of 7x7 is compiled";
    if (p.direction == Direction::kBackwardInput && p.stride.h > 1)
      return "backward-input with a stride";
    for (const Pair side : {p.input_size(), p.output_size(), p.padding})
      if (std::max(side.h, side.w) > kMaxSide) return "a side or padding of more than 2^29";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Shares of the two peaks that streaming and the loads from L1 allow; float64 runs at half
    // rate.
    constexpr double kBandwidthFraction = 0.6, kFlopsFraction = 0.15, kLaunchSeconds = 4e-6;
    double rate = device.fp32_flops * kFlopsFraction;
    if (p.dtype == DType::kFloat64) rate /= 2;
    return std::max(p.bytes() / (device.bandwidth * kBandwidthFraction), p.flops() / rate) +
           kLaunchSeconds;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    if (p.direction != Direction::kBackwardWeight) return {0, 0};
    return {chunk_bytes(p), wanted_chunks(p, device) * chunk_bytes(p)};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const auto stream = static_cast<cudaStream_t>(execution.stream);
    dispatch(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      const auto launch = [&](auto shape) {
        using S = decltype(shape);
        if constexpr (kIsCompiled<S, T>) {
          if (p.direction == Direction::kBackwardWeight)
            launch_taps<S, T>(p, operands, execution, stream);
          else
            launch_pixels<S, T>(p, operands, stream);
        }
      };
      with_shape(p, launch, AllShapes{});
    });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_depthwise() { return std::make_unique<Depthwise>(); }

}  // namespace convops::cuda

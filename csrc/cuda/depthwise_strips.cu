// Depthwise convolution with channel multiplier 1, forward and backward-input, for what pays least
// for shared memory: small planes and batches, strides, float64, tensors of any strides. Each
// thread reuses what it loads from registers; neighbours' overlaps meet in L1. float32 is IEEE
// whatever the precision asked for.
//
// A thread owns one column and kRows consecutive rows of outputs (a strip) of one plane. It walks
// the input rows under the strip once, loads the kernel's width of neighbours of each, and adds
// their products to all the sums they belong to. Backward-input is the same kernel on grad_output
// with the weight turned by 180 degrees.
//
// Lanes lie along W, so loads are coalesced; where the channels are the dense dimension
// (channels_last) lanes lie along them. Column, strip, channel and image are one flat index, so the
// lanes of small planes do not idle.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/definition.cuh"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

// 14 of 64 rows loaded twice for 7×7, 2 for 3×3; more rows a thread leave small planes fewer
// threads than the chip has places for.
constexpr int kRows = 8;
constexpr int kThreads = 128;
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
  ConvProblem problem;
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
__device__ __forceinline__ void compute_pixels(const Pixels& p, const T* source, const T* weight,
                                               const T* bias, T* result, int64_t index) {
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
  T* const place = result + image * p.result_image + channel * p.result_channel +
                   oh * p.result_row + ow * p.result_column;
  unsigned nans = 0;  // a bit a row
#pragma unroll
  for (int row = 0; row < kRows; ++row)
    if (oh + row < p.result_height) {
      place[row * p.result_row] = convert<T>(bias ? sums[row] + shift : sums[row]);
      nans |= unsigned(sums[row] != sums[row]) << row;
    }
  if constexpr (Shape::kStride == 1) {  // the others are forward alone
    if (p.problem.direction != Direction::kBackwardInput) return;
    for (int row = 0; nans >> row != 0; ++row)
      if (nans >> row & 1)
        place[row * p.result_row] = convert<T>(
            backward_input_element(p.problem, source, weight, image, channel, oh + row, ow));
  }
}

// Grid: x the flat index of strips.
// At least 1 block a multiprocessor: ptxas then takes the registers that the loads in flight need
// instead of spilling to reach an occupancy.
template <typename Shape, typename T, bool kDense>
__global__ void __launch_bounds__(kThreads, 1)
    pixels_kernel(const __grid_constant__ Pixels p, const T* __restrict__ source,
                  const T* __restrict__ weight, const T* __restrict__ bias,
                  T* __restrict__ result) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < p.strips.count())
    compute_pixels<Shape, T, kDense>(p, source, weight, bias, result, index);
}

// Whether lanes along channels coalesce better than lanes along W.
bool channels_dense(const Tensor4& t) {
  return t.stride[1] == 1 && t.stride[3] != 1 && t.size[1] > 1;
}

template <typename Shape, typename T>
void launch_pixels(const ConvProblem& p, const Operands& operands, cudaStream_t stream) {
  const bool input = p.direction == Direction::kBackwardInput;
  const Tensor4& from = input ? p.output : p.input;
  const Tensor4& to = input ? p.input : p.output;
  const Tensor4& w = p.weight;
  const Pixels pixels{
      .problem = p,
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
  CONVOPS_LAUNCH_CHECK("depthwise_strips");
}

class DepthwiseStrips final : public Algorithm {
 public:
  std::string name() const override { return "depthwise_strips"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (p.direction == Direction::kBackwardWeight) return "backward-weight";
    if (!p.is_depthwise()) return "not depthwise";
    if (p.group_out_channels() != 1)
      return "channel multiplier " + std::to_string(p.group_out_channels());
    const Pair kernel = p.kernel();
    if (p.is_dilated()) return "dilated";
    if (!with_shape(p, [](auto) {}, AllShapes{}))
      return "no kernel of " + window_text(p) + " is compiled";
    if (p.dtype == DType::kFloat64 && kernel.h * kernel.w == 49)
      return "no float64 kernel of 7x7 is compiled";
    if (p.direction == Direction::kBackwardInput && p.stride.h > 1)
      return "backward-input with a stride";
    for (const Pair side : {p.input_size(), p.output_size(), p.padding})
      if (std::max(side.h, side.w) > kMaxSide) return "a side or padding of more than 2^29";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted to an H200: shares of the two peaks, and a thread's loads one after the other where
    // too few others hide them. 16-bit elements cost by their loads, which are converted: each its
    // issue and that of its kH products. Lanes along channels share no loads, at a stride they read
    // far apart, float64 runs at half rate: so many times as slow.
    constexpr double kBandwidthFraction = 0.65, kAcrossBandwidthFraction = 0.55;
    constexpr double kFlopsFraction = 0.134, kSlower = 1.7;
    constexpr double kHalfIssueFlops = 39, kHalfProductFlops = 12;
    constexpr double kLoadSeconds = 8.7e-9, kHalfLoadSeconds = 50e-9, kLaunchSeconds = 5e-6;
    // A tap's weight and code, before the first product; of channels side by side, weights are
    // apart.
    constexpr double kTapSeconds = 12e-9, kAcrossTapSeconds = 45e-9;
    const bool half = element_size(p.dtype) == 2;
    const bool across = channels_dense(p.input);
    const double share = across ? kAcrossBandwidthFraction : kBandwidthFraction;
    double slower = across ? kSlower : 1;
    if (p.stride.w > 1) slower *= kSlower;
    const Tensor4& result = p.result();
    const int64_t strips = std::max<int64_t>(1, ceil_divide(result.size[2], kRows));
    // Of a column: those of its strips' rows that are inside of the plane.
    const bool backward = p.direction == Direction::kBackwardInput;
    const int64_t padding = backward ? p.kernel().h - 1 - p.padding.h : p.padding.h;
    const int64_t rows =
        (result.size[2] - strips) * p.stride.h + strips * p.kernel().h - 2 * padding;
    const double loads = double(std::max(rows, strips) * p.kernel().w);
    const double chain = loads / double(strips) * (half ? kHalfLoadSeconds : kLoadSeconds) * slower;
    const double columns = double(result.size[0] * result.size[1] * result.size[3]);
    const double each = kHalfIssueFlops + double(p.kernel().h) * kHalfProductFlops;
    if (p.dtype == DType::kFloat64) slower *= kSlower;
    const double work = slower * (half ? columns * loads * each : p.flops() / kFlopsFraction);
    // Where a plane ends within strips.
    const double idle = double(strips * kRows) / double(std::max<int64_t>(1, result.size[2]));
    const double start = double(p.taps()) * (across ? kAcrossTapSeconds : kTapSeconds);
    return kLaunchSeconds + start + chain +
           std::max(work / device.fp32_flops, p.bytes() * idle / (device.bandwidth * share));
  }

  WorkspaceRange workspace(const ConvProblem&, const Device&) const override { return {0, 0}; }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const auto stream = static_cast<cudaStream_t>(execution.stream);
    dispatch(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      const auto launch = [&](auto shape) {
        using S = decltype(shape);
        if constexpr (kIsCompiled<S, T>) launch_pixels<S, T>(p, operands, stream);
      };
      with_shape(p, launch, AllShapes{});
    });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_depthwise_strips() { return std::make_unique<DepthwiseStrips>(); }

}  // namespace convops::cuda

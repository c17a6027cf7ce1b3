// Depthwise convolution of small planes of float32 (NCHW, up to 28×28 results or so), forward at
// strides 1 and 2 and backward-input at stride 1. Such a layer is over in 20 to 40 µs, so a block
// must soon have its bytes under way and waste no instruction on where they lie:
//
//   copy      A block takes several whole planes by cp.async. In shared memory they lie one below
//             the other with zero rows between them, each row behind zero columns: what is to the
//             right of a row is what is to the left of the next. No sum asks where it is.
//   products  A thread has 7 rows × 2 columns of results: 7 divides 28, 14 and 7. It walks down the
//             rows under them with the weights and the sums in registers. Lanes read vectors as far
//             apart as they are long, and a row's lanes fill groups of eight: no bank is met twice.
//   stores    By way of shared memory: the planes' results are one stretch of memory, stored by
//             whole vectors whatever the length of a row.
//
// float32 is IEEE whatever the precision asked for.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/definition.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

constexpr int kWarp = 32, kMaxThreads = 128;
// So many blocks at least a multiprocessor before a block takes several planes.
constexpr int kBlocksPerProcessor = 2;
constexpr int64_t kMaxSharedBytes = 46 * 1024;  // without asking for more
constexpr int kVector = 4;                      // floats of 16 bytes

template <int kSide_, int kStride_>
struct Shape {
  static constexpr int kSide = kSide_, kStride = kStride_, kTaps = kSide * kSide;
  static constexpr int kPadding = kSide / 2;
  static constexpr int kTapsInShared = (kTaps + kVector - 1) / kVector * kVector;
  static constexpr int kRows = 7, kColumns = 2;     // results of a thread
  static constexpr int kStep = kColumns * kStride;  // floats from lane to lane, read at once
  static constexpr int kWindowRows = (kRows - 1) * kStride + kSide;
  // Columns read before the one that the thread's first result lies over; columns read in all.
  static constexpr int kBefore = (kPadding + kStep - 1) / kStep * kStep;
  static constexpr int kReads =
      (kBefore + (kColumns - 1) * kStride + kSide - kPadding + kStep - 1) / kStep;
  // Registers for the weights, the sums and a row of the window.
  static constexpr int kMinBlocks = kTaps > 25 ? 4 : kTaps > 9 ? 7 : 8;
};
template <typename... Shapes>
struct ShapeList {};
// The kernels that are compiled.
using AllShapes =
    ShapeList<Shape<3, 1>, Shape<5, 1>, Shape<7, 1>, Shape<3, 2>, Shape<5, 2>, Shape<7, 2>>;

bool is_backward(const ConvProblem& p) { return p.direction == Direction::kBackwardInput; }
const Tensor4& source(const ConvProblem& p) { return is_backward(p) ? p.output : p.input; }

// Calls f with the shape of the problem; false if it is not compiled.
template <typename F, typename... Shapes>
bool with_shape(const ConvProblem& p, F&& f, ShapeList<Shapes...>) {
  const Tensor4 &from = source(p), &to = p.result();
  const auto matches = [&](auto shape) {
    // Behind the last element there may be less padding than before the first, but not more.
    const auto reaches = [&](int d) {
      return (to.size[d] - 1) * shape.kStride + shape.kSide - shape.kPadding <=
             from.size[d] + shape.kPadding;
    };
    return p.kernel().h == shape.kSide && p.kernel().w == shape.kSide &&
           p.stride.h == shape.kStride && p.stride.w == shape.kStride &&
           p.padding.h == shape.kPadding && p.padding.w == shape.kPadding && reaches(2) &&
           reaches(3);
  };
  return ((matches(Shapes{}) && (f(Shapes{}), true)) || ...);
}

// The planes of all images and channels; at even steps, or the algorithm does not run.
struct Planes {
  int height, width;
  int row_step, plane_step;

  explicit Planes(const Tensor4& t)
      : height(int(t.size[2])),
        width(int(t.size[3])),
        row_step(int(t.stride[2])),
        plane_step(int(t.size[1] > 1 ? t.stride[1] : t.stride[0])) {}
};

// A block's share.
struct Tile {
  int planes, threads, shared_bytes;
  int copied;             // floats at a time: 1, 2 or 4
  int gap, pitch;         // zeros before a row's elements; floats from row to row
  int plane_rows;         // with the zero rows above
  int copied_rows;        // at once by all threads
  Divisor chunks;         // copies of a row
  Divisor lanes, strips;  // threads along a row of results and along rows
  bool vectors;           // results are stored by
};

struct Parameters {
  ConvProblem problem;
  Planes from, to;
  Tile tile;
  int planes, padding;
  Divisor channels;
  int64_t weight_step;
};

// Brings a block's planes to shared memory, zeros around them. Behind the last one are its zero
// rows and a row of which only the gap is needed.
template <int kFloats>
__device__ __forceinline__ void copy_planes(const Parameters& p, const float* from, int planes,
                                            float* shared) {
  const Tile& tile = p.tile;
  const int first_row = tile.chunks.quotient(threadIdx.x);
  if (first_row >= tile.copied_rows) return;
  const int place = tile.chunks.remainder(threadIdx.x) * kFloats, column = place - tile.gap;
  const int plane_bytes = tile.plane_rows * tile.pitch * int(sizeof(float));
#pragma unroll 1
  for (int row = first_row; row < tile.plane_rows; row += tile.copied_rows) {
    const int h = row - p.padding;
    const bool inside = h >= 0 && unsigned(column) < unsigned(p.from.width);
    const float* source = from + int64_t(h) * p.from.row_step + column;
    auto target = uint32_t(__cvta_generic_to_shared(shared + row * tile.pitch + place));
#pragma unroll 4
    for (int plane = 0; plane < planes; ++plane) {
      ptx::copy_bytes_or_zeros<int(kFloats * sizeof(float))>(target, source, inside);
      source += p.from.plane_step;
      target += plane_bytes;
    }
    if (row <= p.padding)
      ptx::copy_bytes_or_zeros<int(kFloats * sizeof(float))>(target, from, false);
  }
}

template <int kCount>
struct alignas(kCount * sizeof(float)) Vector {
  float values[kCount];
};

template <typename Shape>
__device__ __forceinline__ void add_products(const float* window, int pitch, const float* filter,
                                             float (&sums)[Shape::kRows][Shape::kColumns]) {
  float taps[Shape::kTapsInShared];
#pragma unroll
  for (int i = 0; i < Shape::kTapsInShared; i += kVector)
    *reinterpret_cast<Vector<kVector>*>(taps + i) =
        *reinterpret_cast<const Vector<kVector>*>(filter + i);
#pragma unroll
  for (int r = 0; r < Shape::kWindowRows; ++r, window += pitch) {
    Vector<Shape::kStep> read[Shape::kReads];
#pragma unroll
    for (int i = 0; i < Shape::kReads; ++i)
      read[i] = reinterpret_cast<const Vector<Shape::kStep>*>(window)[i];
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
      const int kh = r - row * Shape::kStride;
      if (kh < 0 || kh >= Shape::kSide) continue;
#pragma unroll
      for (int kw = 0; kw < Shape::kSide; ++kw)
#pragma unroll
        for (int column = 0; column < Shape::kColumns; ++column) {
          const int i = Shape::kBefore - Shape::kPadding + column * Shape::kStride + kw;
          sums[row][column] +=
              taps[kh * Shape::kSide + kw] * read[i / Shape::kStep].values[i % Shape::kStep];
        }
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(kMaxThreads, Shape::kMinBlocks)
    planes_kernel(const __grid_constant__ Parameters p, const float* __restrict__ from,
                  const float* __restrict__ weight, const float* __restrict__ bias,
                  float* __restrict__ to) {
  extern __shared__ __align__(16) float shared[];
  const Tile& tile = p.tile;
  float* const filters = shared;
  float* const windows = shared + tile.planes * Shape::kTapsInShared;
  const bool backward = p.problem.direction == Direction::kBackwardInput;
  const int first = blockIdx.x * tile.planes, count = min(tile.planes, p.planes - first);
  const float* const planes = from + int64_t(first) * p.from.plane_step;
  switch (tile.copied) {
    case 4:
      copy_planes<4>(p, planes, count, windows);
      break;
    case 2:
      copy_planes<2>(p, planes, count, windows);
      break;
    default:
      copy_planes<1>(p, planes, count, windows);
  }
  for (int i = threadIdx.x; i < count * Shape::kTaps; i += blockDim.x) {
    const int plane = i / Shape::kTaps, tap = i % Shape::kTaps;
    const int turned = backward ? Shape::kTaps - 1 - tap : tap;
    const float* const place = filters + plane * Shape::kTapsInShared + turned;
    ptx::copy_bytes<sizeof(float)>(
        uint32_t(__cvta_generic_to_shared(place)),
        weight + p.channels.remainder(first + plane) * p.weight_step + tap);
  }
  ptx::copy_commit();

  const int rest = tile.lanes.quotient(threadIdx.x), lane = tile.lanes.remainder(threadIdx.x);
  const int plane = tile.strips.quotient(rest), strip = tile.strips.remainder(rest);
  const bool works = plane < count;
  const int image = p.channels.quotient(first + plane);
  const int channel = p.channels.remainder(first + plane);
  const float shift = bias && works ? bias[channel * p.problem.bias_stride] : 0.f;
  float sums[Shape::kRows][Shape::kColumns] = {};
  ptx::copy_wait<0>();
  __syncthreads();
  if (works)
    add_products<Shape>(
        windows + (plane * tile.plane_rows + strip * Shape::kRows * Shape::kStride) * tile.pitch +
            tile.gap + lane * Shape::kStep - Shape::kBefore,
        tile.pitch, filters + plane * Shape::kTapsInShared, sums);
  __syncthreads();

  const int height = p.to.height, width = p.to.width;
  const int row0 = strip * Shape::kRows, column0 = lane * Shape::kColumns;
  float* const staged = windows;
  if (works) {
    float* const place = staged + (plane * height + row0) * width + column0;
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row)
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column)
        if (row0 + row < height && column0 + column < width)
          place[row * width + column] = sums[row][column] + shift;
    // The zeros around grad_output are not part of it: an infinite weight makes NaN of them.
    unsigned nans = 0;  // a bit a result
    if (backward)
#pragma unroll
      for (int i = 0; i < Shape::kRows * Shape::kColumns; ++i)
        nans |= unsigned(isnan(sums[i / Shape::kColumns][i % Shape::kColumns])) << i;
    for (int i = 0; nans >> i != 0; ++i) {
      const int row = i / Shape::kColumns, column = i % Shape::kColumns;
      if ((nans >> i & 1) && row0 + row < height && column0 + column < width)
        place[row * width + column] = backward_input_element(p.problem, from, weight, image,
                                                             channel, row0 + row, column0 + column);
    }
  }
  __syncthreads();
  to += int64_t(first) * p.to.plane_step;
  const int total = count * height * width, vectors = tile.vectors ? total / kVector : 0;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x)
    reinterpret_cast<float4*>(to)[i] = reinterpret_cast<const float4*>(staged)[i];
  for (int i = vectors * kVector + threadIdx.x; i < total; i += blockDim.x) to[i] = staged[i];
}

// Whether rows can be copied by so many floats at once.
bool is_aligned(const Planes& planes, const void* data, int floats) {
  return planes.width % floats == 0 && planes.row_step % floats == 0 &&
         planes.plane_step % floats == 0 &&
         reinterpret_cast<uintptr_t>(data) % (floats * sizeof(float)) == 0;
}

// Lanes of a row such that eight of them, which read 128 bytes, are of one row: groups of eight, or
// so many as divide eight.
int whole_lanes(int64_t lanes) {
  if (lanes > 4) return int(round_up(lanes, 8));
  return lanes == 3 ? 4 : int(lanes);
}

template <typename Shape>
Tile make_tile(const ConvProblem& p, const void* data, const void* result, int processors) {
  const Planes from(source(p)), to(p.result());
  const int64_t planes = p.result().size[0] * p.result().size[1];
  Tile tile{};
  tile.copied = is_aligned(from, data, 4) ? 4 : is_aligned(from, data, 2) ? 2 : 1;
  const int unit = std::max(tile.copied, Shape::kStep);
  tile.gap = int(round_up(Shape::kPadding, unit));
  tile.pitch = int(round_up(tile.gap + from.width, unit));
  tile.plane_rows = from.height + Shape::kPadding;
  tile.chunks = Divisor(tile.pitch / tile.copied);
  const int lanes = whole_lanes(ceil_divide(to.width, Shape::kColumns));
  const int strips = int(ceil_divide(to.height, Shape::kRows));
  tile.lanes = Divisor(lanes);
  tile.strips = Divisor(strips);
  const int64_t most = std::min<int64_t>(kMaxThreads / (lanes * strips),
                                         planes / (kBlocksPerProcessor * processors));
  tile.planes = int(std::max<int64_t>(1, most));
  const int area = to.height * to.width;
  if (tile.planes > kVector) tile.planes = tile.planes / kVector * kVector;
  tile.vectors = tile.planes * area % kVector == 0 && reinterpret_cast<uintptr_t>(result) % 16 == 0;
  const int least = int(tile.chunks.value);  // copies of a row
  tile.threads = int(round_up(std::max(tile.planes * lanes * strips, least), kWarp));
  tile.copied_rows = int(tile.threads / tile.chunks.value);

  const int64_t last_plane = int64_t(tile.planes - 1) * tile.plane_rows;
  const int64_t filled = (last_plane + tile.plane_rows + Shape::kPadding + 1) * tile.pitch;
  const int64_t last_row =
      last_plane + (strips - 1) * Shape::kRows * Shape::kStride + Shape::kWindowRows - 1;
  const int64_t read = last_row * tile.pitch + tile.gap - Shape::kBefore +
                       (lanes - 1 + Shape::kReads) * Shape::kStep;
  const int64_t floats = tile.planes * int64_t(Shape::kTapsInShared) +
                         std::max({filled, read, int64_t(tile.planes) * area});
  tile.shared_bytes = int(std::min<int64_t>(floats * sizeof(float), INT32_MAX));
  return tile;
}

class DepthwisePlanes final : public Algorithm {
 public:
  std::string name() const override { return "depthwise_planes"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (p.direction == Direction::kBackwardWeight) return "backward-weight";
    if (!p.is_depthwise()) return "not depthwise";
    if (p.dtype != DType::kFloat32) return "not float32";
    if (p.group_out_channels() != 1)
      return "channel multiplier " + std::to_string(p.group_out_channels());
    if (p.is_dilated()) return "dilated";
    if (is_backward(p) && p.stride.h > 1) return "backward-input with a stride";
    if (!with_shape(p, [](auto) {}, AllShapes{}))
      return "no kernel of " + window_text(p) + " with that padding is compiled";
    const Tensor4 &from = source(p), &to = p.result(), &weight = p.weight;
    if (!from.has_dense_columns() ||
        (from.size[0] > 1 && from.size[1] > 1 && from.stride[0] != from.size[1] * from.stride[1]))
      return "planes at uneven steps";
    if (std::max({from.stride[0], from.stride[1], from.stride[2]}) > INT32_MAX)
      return "a stride of more than 2^31";
    if (!to.is_contiguous()) return "a result with gaps";
    if (weight.stride[3] != 1 || weight.stride[2] != weight.size[3]) return "weights with gaps";
    if (to.size[0] * to.size[1] > INT32_MAX) return "more than 2^31 planes";
    const std::string large = "planes of " + std::to_string(to.size[2]) + 'x' +
                              std::to_string(to.size[3]) + " results are too large";
    // No plane of a longer side fits, and int holds what is made of these.
    constexpr int64_t kMostSide = kMaxThreads * 7;
    if (std::max({from.size[2], from.size[3], to.size[2], to.size[3]}) > kMostSide) return large;
    bool fits = false;
    with_shape(
        p,
        [&](auto shape) {
          const Tile tile = make_tile<decltype(shape)>(p, nullptr, nullptr, device.processors);
          // Where the data is not aligned, a thread copies one element of a row.
          fits = tile.threads <= kMaxThreads && tile.pitch <= kMaxThreads &&
                 tile.shared_bytes <= kMaxSharedBytes;
        },
        AllShapes{});
    return fits ? "" : large;
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted to an H200. Copies, sums and stores of a block follow one another: their times add up,
    // and so does what comes before the first sum, all of a plane and the code of the taps.
    constexpr double kBandwidthFraction = 0.8, kFlopsFraction = 0.7, kLaunchSeconds = 5.2e-6;
    constexpr double kTapSeconds = 28e-9, kElementSeconds = 0.35e-9;
    const double plane = double(source(p).size[2] * source(p).size[3]);
    return p.bytes() / (device.bandwidth * kBandwidthFraction) +
           p.flops() / (device.fp32_flops * kFlopsFraction) + kLaunchSeconds +
           double(p.taps()) * kTapSeconds + plane * kElementSeconds;
  }

  WorkspaceRange workspace(const ConvProblem&, const Device&) const override { return {0, 0}; }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const bool backward = is_backward(p);
    const void* const from = backward ? operands.output : operands.input;
    void* const to = backward ? operands.input : operands.output;
    with_shape(
        p,
        [&](auto shape) {
          using S = decltype(shape);
          const Tile tile = make_tile<S>(p, from, to, execution.device->processors);
          const int64_t planes = p.result().size[0] * p.result().size[1];
          const Parameters parameters{.problem = p,
                                      .from = Planes(source(p)),
                                      .to = Planes(p.result()),
                                      .tile = tile,
                                      .planes = int(planes),
                                      .padding = S::kPadding,
                                      .channels = Divisor(p.in_channels()),
                                      .weight_step = p.weight.stride[0]};
          planes_kernel<S><<<unsigned(ceil_divide(planes, tile.planes)), tile.threads,
                             tile.shared_bytes, static_cast<cudaStream_t>(execution.stream)>>>(
              parameters, static_cast<const float*>(from),
              static_cast<const float*>(operands.weight), static_cast<const float*>(operands.bias),
              static_cast<float*>(to));
          CONVOPS_LAUNCH_CHECK("depthwise_planes");
        },
        AllShapes{});
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_depthwise_planes() { return std::make_unique<DepthwisePlanes>(); }

}  // namespace convops::cuda

// Depthwise convolution, forward and backward-input, of tensors whose columns are dense (NCHW):
// every channel is a plane of its own, too thin for a GEMM. Bound by memory, so each block reads a
// tile of one plane (or several small planes) with its halo once, into shared memory, and stores
// whole sectors. float32 is IEEE whatever the precision asked for.
//
//   depthwise_tile.cuh     the tile: what a block reads, and how
//   depthwise_fixed.cuh    common kernels: taps known at compile time
//   depthwise_generic.cuh  all others: any size, stride and dilation
//
// Backward-input at stride 1 is the forward kernel on grad_output with the weight turned by 180
// degrees; at a stride only the taps that meet an element are multiplied, never inserted zeros.
// With a channel multiplier m, forward reads plane c / m and backward-input sums over m planes.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/depthwise_fixed.cuh"
#include "cuda/depthwise_generic.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

using namespace depthwise;

// Coordinates are int: a side times the stride plus a kernel must fit.
constexpr int64_t kMaxSide = int64_t{1} << 24, kMaxStep = 4096;
// So many blocks at least before a block takes several planes.
constexpr int kBlocksPerProcessor = 8;

template <typename... Shapes>
struct ShapeList {};
// The kernels that are compiled; where a window of aligned copies or the phase of cells is known at
// compile time (padding that keeps the size), it comes first.
using AllShapes =
    ShapeList<Shape<3, 3, 1, false, 3>, Shape<5, 5, 1, false, 2>, Shape<7, 7, 1, false, 1>,
              Shape<3, 3, 2, false, 3>, Shape<5, 5, 2, false, 2>, Shape<3, 3, 1>, Shape<5, 5, 1>,
              Shape<7, 7, 1>, Shape<3, 1, 1>, Shape<1, 3, 1>, Shape<3, 7, 1>, Shape<7, 3, 1>,
              Shape<3, 3, 2>, Shape<5, 5, 2>, Shape<7, 7, 2>, Shape<3, 3, 2, true, -1, 1>,
              Shape<3, 3, 2, true>, Shape<5, 5, 2, true>, Shape<7, 7, 2, true>>;

bool is_backward(const ConvProblem& p) { return p.direction == Direction::kBackwardInput; }
const Tensor4& source(const ConvProblem& p) { return is_backward(p) ? p.output : p.input; }

// Whether every row begins and ends between groups of so many elements, aligned to their size.
bool rows_aligned(const ConvProblem& p, const Tensor4& t, const void* data, int elements) {
  return t.size[3] % elements == 0 && t.stride[0] % elements == 0 && t.stride[1] % elements == 0 &&
         t.stride[2] % elements == 0 &&
         reinterpret_cast<uintptr_t>(data) % (elements * element_size(p.dtype)) == 0;
}

// The column of the source that the first tap of the first result meets, at stride 1 or forward.
int first_column(const ConvProblem& p) {
  return int(is_backward(p) ? p.padding.w - (p.kernel().w - 1) : -p.padding.w);
}

// Calls f with the first compiled shape of the problem; false if there is none.
template <typename F, typename... Shapes>
bool with_shape(const ConvProblem& p, const void* from, F&& f, ShapeList<Shapes...>) {
  const Pair kernel = p.kernel();
  if (p.is_dilated()) return false;
  if (is_backward(p) && p.group_out_channels() > 1) return false;
  const bool aligned = rows_aligned(p, source(p), from, 4);
  const int shift = first_column(p) & 3;
  const auto matches = [&](auto shape) {
    return kernel.h == shape.kH && kernel.w == shape.kW && p.stride.h == shape.kStride &&
           p.stride.w == shape.kStride &&
           shape.kTransposed == (is_backward(p) && shape.kStride > 1) &&
           (!shape.kAligned || (aligned && shape.kShift == shift)) &&
           (shape.kPhase == 0 || (p.padding.h % shape.kStride == shape.kPhase &&
                                  p.padding.w % shape.kStride == shape.kPhase));
  };
  return ((matches(Shapes{}) && (f(Shapes{}), true)) || ...);
}

// What a tile is made of: the results of a thread and the windows under them.
struct Geometry {
  int thread_rows, thread_columns;
  int row_step, column_step;  // of windows, from thread to thread
  int halo_rows, halo_columns;
  int shift;          // columns before the first that is needed
  int strips;         // of all planes of a block, at most
  int read_words;     // that a thread reads of a row, from its first on
  int rows, columns;  // results of a plane and phase, with those cells hang over
};

// Divides planes among blocks; shared_bytes is kMaxSharedBytes at most, or the window of a single
// thread does not fit.
Tile make_tile(const ConvProblem& p, Tile tile, const Geometry& g, int64_t planes, int processors) {
  const int size = int(element_size(p.dtype)), per_word = 4 / size;
  const int lanes = int(std::max<int64_t>(1, ceil_divide(g.columns, g.thread_columns)));
  const int strips = int(std::max<int64_t>(1, ceil_divide(g.rows, g.thread_rows)));
  const auto tiles = [&] {
    tile.tiles_w = int(ceil_divide(lanes, tile.lanes));
    tile.tiles_h = int(ceil_divide(strips, tile.strips));
    return ceil_divide(planes, tile.planes) * tile.tiles_w * tile.tiles_h;
  };
  // Evenly: no tile much smaller than the others.
  tile.lanes = int(ceil_divide(lanes, ceil_divide(lanes, kMaxThreads)));
  tile.strips = std::clamp(g.strips / tile.lanes, 1, strips);
  tile.strips = int(ceil_divide(strips, ceil_divide(strips, tile.strips)));
  tile.planes = 1;
  if (tiles() == planes) {
    const int room = std::min(g.strips / (tile.lanes * tile.strips), kMaxPlanes);
    tile.planes =
        int(std::clamp<int64_t>(planes / (kBlocksPerProcessor * processors), 1, std::max(room, 1)));
  }
  const bool dense_rows = p.result().stride[2] == p.result().size[3];
  const int vector = kVectorBytes / size;
  while (true) {
    tiles();
    tile.rows = tile.strips * g.thread_rows;
    tile.columns = tile.lanes * g.thread_columns;
    tile.step_h = tile.strips * g.row_step;
    tile.step_w = tile.lanes * g.column_step;
    tile.window_rows = tile.step_h + g.halo_rows;
    tile.words = int(ceil_divide(tile.step_w + g.halo_columns + g.shift, per_word));
    tile.words = int(round_up(tile.words, tile.copy_words));
    tile.pitch = int(round_up(
        std::max(tile.words, (tile.lanes - 1) * g.column_step / per_word + g.read_words), 4));
    int64_t words = int64_t(tile.planes) * tile.window_rows * tile.pitch;
    if (is_staged(tile.store)) {
      const Tensor4& to = p.result();
      const int rows = int(std::min<int64_t>(tile.rows, to.size[2]));
      const bool whole = tile.tiles_w == 1 && dense_rows;
      tile.row_pitch = whole ? int(to.size[3]) : int(round_up(tile.columns, vector)) + vector;
      const bool block = whole && tile.tiles_h == 1 && to.stride[1] == to.size[2] * to.size[3] &&
                         to.stride[0] == to.size[1] * to.stride[1];
      tile.store = block ? Store::kBlock : whole ? Store::kPlane : Store::kRow;
      tile.plane_pitch =
          block ? rows * tile.row_pitch : int(round_up(rows * tile.row_pitch, vector)) + vector;
      const int64_t staged = int64_t(tile.planes) * tile.plane_pitch + 2 * vector;
      words = std::max(words, ceil_divide(staged, per_word));
    }
    const int64_t bytes = 4 * (round_up(words, 4) + tile.planes * tile.taps);
    tile.shared_bytes = int(std::min<int64_t>(bytes, INT32_MAX));
    if (bytes <= kMaxSharedBytes) break;
    int& largest = tile.planes > 1 ? tile.planes : tile.strips > 1 ? tile.strips : tile.lanes;
    if (largest == 1) break;
    largest = int(ceil_divide(largest, 2));
  }
  tile.threads =
      int(std::min<int64_t>(round_up(tile.planes * tile.strips * tile.lanes, kWarp), kMaxThreads));

  // As many threads a row as leave the fewest idle.
  int64_t best = INT64_MAX;
  for (int lanes_a_row = kWarp; lanes_a_row >= 4; lanes_a_row /= 2) {
    const int64_t steps =
        ceil_divide(int64_t(tile.planes) * tile.window_rows * lanes_a_row, tile.threads) *
        (ceil_divide(tile.words, lanes_a_row * tile.copy_words) + 2);
    if (steps >= best) continue;
    best = steps;
    tile.load_lanes = lanes_a_row;
  }
  tile.count = tiles() * tile.phases_h * tile.phases_w;
  return tile;
}

// Words of the source that can be copied at once where every window begins at a multiple of `step`
// columns from `first`.
int words_at_once(const ConvProblem& p, const void* from, int64_t first, int64_t step) {
  const int per_word = int(4 / element_size(p.dtype));
  for (int elements = 4; elements > per_word; elements /= 2)
    if (rows_aligned(p, source(p), from, elements) && first % elements == 0 && step % elements == 0)
      return elements / per_word;
  return 1;
}

Parameters make_parameters(const ConvProblem& p) {
  Parameters result{};
  result.problem = p;
  result.from = source(p);
  result.to = p.result();
  result.planes = result.to.size[0] * result.to.size[1];
  result.multiplier = int(p.group_out_channels());
  result.sums = is_backward(p) ? result.multiplier : 1;
  result.weight_row = p.weight.stride[2];
  result.weight_column = p.weight.stride[3];
  return result;
}

template <typename Shape>
Parameters fixed_parameters(const ConvProblem& p, const void* from, const void* to,
                            int processors) {
  Parameters result = make_parameters(p);
  const bool turned = is_backward(p) && Shape::kStride == 1;
  Tile tile{};
  tile.phases_h = tile.phases_w = 1;
  tile.taps = Shape::kTapsInShared;
  if (turned) {
    result.weight_first =
        (Shape::kH - 1) * result.weight_row + (Shape::kW - 1) * result.weight_column;
    result.weight_row *= -1;
    result.weight_column *= -1;
    tile.window_h = int(p.padding.h) - (Shape::kH - 1);
    tile.window_w = int(p.padding.w) - (Shape::kW - 1);
  } else if (Shape::kTransposed) {
    tile.first_h = Shape::kPhase - int(p.padding.h % Shape::kStride);
    tile.first_w = Shape::kPhase - int(p.padding.w % Shape::kStride);
    tile.window_h = int(p.padding.h) / Shape::kStride - Shape::before(Shape::kH);
    tile.window_w = int(p.padding.w) / Shape::kStride - Shape::before(Shape::kW);
  } else {
    tile.window_h = -int(p.padding.h);
    tile.window_w = -int(p.padding.w);
  }
  tile.window_w -= Shape::kShift;
  const int columns = int(result.to.size[3]) - tile.first_w;
  // A tile as wide as the result has none beside it, whose window would begin a step further.
  const bool whole = Shape::kTransposed && columns <= kMaxThreads * Shape::kColumns;
  tile.copy_words = words_at_once(p, from, tile.window_w, whole ? 0 : Shape::kColumnStep);
  const auto results_aligned = [&](int columns) {
    return tile.first_w == 0 && rows_aligned(p, p.result(), to, columns);
  };
  tile.store = results_aligned(4)                         ? Store::kFours
               : results_aligned(2) && Shape::kPhase == 0 ? Store::kPairs
                                                          : Store::kRow;
  const Geometry geometry{.thread_rows = Shape::kRows,
                          .thread_columns = Shape::kColumns,
                          .row_step = Shape::kRowStep,
                          .column_step = Shape::kColumnStep,
                          .halo_rows = Shape::kHaloRows,
                          .halo_columns = Shape::kHaloColumns,
                          .shift = Shape::kAligned ? Shape::kShift : 1,
                          .strips = kMaxThreads,
                          .read_words = element_size(p.dtype) == 4 ? kWindowWords<Shape, float>
                                                                   : kWindowWords<Shape, __half>,
                          .rows = int(result.to.size[2]) - tile.first_h,
                          .columns = columns};
  result.tile = make_tile(p, tile, geometry, result.planes, processors);
  return result;
}

Parameters generic_parameters(const ConvProblem& p, const void* from, int processors) {
  Parameters result = make_parameters(p);
  const bool backward = is_backward(p);
  const Pair kernel = p.kernel();
  Tile tile{};
  tile.phases_h = backward ? int(p.stride.h) : 1;
  tile.phases_w = backward ? int(p.stride.w) : 1;
  tile.taps = int(round_up(kernel.h * kernel.w, 4));
  tile.store = Store::kFours;
  const Axis h =
      make_axis(backward, int(p.padding.h), int(p.stride.h), int(p.dilation.h), int(kernel.h), 0);
  const Axis w =
      make_axis(backward, int(p.padding.w), int(p.stride.w), int(p.dilation.w), int(kernel.w), 0);
  tile.copy_words = 1;
  // Phase 0 has tap 0: no phase has more taps.
  const Geometry geometry{.thread_rows = kGenericRows,
                          .thread_columns = 1,
                          .row_step = kGenericRows * h.stride,
                          .column_step = w.stride,
                          .halo_rows = (h.taps - 1) * h.dilation + 1 - h.stride,
                          .halo_columns = (w.taps - 1) * w.dilation + 1 - w.stride,
                          .shift = 1,
                          .strips = result.sums > 1 ? kMaxThreads : kGenericStrips,
                          .read_words = 0,
                          .rows = int(ceil_divide(result.to.size[2], h.step)),
                          .columns = int(ceil_divide(result.to.size[3], w.step))};
  result.tile = make_tile(p, tile, geometry, result.planes, processors);
  return result;
}

template <typename T, typename Kernel>
void launch(Kernel kernel, const Parameters& p, const Operands& operands, cudaStream_t stream) {
  const auto weight = static_cast<const T*>(operands.weight);
  const bool backward = is_backward(p.problem);
  const auto from = static_cast<const T*>(backward ? operands.output : operands.input);
  const auto bias = static_cast<const T*>(operands.bias);
  const auto to = static_cast<T*>(backward ? operands.input : operands.output);
  kernel<<<unsigned(p.tile.count), unsigned(p.tile.threads), size_t(p.tile.shared_bytes), stream>>>(
      p, from, weight, bias, to);
  CONVOPS_LAUNCH_CHECK("depthwise");
}

class Depthwise final : public Algorithm {
 public:
  std::string name() const override { return "depthwise"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (p.direction == Direction::kBackwardWeight) return "backward-weight";
    if (!p.is_depthwise()) return "not depthwise";
    if (p.dtype == DType::kFloat64) return "float64";
    if (!p.input.has_dense_columns() || !p.output.has_dense_columns())
      return "columns are not dense";
    for (const Pair side : {p.input_size(), p.output_size(), p.padding})
      if (std::max(side.h, side.w) > kMaxSide) return "a side or padding of more than 2^24";
    for (const Pair step : {p.stride, p.dilation})
      if (std::max(step.h, step.w) > kMaxStep) return "a stride or dilation of more than 4096";
    const Pair kernel = p.kernel();
    if (kernel.h * kernel.w > kMaxSharedBytes / 8 ||
        std::max(kernel.h * p.dilation.h, kernel.w * p.dilation.w) > kMaxSide)
      return "a kernel of " + std::to_string(kernel.h) + 'x' + std::to_string(kernel.w);
    const Parameters parameters = parameters_of(p, nullptr, nullptr, device.processors);
    if (parameters.tile.shared_bytes > kMaxSharedBytes)
      return "a window of " + std::to_string(parameters.tile.window_rows) + 'x' +
             std::to_string(parameters.tile.words) + " words does not fit shared memory";
    if (parameters.tile.count > INT32_MAX) return "more than 2^31 tiles";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted to an H200. Copies into shared memory cost instructions: most for small planes, whose
    // halos weigh more, and where blocks have few threads to share them. At a stride, where threads
    // read far apart, it is the reads of 16 bytes that cost. A block's own time counts where there
    // are few: its taps, and what half words bring along.
    constexpr double kBandwidthFraction = 0.8, kFixedFraction = 0.45, kGenericFraction = 0.05;
    constexpr double kCopiesPerSecond = 4.5e9, kStridedReadsPerSecond = 1.3e9;  // a multiprocessor
    constexpr double kLaunchSeconds = 6e-6, kTapSeconds = 60e-9, kHalfWordsSeconds = 1e-6;
    constexpr int64_t kMostTaps = 49;  // of a compiled kernel
    const bool fixed = with_shape(p, nullptr, [](auto) {}, AllShapes{});
    const bool strided = !is_backward(p) && p.stride.w > 1;
    const Tile tile = parameters_of(p, nullptr, nullptr, device.processors).tile;
    double copies = double(tile.count) * tile.planes * tile.window_rows * tile.words;
    if (strided)
      copies /= 4;
    else if (tile.copy_words > 1)
      copies /= tile.copy_words;
    else  // half words are counted: rows of them begin and end within words
      copies *= 4.0 / double(element_size(p.dtype));
    // Half as many threads do two thirds.
    const double busy = (tile.threads + kMaxThreads / 2) / (1.5 * kMaxThreads);
    const double rate = (strided ? kStridedReadsPerSecond : kCopiesPerSecond) * busy;
    const double memory = p.bytes() / (device.bandwidth * kBandwidthFraction);
    const double fma =
        p.flops() / (device.fp32_flops * (fixed ? kFixedFraction : kGenericFraction));
    const int64_t taps = std::min(p.kernel().h * p.kernel().w, kMostTaps);
    const bool half_words = tile.copy_words == 1 && element_size(p.dtype) == 2;
    return std::max(memory, fma + copies / (rate * device.processors)) + kLaunchSeconds +
           double(taps) * kTapSeconds + (half_words ? kHalfWordsSeconds : 0);
  }

  WorkspaceRange workspace(const ConvProblem&, const Device&) const override { return {0, 0}; }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const auto stream = static_cast<cudaStream_t>(execution.stream);
    const void* from = is_backward(p) ? operands.output : operands.input;
    const void* to = is_backward(p) ? operands.input : operands.output;
    const Parameters parameters = parameters_of(p, from, to, execution.device->processors);
    dispatch(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (!std::is_same_v<T, double>) {
        const auto launch_fixed = [&](auto shape) {
          launch<T>(fixed_kernel<decltype(shape), T>, parameters, operands, stream);
        };
        if (!with_shape(p, from, launch_fixed, AllShapes{}))
          launch<T>(generic_kernel<T>, parameters, operands, stream);
      }
    });
  }

 private:
  static Parameters parameters_of(const ConvProblem& p, const void* from, const void* to,
                                  int processors) {
    Parameters result;
    const auto fixed = [&](auto shape) {
      result = fixed_parameters<decltype(shape)>(p, from, to, processors);
    };
    if (!with_shape(p, from, fixed, AllShapes{})) result = generic_parameters(p, from, processors);
    return result;
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_depthwise() { return std::make_unique<Depthwise>(); }

}  // namespace convops::cuda

// tma_im2col: forward and backward-input of convolutions in channels_last on Hopper's tensor cores:
// an implicit GEMM whose columns the copy engine makes (TMA's im2col mode). Its kernels are in
// tma_im2col_sm90.cu and, for float32, tma_im2col_float_sm90.cu; docs/tma_im2col.md tells how fast
// they are.
#include "cuda/tma_im2col.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/algorithms.h"
#include "cuda/im2col.h"
#include "cuda/implicit_gemm.h"
#include "cuda/pixel_walk.h"

namespace convops::cuda {
namespace {

bool is_forward(const ConvProblem& p) { return p.direction == Direction::kForward; }
const Tensor4& source(const ConvProblem& p) { return is_forward(p) ? p.input : p.output; }

// A phase of the result along one axis: every step-th from `first` on.
struct AxisPhase {
  int first, count;
  int begin;   // of the first window in the source
  int taps;    // of a window
  int weight;  // the first one's place in the kernel
};
struct Axis {
  std::vector<AxisPhase> phases;
  int result_step, step, shift, weight_step;
};

Axis make_axis(const ConvProblem& p, int dimension) {
  const bool rows = dimension == 2;
  const int stride = int(rows ? p.stride.h : p.stride.w);
  const int padding = int(rows ? p.padding.h : p.padding.w);
  const int dilation = int(rows ? p.dilation.h : p.dilation.w);
  const int kernel = int(p.weight.size[dimension]), results = int(p.result().size[dimension]);
  if (is_forward(p)) return {{{0, results, -padding, kernel, 0}}, 1, stride, dilation, 1};
  // Result i is the sum of the taps j for which (i + padding - j · dilation) / stride is whole; the
  // last of them is the first of the window. Either factor is 1.
  const int shift = stride == 1 ? dilation : 1;
  Axis axis{{}, stride, 1, shift, -stride};
  for (int first = 0; first < std::min(stride, results); ++first) {
    const int least = (first + padding) % stride;
    const int taps = least < kernel ? int(ceil_divide(kernel - least, stride)) : 0;
    axis.phases.push_back({first, int(ceil_divide(results - first, stride)),
                           (first + padding) / stride - (taps - 1) * shift, taps,
                           least + (taps - 1) * stride});
  }
  return axis;
}

bool is_float(const ConvProblem& p) { return p.dtype == DType::kFloat32; }
int element_bytes(const ConvProblem& p) { return int(element_size(p.dtype)); }

// Whether the copy engine can have a tensor's pixels, and vectors be stored to them.
bool is_mappable(const ConvProblem& p, const Tensor4& tensor) {
  return refuse_pixels(tensor, p.dtype, "").empty() && tensor.size[1] % pixel_vector(p.dtype) == 0;
}

Windows windows(const Axis& axis, const AxisPhase& phase) {
  return {phase.begin, phase.count, axis.step};
}

std::string refuse_axis(const ConvProblem& p, const Axis& axis, int dimension) {
  for (const AxisPhase& phase : axis.phases) {
    if (phase.taps == 0) continue;
    const std::string reason = refuse_windows(windows(axis, phase), source(p).size[dimension],
                                              (phase.taps - 1) * int64_t{axis.shift});
    if (!reason.empty()) return reason;
  }
  return "";
}

bool packs(const ConvProblem& p) {
  return is_float(p) || groups_share_boxes(p) || !is_mappable(p, p.weight);
}
int64_t sums(const ConvProblem& p) {
  return groups_share_boxes(p) ? kMergedChannels : source(p).size[1];
}
// The weight that is multiplied, in a stage's rows (first dimension) and what is summed (second).
Tensor4 packed_weight(const ConvProblem& p) {
  const auto& size = p.weight.size;
  if (is_float(p))
    return Tensor4::channels_last({p.result().size[1] * float_parts(p),
                                   round_up(sums(p), kPackedFloatSums), size[2], size[3]});
  if (!packs(p)) return p.weight;
  return Tensor4::channels_last(
      {size[0], groups_share_boxes(p) ? kMergedChannels : size[1], size[2], size[3]});
}
int64_t packed_bytes(const ConvProblem& p) {
  return packs(p) ? packed_weight(p).numel() * element_bytes(p) : 0;
}

PixelGemm describe(const ConvProblem& p, const PixelShape& shape) {
  const Axis h = make_axis(p, 2), w = make_axis(p, 3);
  const Tensor4& result = p.result();
  PixelGemm g{};
  g.channels = int(result.size[1]);
  g.merged = groups_share_boxes(p);
  g.sums = int(sums(p));
  g.by_channel_tiles = Divisor(ceil_divide(g.channels, shape.channels));
  g.result_step_h = h.result_step;
  g.result_step_w = w.result_step;
  g.step_h = h.step;
  g.step_w = w.step;
  g.shift_h = h.shift;
  g.shift_w = w.shift;
  g.weight_step_h = h.weight_step;
  g.weight_step_w = w.weight_step;
  g.image_stride = result.stride[0];
  g.row_stride = result.stride[2];
  g.column_stride = result.stride[3];
  g.bias_stride = p.bias_stride;
  for (const AxisPhase& y : h.phases)
    for (const AxisPhase& x : w.phases) {
      PixelPhase& phase = g.phases[g.phase_count++];
      phase.by_columns = Divisor(x.count);
      phase.by_pixels = Divisor(int64_t{x.count} * y.count);
      phase.pixels = int(p.batch() * x.count * y.count);
      phase.result_h = y.first;
      phase.result_w = x.first;
      phase.begin_h = y.begin;
      phase.begin_w = x.begin;
      phase.taps_h = y.taps;
      phase.taps_w = y.taps > 0 ? x.taps : 0;
      phase.weight_h = y.weight;
      phase.weight_w = x.weight;
    }
  // The longest first, so that short ones fill what is left.
  std::stable_sort(g.phases, g.phases + g.phase_count, [](const auto& a, const auto& b) {
    return a.taps_h * a.taps_w > b.taps_h * b.taps_w;
  });
  for (PixelPhase& phase : std::span(g.phases, size_t(g.phase_count))) {
    phase.first_tile = g.tiles;
    g.tiles += int(ceil_divide(phase.pixels, shape.pixels()) * g.by_channel_tiles.value);
  }
  return g;
}

PixelOperands make_operands(const ConvProblem& p, const PixelGemm& g, const PixelShape& shape,
                            const Operands& operands, const void* packed) {
  PixelOperands pixels{is_forward(p) ? operands.input : operands.output,
                       operands.weight,
                       operands.bias,
                       is_forward(p) ? operands.output : operands.input,
                       {},
                       {}};
  const Tensor4 from = with_strides(source(p), p.dtype);
  const Tensor4 weight = with_strides(packed_weight(p), p.dtype);
  const int bytes = element_bytes(p), box = map_channels(bytes);
  const bool turned = !is_forward(p) && !is_float(p);  // rows of a box are what is summed
  pixels.weight_map =
      make_map(packed, {weight.size[1], weight.size[3], weight.size[2], weight.size[0]},
               {weight.stride[3], weight.stride[2], weight.stride[0]},
               {box, 1, 1, turned ? box : shape.channels}, bytes, kMapRowBytes);
  for (int i = 0; i < g.phase_count; ++i) {
    const PixelPhase& phase = g.phases[i];
    if (phase.taps_h * phase.taps_w == 0) continue;
    const int columns = int(phase.by_columns.value), rows = int(phase.by_pixels.value) / columns;
    pixels.source_maps[i] =
        make_im2col_map(pixels.source, from, {phase.begin_h, rows, g.step_h},
                        {phase.begin_w, columns, g.step_w}, shape.pixels(), bytes);
  }
  return pixels;
}

void pack(const ConvProblem& p, const PixelGemm& g, const void* weight,
          const Execution& execution) {
  if (is_float(p))
    pack_floats(p, g, weight, execution.workspace, execution.stream);
  else if (groups_share_boxes(p))
    pack_groups(p, weight, execution.workspace, execution.stream);
  else if (packs(p))
    copy(packed_weight(p), execution.workspace, p.dtype, p.weight, weight, p.dtype,
         execution.stream);
}

struct Plan {
  int shape;  // of the speed's
  PixelGemm gemm;
  double seconds;
};

// How fast kernels are, fitted to an H200 (docs/tma_im2col.md): 9, 10 and 5% root mean square near
// each problem's fastest shape.
struct ShapeSpeed {
  PixelShape shape;
  double step, store;  // seconds: of a stage's channels of a tap, and to store a tile
};
struct Speed {
  std::span<const ShapeSpeed> shapes;
  double partial_box;  // steps take so many times as long where boxes reach past the channels
  double overlap;      // of the shorter of computing and memory this is not hidden
  double bandwidth;    // of the device's, which `overlap` allows for
  double launch;       // seconds
};

Speed speed(const ConvProblem& p) {
  constexpr auto& half = kPixelShapes;
  static constexpr ShapeSpeed kHalf[] = {{half[0], 0.261e-6, 1.24e-6},
                                         {half[1], 0.357e-6, 1.24e-6},
                                         {half[2], 0.342e-6, 1.24e-6},
                                         {half[3], 0.473e-6, 0.8e-6}};
  constexpr auto& full = kFloatPixelShapes;
  static constexpr ShapeSpeed kTf32[] = {{full[0], 0.24e-6, 2.13e-6},
                                         {full[1], 0.463e-6, 1.65e-6},
                                         {full[2], 0.485e-6, 2.21e-6},
                                         {full[3], 0.623e-6, 3.31e-6}};
  static constexpr ShapeSpeed kIeee[] = {
      {full[0], 0.385e-6, 2.5e-6}, {full[1], 0.913e-6, 2.05e-6}, {full[2], 1.167e-6, 2.73e-6}};
  const auto all_serve = [](auto& shapes, int parts) {
    return std::ranges::all_of(shapes, [=](auto& s) { return float_shape_serves(s.shape, parts); });
  };
  static_assert(all_serve(kTf32, 1) && all_serve(kIeee, 2), "of others there are no kernels");
  if (!is_float(p)) return {kHalf, 1.42, 0.62, 1.2, 5.5e-6};
  if (float_parts(p) == 1) return {kTf32, 1, 0.14, 1, 4.2e-6};
  return {kIeee, 1, 0.04, 1, 4.2e-6};
}

double estimate(const ConvProblem& p, const PixelGemm& g, int shape, const Device& device) {
  const Speed fast = speed(p);
  const int box = map_channels(element_bytes(p));
  double steps = 0;
  for (int i = 0; i < g.phase_count; ++i) {
    const PixelPhase& phase = g.phases[i];
    const int end = i + 1 < g.phase_count ? g.phases[i + 1].first_tile : g.tiles;
    steps += double(end - phase.first_tile) * phase.taps_h * phase.taps_w *
             double(ceil_divide(g.sums, box));
  }
  const auto& [tile_shape, step, store] = fast.shapes[shape];
  double multiply = steps / g.tiles * step;
  if (g.sums % box != 0) multiply *= fast.partial_box;
  if (g.channels % tile_shape.channels != 0) multiply *= fast.partial_box;
  const double both = multiply + store;
  const double tile = tile_shape.teams == 1 ? both : std::max(multiply, both / 2);
  const double compute = double(ceil_divide(g.tiles, device.processors)) * tile + store;
  const double memory = p.bytes() / (device.bandwidth * fast.bandwidth);
  return fast.launch + std::max(compute, memory) + fast.overlap * std::min(compute, memory);
}

Plan make_plan(const ConvProblem& p, const Device& device) {
  Plan best{-1, {}, 0};
  const auto shapes = speed(p).shapes;
  for (int i = 0; i < int(shapes.size()); ++i) {
    const PixelShape& shape = shapes[i].shape;
    if (groups_share_boxes(p) && shape.channels != kMergedChannels) continue;
    const PixelGemm gemm = describe(p, shape);
    const double seconds = estimate(p, gemm, i, device);
    if (best.shape < 0 || seconds < best.seconds) best = {i, gemm, seconds};
  }
  return best;
}

class TmaIm2col final : public Algorithm {
 public:
  std::string name() const override { return "tma_im2col"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (device.compute_capability != 90) return "made for compute capability 9.0 (Hopper)";
    if (p.dtype == DType::kFloat64) return "no float64";
    if (p.direction == Direction::kBackwardWeight) return "no backward-weight";
    if (p.groups != 1 && !groups_share_boxes(p))
      return "groups of " + std::to_string(p.group_in_channels()) + " and " +
             std::to_string(p.group_out_channels()) + " channels";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    if (p.batch() == 0 || p.weight.numel() == 0) return "nothing to sum";
    for (const auto& [tensor, name] : {std::pair{p.input, "input"}, std::pair{p.output, "output"}})
      if (!is_mappable(p, tensor))
        return std::string(name) + " not in channels_last, or not by " +
               std::to_string(pixel_vector(p.dtype)) + " channels";
    for (const int64_t extent :
         {p.batch() * p.input.size[2] * p.input.size[3], p.batch() * p.output_pixels(),
          p.in_channels(), p.out_channels(), p.weight.numel(), p.padding.h, p.padding.w,
          p.kernel().h * p.dilation.h, p.kernel().w * p.dilation.w, p.stride.h, p.stride.w})
      if (extent >= kMaxExtent) return "a side or padding of 2^30 or more";
    const int64_t products = sums(p) * p.kernel().h * p.kernel().w;
    if (products > kMostHalfProducts) return "sums of " + std::to_string(products) + " products";
    if (!is_forward(p)) {
      if ((p.stride.h > 1 && p.kernel().h > 1 && p.dilation.h > 1) ||
          (p.stride.w > 1 && p.kernel().w > 1 && p.dilation.w > 1))
        return "a stride and a dilation in one direction";
      if (p.stride.h * p.stride.w > kMostPhases)
        return std::to_string(p.stride.h * p.stride.w) + " phases";
    }
    for (const int dimension : {2, 3})
      if (const std::string reason = refuse_axis(p, make_axis(p, dimension), dimension);
          !reason.empty())
        return reason;
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    constexpr double kPackSeconds = 4e-6;  // a launch
    return make_plan(p, device).seconds + (packs(p) ? kPackSeconds : 0);
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device&) const override {
    return {packed_bytes(p), packed_bytes(p)};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const void* const weight = packs(p) ? execution.workspace : operands.weight;
    // The copy engine has whole vectors only.
    for (const void* tensor : {static_cast<const void*>(operands.input), weight,
                               static_cast<const void*>(operands.output)})
      if (is_astray(tensor)) return direct_->run(p, operands, execution);
    const Plan plan = make_plan(p, *execution.device);
    pack(p, plan.gemm, operands.weight, execution);
    (is_float(p) ? multiply_float_pixels : multiply_pixels)(
        p, plan.gemm, plan.shape,
        make_operands(p, plan.gemm, speed(p).shapes[plan.shape].shape, operands, weight),
        execution);
  }

 private:
  std::unique_ptr<Algorithm> direct_ = make_direct();
};

}  // namespace

std::unique_ptr<Algorithm> make_tma_im2col() { return std::make_unique<TmaIm2col>(); }

}  // namespace convops::cuda

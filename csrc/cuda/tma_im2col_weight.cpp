// tma_im2col_weight: backward-weight of tensors in channels_last on Hopper's tensor cores, both
// operands straight from memory by the copy engine's im2col walk. Its kernels are in
// tma_im2col_weight_sm90.cu and, for float32, tma_im2col_weight_float_sm90.cu, the sum of their
// parts in weight_parts.cu. docs/tma_im2col_weight.md tells how and how fast.
#include "cuda/tma_im2col_weight.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <span>

#include "cuda/algorithms.h"
#include "cuda/pixel_walk.h"
#include "cuda/weight_parts.h"

namespace convops::cuda {
namespace {

constexpr int64_t kMostPixels = int64_t{1} << 30;

struct Plan {
  PixelTile tile;
  int splits;
  double seconds;
};

bool is_float(const ConvProblem& p) { return p.dtype == DType::kFloat32; }
int products(const ConvProblem& p) {
  return is_float(p) && p.precision == Precision::kIeee ? 3 : 1;
}
int side(const ConvProblem& p) { return box_side(int(element_size(p.dtype))); }
int64_t pixels(const ConvProblem& p) { return p.batch() * p.output_pixels(); }
int64_t part_bytes(const ConvProblem& p) { return p.weight.numel() * int64_t(sizeof(float)); }

// The first pixels of all windows: of the input, or of grad_output, whose windows are pixels.
Windows windows(int64_t count, int64_t step, int64_t padding) {
  return {int(-padding), int(count), int(step)};
}
CUtensorMap make_map(const ConvProblem& p, const Tensor4& t, const void* data, bool input) {
  const Pair step = input ? p.stride : Pair{1, 1}, padding = input ? p.padding : Pair{0, 0};
  return make_im2col_map(data, t, windows(p.output.size[2], step.h, padding.h),
                         windows(p.output.size[3], step.w, padding.w), side(p),
                         int(element_size(p.dtype)));
}

// How many groups share a box.
int merged(const ConvProblem& p) {
  return groups_share_boxes(p) ? int(kMergedChannels / p.group_in_channels()) : 1;
}

// Of what a block may sum.
int64_t least_splits(const ConvProblem& p) {
  return ceil_divide(round_up(pixels(p), side(p)), kMostSummedPixels);
}

WeightPixels describe(const ConvProblem& p, const PixelTile& tile) {
  WeightPixels g{};
  g.groups = int(p.groups);
  g.channels = int(p.group_in_channels());
  g.out_channels = int(p.group_out_channels());
  g.merged = merged(p);
  g.kernel_w = int(p.kernel().w);
  g.taps = int(p.kernel().h * p.kernel().w);
  g.stride_h = int(p.stride.h);
  g.stride_w = int(p.stride.w);
  g.padding_h = int(p.padding.h);
  g.padding_w = int(p.padding.w);
  g.dilation_h = int(p.dilation.h);
  g.dilation_w = int(p.dilation.w);
  g.slots = int(ceil_divide(g.merged * g.channels, tile.side)) * g.taps;
  g.out_tiles = int(ceil_divide(g.merged * g.out_channels, tile.out_channels()));
  g.slot_tiles = int(ceil_divide(g.slots, tile.slots));
  g.splits = 1;
  g.stages = int(ceil_divide(pixels(p), tile.side));
  g.by_out_width = Divisor(p.output.size[3]);
  g.by_out_height = Divisor(p.output.size[2]);
  g.by_taps = Divisor(g.taps);
  g.by_kernel_w = Divisor(g.kernel_w);
  g.by_channels = Divisor(g.channels);
  return g;
}

// A stage takes what its multiplications do, or its bytes from L2, which all blocks share.
double half_stage_seconds(const PixelTile& tile, double active, const Device& device) {
  constexpr double kFlopsOfCycle = 256;
  constexpr double kBytesOfCycle = 50, kAllBytesOfCycle = 5900;  // of a multiprocessor, of L2
  constexpr double kStageCycles = 60, kBoxCycles = 128;          // an out box times a slot
  const double clock = device.fp32_flops / (kFlopsOfCycle * device.processors);
  const double multiply = tile.out_boxes * tile.slots * kBoxCycles + kStageCycles;
  const double load = tile.stage_bytes() / std::min(kBytesOfCycle, kAllBytesOfCycle / active);
  return std::max(multiply, load) / clock;
}
double float_stage_seconds(const PixelTile& tile, bool tf32) {
  static constexpr double kTf32[] = {0.95e-6, 0.83e-6, 0.67e-6, 0.59e-6, 0.52e-6};
  static constexpr double kIeee[] = {0, 0, 1.22e-6, 1.13e-6, 0.88e-6};
  static_assert(std::size(kTf32) == std::size(kFloatTiles));
  static_assert(std::size(kIeee) == std::size(kFloatTiles));
  const auto i = std::find(std::begin(kFloatTiles), std::end(kFloatTiles), tile) - kFloatTiles;
  return tf32 ? kTf32[i] : kIeee[i];
}

// Both tensors, of the input the pixels that windows meet.
double bytes_read(const ConvProblem& p) {
  const double met_h = std::min(1.0, double(p.kernel().h) / double(p.stride.h));
  const double met_w = std::min(1.0, double(p.kernel().w) / double(p.stride.w));
  return (met_h * met_w * double(p.input.numel()) + double(p.output.numel())) *
         double(element_size(p.dtype));
}

// Seconds, fitted to an H200: on ResNet-50's layers (of 16 bits KernelBench's, too) and all tiles
// 14% root mean square of 16 bits, 4% of float32. The tile that is chosen is 1% slower than the
// best on average.
double estimate(const ConvProblem& p, const WeightPixels& g, const PixelTile& tile, int splits,
                const Device& device) {
  constexpr double kOverlap = 0.02;  // of the shorter: where memory decides, the least of computing
  const bool whole = splits == 1 && !is_float(p);  // no parts
  const double launch = is_float(p) ? 2.5e-6 : 8.2e-6, start = is_float(p) ? 4.2e-6 : 0.6e-6;
  const double bandwidth = device.bandwidth * (is_float(p) ? 0.74 : 0.83);
  const int64_t blocks = int64_t{g.tiles()} * splits;
  const double waves = double(ceil_divide(blocks, device.processors));
  const double active = double(std::min<int64_t>(blocks, device.processors));
  const double stage = is_float(p) ? float_stage_seconds(tile, products(p) == 1)
                                   : half_stage_seconds(tile, active, device);
  const double compute = waves * double(ceil_divide(g.stages, splits)) * stage;
  const double memory = bytes_read(p) / bandwidth;
  double seconds =
      launch + waves * start + std::max(compute, memory) + kOverlap * std::min(compute, memory);
  const auto add_kernel = [&](double seconds_alone, double traffic) {
    seconds += seconds_alone + traffic * double(part_bytes(p)) / device.bandwidth;
  };
  if (!whole) add_kernel(3e-6, 1.6 * splits);
  if (is_float(p)) add_kernel(1e-6, 2);  // looks for what is not finite
  return seconds;
}

// The fastest by estimate. `parts`: that memory allows.
Plan make_plan(const ConvProblem& p, const Device& device, int64_t parts) {
  // Waves of blocks: more of them fill the device better where one leaves many multiprocessors
  // without a block. A share of fewer stages than these is not worth a block's start.
  const int most_waves = is_float(p) ? 5 : 1;
  constexpr int64_t kFewestStages = 4;
  const int64_t least = least_splits(p);
  std::optional<Plan> best;
  std::span<const PixelTile> tiles = kHalfTiles;
  if (is_float(p)) tiles = kFloatTiles;
  for (const PixelTile& tile : tiles) {
    if (is_float(p) && !float_tile_serves(tile, products(p))) continue;
    const WeightPixels gemm = describe(p, tile);
    for (int waves = 1; waves <= most_waves; ++waves) {
      const int64_t wanted =
          std::min<int64_t>(waves * device.processors / gemm.tiles(), gemm.stages / kFewestStages);
      const int splits = int(std::clamp<int64_t>(wanted, least, std::max(least, parts)));
      const double seconds = estimate(p, gemm, tile, splits, device);
      if (!best || seconds < best->seconds) best = {tile, splits, seconds};
    }
  }
  return *best;
}

class TmaIm2colWeight final : public Algorithm {
 public:
  std::string name() const override { return "tma_im2col_weight"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (device.compute_capability != 90) return "made for compute capability 9.0 (Hopper)";
    if (p.dtype == DType::kFloat64) return "no float64";
    if (p.direction != Direction::kBackwardWeight) return "only backward-weight";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    if (p.weight.numel() == 0 || pixels(p) == 0) return "nothing to sum";
    if (pixels(p) > kMostPixels || p.weight.numel() > kMostPixels)
      return "2^30 pixels or weights or more";
    const bool apart = p.groups > 1 && (merged(p) == 1 || is_float(p));
    if ((apart ? p.group_in_channels() : p.in_channels()) % pixel_vector(p.dtype) != 0)
      return "channels that are no multiple of " + std::to_string(pixel_vector(p.dtype));
    if ((apart ? p.group_out_channels() : p.out_channels()) % pixel_vector(p.dtype) != 0)
      return "out channels that are no multiple of " + std::to_string(pixel_vector(p.dtype));
    if (const std::string reason = refuse_pixels(p.input, p.dtype, "input"); !reason.empty())
      return reason;
    if (const std::string reason = refuse_pixels(p.output, p.dtype, "grad_output"); !reason.empty())
      return reason;
    for (const bool h : {true, false}) {
      const int dimension = h ? 2 : 3;
      const int64_t kernel = p.weight.size[dimension], dilation = h ? p.dilation.h : p.dilation.w;
      const std::string reason =
          refuse_windows(windows(p.output.size[dimension], h ? p.stride.h : p.stride.w,
                                 h ? p.padding.h : p.padding.w),
                         p.input.size[dimension], (kernel - 1) * dilation);
      if (!reason.empty()) return reason;
    }
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    return make_plan(p, device, INT64_MAX).seconds;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    return {make_plan(p, device, 1).splits * part_bytes(p),
            make_plan(p, device, INT64_MAX).splits * part_bytes(p)};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    if (is_astray(operands.input) || is_astray(operands.output))
      return make_direct()->run(p, operands, execution);
    const Plan plan = make_plan(p, *execution.device, execution.workspace_bytes / part_bytes(p));
    WeightPixels g = describe(p, plan.tile);
    g.splits = plan.splits;
    const auto& [size, stride] = p.weight;
    // Those of float32 may have to be summed again.
    const bool whole = g.splits == 1 && !is_float(p);
    const WeightSums results{operands.weight, true, stride[0], stride[2], stride[3], stride[1]};
    const WeightSums parts{execution.workspace,  false,   g.taps * size[1],
                           g.kernel_w * size[1], size[1], 1};
    const WeightPixelsOperands pixels{
        make_map(p, with_strides(p.input, p.dtype), operands.input, true),
        make_map(p, with_strides(p.output, p.dtype), operands.output, false),
        whole ? results : parts};
    const auto sum = p.dtype == DType::kFloat16    ? sum_pixels_half
                     : p.dtype == DType::kBFloat16 ? sum_pixels_bfloat16
                     : products(p) == 1            ? sum_pixels_tf32
                                                   : sum_pixels_ieee;
    sum(g, plan.tile, pixels, execution.stream);
    if (whole) return;
    const Tensor4 in_order{{size[0], size[2], size[3], size[1]},
                           {stride[0], stride[2], stride[3], stride[1]}};
    add_weight_parts(in_order, static_cast<const float*>(execution.workspace), g.splits, p.dtype,
                     operands.weight, execution);
    if (is_float(p)) sum_again(p, operands, execution);
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_tma_im2col_weight() { return std::make_unique<TmaIm2colWeight>(); }

}  // namespace convops::cuda

// tma_im2col_weight: backward-weight of float16 and bfloat16 tensors in channels_last on Hopper's
// tensor cores, both operands straight from memory by the copy engine's im2col walk. Its kernel is
// in tma_im2col_weight_sm90.cu, the sum of its parts in weight_parts.cu.
// docs/tma_im2col_weight.md tells how and how fast.
#include "cuda/tma_im2col_weight.h"

#include <algorithm>
#include <optional>

#include "cuda/algorithms.h"
#include "cuda/pixel_walk.h"
#include "cuda/weight_parts.h"

namespace convops::cuda {
namespace {

constexpr int64_t kMostPixels = int64_t{1} << 30;

struct Plan {
  PixelTile tile;
  WeightPixels gemm;
  double seconds;
};

int64_t pixels(const ConvProblem& p) { return p.batch() * p.output_pixels(); }
int64_t part_bytes(const ConvProblem& p) { return p.weight.numel() * int64_t(sizeof(float)); }

// The first pixels of all windows: of the input, or of grad_output, whose windows are pixels.
Windows windows(int64_t count, int64_t step, int64_t padding) {
  return {int(-padding), int(count), int(step)};
}
CUtensorMap make_map(const ConvProblem& p, const Tensor4& t, const void* data, bool input) {
  const Pair step = input ? p.stride : Pair{1, 1}, padding = input ? p.padding : Pair{0, 0};
  return make_im2col_map(data, t, windows(p.output.size[2], step.h, padding.h),
                         windows(p.output.size[3], step.w, padding.w), kPixelStage,
                         int(element_size(p.dtype)));
}

// How many groups share a box.
int merged(const ConvProblem& p) {
  return groups_share_boxes(p) ? int(kPixelChannels / p.group_in_channels()) : 1;
}

// Of what a block may sum.
int64_t least_splits(const ConvProblem& p) {
  return ceil_divide(round_up(pixels(p), kPixelStage), kMostSummedPixels);
}

// `parts`: that memory allows.
WeightPixels describe(const ConvProblem& p, const PixelTile& tile, int processors, int64_t parts) {
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
  g.slots = int(ceil_divide(g.merged * g.channels, kPixelChannels)) * g.taps;
  g.out_tiles = int(ceil_divide(g.merged * g.out_channels, tile.out_channels()));
  g.slot_tiles = int(ceil_divide(g.slots, tile.slots));
  g.stages = int(ceil_divide(pixels(p), kPixelStage));
  g.by_out_width = Divisor(p.output.size[3]);
  g.by_out_height = Divisor(p.output.size[2]);
  g.by_taps = Divisor(g.taps);
  g.by_kernel_w = Divisor(g.kernel_w);
  g.by_channels = Divisor(g.channels);
  // One wave of blocks, or as many as sums may be long; a share of fewer stages is not worth a
  // block's start.
  constexpr int64_t kFewestStages = 4;
  const int64_t wanted = std::min<int64_t>(processors / g.tiles(), g.stages / kFewestStages);
  const int64_t least = least_splits(p);
  g.splits = int(std::clamp<int64_t>(wanted, least, std::max(least, parts)));
  return g;
}

// Seconds: a stage takes what its multiplications do, or its bytes from L2, which all blocks share.
// Fitted to an H200 (14% root mean square on ResNet-50's layers and KernelBench's; the tile that is
// chosen is 1% slower than the best on average).
double estimate(const ConvProblem& p, const WeightPixels& g, const PixelTile& tile,
                const Device& device) {
  constexpr double kFlopsOfCycle = 256, kLaunchSeconds = 8.8e-6;
  constexpr double kBytesOfCycle = 50, kAllBytesOfCycle = 5900;  // of a multiprocessor, of L2
  constexpr double kStageCycles = 60, kBlockCycles = 1200;
  constexpr double kBandwidthFraction = 0.83;
  constexpr double kReduceSeconds = 3e-6, kPartTraffic = 1.6;
  constexpr int kStepPixels = 16, kSlotCycles = 32;  // of an instruction's step
  const double clock = device.fp32_flops / (kFlopsOfCycle * device.processors);
  const int64_t blocks = int64_t{g.tiles()} * g.splits;
  const double waves = double(ceil_divide(blocks, device.processors));
  const double active = double(std::min<int64_t>(blocks, device.processors));
  const double multiply =
      kPixelStage / kStepPixels * tile.warpgroups * tile.slots * kSlotCycles + kStageCycles;
  const double load = tile.stage_bytes() / std::min(kBytesOfCycle, kAllBytesOfCycle / active);
  const double stages = double(ceil_divide(g.stages, g.splits));
  const double compute = waves * (stages * std::max(multiply, load) + kBlockCycles) / clock;
  const double parts =
      g.splits == 1
          ? 0
          : kReduceSeconds + kPartTraffic * double(g.splits * part_bytes(p)) / device.bandwidth;
  const double memory = p.bytes() / (device.bandwidth * kBandwidthFraction);
  return kLaunchSeconds + parts + std::max(compute, memory);
}

// The fastest by estimate.
Plan make_plan(const ConvProblem& p, const Device& device, int64_t parts) {
  std::optional<Plan> best;
  for (const PixelTile& tile : kPixelTiles) {
    const WeightPixels gemm = describe(p, tile, device.processors, parts);
    const double seconds = estimate(p, gemm, tile, device);
    if (!best || seconds < best->seconds) best = {tile, gemm, seconds};
  }
  return *best;
}

class TmaIm2colWeight final : public Algorithm {
 public:
  std::string name() const override { return "tma_im2col_weight"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (device.compute_capability != 90) return "made for compute capability 9.0 (Hopper)";
    if (element_size(p.dtype) != 2) return "only float16 and bfloat16";
    if (p.direction != Direction::kBackwardWeight) return "only backward-weight";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    if (p.weight.numel() == 0 || pixels(p) == 0) return "nothing to sum";
    if (pixels(p) > kMostPixels || p.weight.numel() > kMostPixels)
      return "2^30 pixels or weights or more";
    const bool apart = p.groups > 1 && merged(p) == 1;
    if ((apart ? p.group_in_channels() : p.in_channels()) % pixel_vector(p.dtype) != 0)
      return "channels that are no multiple of 8";
    if ((apart ? p.group_out_channels() : p.out_channels()) % pixel_vector(p.dtype) != 0)
      return "out channels that are no multiple of 8";
    if (const std::string reason = refuse_pixels(p.input, p.dtype, "input"); !reason.empty())
      return reason;
    if (const std::string reason = refuse_pixels(p.output, p.dtype, "grad_output"); !reason.empty())
      return reason;
    for (const bool h : {true, false}) {
      const int side = h ? 2 : 3;
      const int64_t kernel = p.weight.size[side], dilation = h ? p.dilation.h : p.dilation.w;
      const std::string reason = refuse_windows(
          windows(p.output.size[side], h ? p.stride.h : p.stride.w, h ? p.padding.h : p.padding.w),
          p.input.size[side], (kernel - 1) * dilation);
      if (!reason.empty()) return reason;
    }
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    return make_plan(p, device, INT64_MAX).seconds;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    return {make_plan(p, device, 1).gemm.splits * part_bytes(p),
            make_plan(p, device, INT64_MAX).gemm.splits * part_bytes(p)};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    if (is_astray(operands.input) || is_astray(operands.output))
      return make_direct()->run(p, operands, execution);
    const Plan plan = make_plan(p, *execution.device, execution.workspace_bytes / part_bytes(p));
    const WeightPixels& g = plan.gemm;
    const auto& [size, stride] = p.weight;
    const bool whole = g.splits == 1;
    const WeightSums results{operands.weight, true, stride[0], stride[2], stride[3], stride[1]};
    const WeightSums parts{execution.workspace,  false,   g.taps * size[1],
                           g.kernel_w * size[1], size[1], 1};
    const WeightPixelsOperands pixels{
        make_map(p, with_strides(p.input, p.dtype), operands.input, true),
        make_map(p, with_strides(p.output, p.dtype), operands.output, false),
        whole ? results : parts};
    const auto sum = p.dtype == DType::kFloat16 ? sum_pixels_half : sum_pixels_bfloat16;
    sum(g, plan.tile, pixels, execution.stream);
    if (whole) return;
    const Tensor4 in_order{{size[0], size[2], size[3], size[1]},
                           {stride[0], stride[2], stride[3], stride[1]}};
    add_weight_parts(in_order, static_cast<const float*>(execution.workspace), g.splits, p.dtype,
                     operands.weight, execution);
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_tma_im2col_weight() { return std::make_unique<TmaIm2colWeight>(); }

}  // namespace convops::cuda

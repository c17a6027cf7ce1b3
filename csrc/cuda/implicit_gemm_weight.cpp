// implicit_gemm_weight: backward-weight of dense and grouped convolutions of float32 tensors on
// Hopper's tensor cores, straight from NCHW: no columns. Its kernels are in
// implicit_gemm_weight_sm90.cu, the sum of their parts in weight_parts.cu.
// docs/implicit_gemm_weight.md tells how and how fast.
#include "cuda/implicit_gemm_weight.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include "cuda/algorithms.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_parts.h"

namespace convops::cuda {
namespace {

// A thread adds the sums of so many rows at most, one after the other: that bounds the rounding
// error of large batches. A share of fewer rows is not worth a block's start.
constexpr int64_t kMostRows = 4096, kFewestRows = 8;

struct Plan {
  WeightTile tile;
  WeightGemm gemm;
  double seconds;
};

// Of a stride, those that have a tap.
Pair phases(const ConvProblem& p) {
  return {std::min(p.stride.h, p.kernel().h), std::min(p.stride.w, p.kernel().w)};
}
// Of a phase.
Pair phase_taps(const ConvProblem& p) {
  return {ceil_divide(p.kernel().h, p.stride.h), ceil_divide(p.kernel().w, p.stride.w)};
}

// The rows of an image as one row, where all its pixels follow each other and are multiplied one by
// one.
ConvProblem join_rows(ConvProblem p) {
  const auto joins = [](const Tensor4& t) { return t.size[2] == 1 || t.stride[2] == t.size[3]; };
  if (!p.is_pointwise() || !joins(p.input) || !joins(p.output)) return p;
  for (Tensor4* const t : {&p.input, &p.output}) {
    t->size[3] *= t->size[2];
    t->size[2] = 1;
    t->stride[2] = round_up(t->size[3], kVector);
  }
  return p;
}

int products(const ConvProblem& p) { return p.precision == Precision::kIeee ? 3 : 1; }

// Of places in 16 bytes, of what is so many floats apart.
int kinds(int64_t stride) { return int(kVector / std::gcd(stride, int64_t{kVector})); }

// `parts`: that memory allows.
WeightGemm describe(const ConvProblem& p, const WeightTile& tile, int processors, int64_t parts) {
  WeightGemm g{};
  g.groups = int(p.groups);
  const Pair phase = phases(p), taps = phase_taps(p);
  g.channels = int(p.group_in_channels() * phase.h * phase.w);
  g.out_channels = int(p.group_out_channels());
  g.height = int(p.input.size[2]);
  g.width = int(p.input.size[3]);
  g.out_height = int(p.output.size[2]);
  g.out_width = int(p.output.size[3]);
  g.kernel_h = int(p.kernel().h);
  g.kernel_w = int(p.kernel().w);
  g.stride_h = int(p.stride.h);
  g.stride_w = int(p.stride.w);
  g.padding_h = int(p.padding.h);
  g.padding_w = int(p.padding.w);
  g.dilation_h = taps.h > 1 ? int(p.dilation.h) : 1;
  g.dilation_w = taps.w > 1 ? int(p.dilation.w) : 1;
  g.phases_h = int(phase.h);
  g.phases_w = int(phase.w);
  g.by_phases = Divisor(phase.h * phase.w);
  g.by_phases_w = Divisor(phase.w);
  g.image_stride = p.input.stride[0];
  g.channel_stride = p.input.stride[1];
  g.row_stride = p.input.stride[2];
  g.channel_tiles = int(ceil_divide(g.channels, tile.channels()));
  g.out_channel_tiles = int(ceil_divide(g.out_channels, tile.out_channels()));
  g.taps_h = int(ceil_divide(taps.h, tile.kernel_h));
  g.taps_w = int(ceil_divide(taps.w, tile.kernel_w));
  g.segments = int(ceil_divide(g.out_width, kStagePixels));
  g.rows = p.batch() * g.segments * g.out_height;
  const int64_t pixels = std::min<int64_t>(round_up(g.out_width, kStepPixels), kStagePixels);
  g.pitch = weight_pitch(tile.narrow ? int(pixels) : kStagePixels);
  g.stage_rows = kMostPitch / g.pitch;
  g.ring = std::min(tile.slots() * kMostPitch / g.pitch - tile.mirrored(), kMaxRing);
  // One wave of blocks, or as many as keep shares short.
  const int64_t wave = std::max(1, processors / g.tiles());
  const int64_t waves = ceil_divide(g.rows, wave * kMostRows);
  const int64_t wanted = std::max<int64_t>(1, std::min(wave * waves, g.rows / kFewestRows));
  g.splits = int(std::min(wanted, std::max<int64_t>(1, parts)));
  g.channel_kinds = kinds(p.output.stride[1]);
  g.row_kinds = kinds(p.output.stride[2]);
  g.smallest = smallest_element(products(p), p.batch() * p.output_pixels(), 1);
  return g;
}

// Seconds, by cycles of a row: of the tensor cores, or of those that prepare it (to gather phases
// of the input takes longer). Rows that share a stage save little. Measured on an H200.
double estimate(const ConvProblem& p, const WeightGemm& g, const WeightTile& tile,
                const Device& device) {
  constexpr double kMultiply = 2.1, kPromote = 400, kGather = 1900, kLaunchSeconds = 25e-6;
  constexpr double kPrepare = 3200, kSharedSaves = 0.1, kIeeeShared = 1.15;
  constexpr double kPrepareLayers = 4900, kIeeeLayers = 5600;
  constexpr double kFlopsOfCycle = 256, kBandwidthFraction = 0.65, kLayersFraction = 0.8;
  const bool layered = tile.layers > 1, ieee = products(p) == 3;
  const int columns = tile.window() * tile.octets * kOctet;
  const int steps = (g.pitch - kReach) / kStepPixels;
  double multiply = kMultiply * steps * products(p) * tile.kernel_w * columns;
  if (tile.narrow) multiply += kPromote;
  double prepare = kPrepare;
  if (layered) prepare = ieee ? kIeeeLayers : kPrepareLayers;
  if (g.stage_rows > 1)
    prepare *= (1 - kSharedSaves * (g.stage_rows - 1)) * (ieee ? kIeeeShared : 1);
  if (g.phases() > 1) prepare += kGather;
  const double row = std::max(multiply, prepare);
  const double clock = device.fp32_flops / (kFlopsOfCycle * device.processors);
  const int64_t waves = ceil_divide(int64_t{g.tiles()} * g.splits, device.processors);
  const double rows = double(waves) * double(ceil_divide(g.rows, g.splits));
  const double fraction = layered ? kLayersFraction : kBandwidthFraction;
  return kLaunchSeconds + std::max(rows * row / clock, p.bytes() / (device.bandwidth * fraction));
}

bool fits(const ConvProblem& p, const WeightTile& tile) {
  const bool strided = p.stride.h > 1 || p.stride.w > 1;
  if (!tile.narrow && tile.layers == 1 && (strided || kinds(p.output.stride[1]) > 1)) return false;
  const int64_t taps = std::min<int64_t>(tile.kernel_w, phase_taps(p).w);
  return (taps - 1) * p.dilation.w <= kReach;
}

int64_t part_bytes(const ConvProblem& p) { return p.weight.numel() * int64_t(sizeof(float)); }
// A byte a block.
int64_t flag_bytes(const WeightGemm& g) { return round_up(int64_t{g.tiles()} * g.splits, 256); }
int64_t workspace_bytes(const ConvProblem& p, const WeightGemm& g) {
  return flag_bytes(g) + g.splits * part_bytes(p);
}

// The fastest by estimate, or none.
std::optional<Plan> make_plan(const ConvProblem& p, const Device& device, int64_t parts) {
  std::optional<Plan> best;
  for (const WeightTile& tile : kWeightTiles) {
    if (!fits(p, tile)) continue;
    const WeightGemm gemm = describe(p, tile, device.processors, parts);
    const double seconds = estimate(p, gemm, tile, device);
    if (!best || seconds < best->seconds) best = {tile, gemm, seconds};
  }
  return best;
}

class ImplicitGemmWeight final : public Algorithm {
 public:
  std::string name() const override { return "implicit_gemm_weight"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& problem, const Device& device) const override {
    const ConvProblem p = join_rows(problem);
    if (device.compute_capability != 90) return "made for compute capability 9.0 (Hopper)";
    if (p.dtype != DType::kFloat32) return "float32 only";
    if (p.direction != Direction::kBackwardWeight) return "only backward-weight";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    if ((p.stride.h > 1 && p.kernel().h > 1 && p.dilation.h > 1) ||
        (p.stride.w > 1 && p.kernel().w > 1 && p.dilation.w > 1))
      return "a stride and a dilation in one direction";
    if (p.weight.numel() == 0 || p.batch() * p.output_pixels() == 0) return "nothing to sum";
    if (p.input.stride[3] != 1) return "input's column stride " + std::to_string(p.input.stride[3]);
    // What a tensor map wants.
    constexpr int64_t kMaxStride = int64_t{1} << 36;
    if (p.output.stride[3] != 1)
      return "grad_output's column stride " + std::to_string(p.output.stride[3]);
    for (int i = 0; i < 3; ++i) {
      const int64_t stride = p.output.stride[i];
      if (stride < 1 || stride >= kMaxStride || (i == 0 && stride % kVector != 0))
        return "grad_output's stride " + std::to_string(stride) + " in dimension " +
               std::to_string(i);
    }
    if (p.group_out_channels() % kinds(p.output.stride[1]) != 0)
      return "rows of " + std::to_string(p.group_out_channels()) + " out channels that begin in " +
             std::to_string(kinds(p.output.stride[1])) + " places of 16 bytes";
    for (const int64_t extent :
         {p.batch(), p.in_channels(), p.out_channels(), p.input.size[2], p.input.size[3],
          p.output.size[2], p.output.size[3] * (p.batch() + 1), p.padding.h, p.padding.w,
          p.kernel().h * p.dilation.h, p.kernel().w * p.dilation.w,
          p.group_in_channels() * phases(p).h * phases(p).w,
          p.stride.h * (p.output.size[2] + kStagePixels),
          p.stride.w * (p.output.size[3] + kStagePixels + kReach)})
      if (extent >= kMaxExtent) return "a side or padding of 2^30 or more";
    const std::optional<Plan> plan = make_plan(p, device, 1);
    if (!plan) return "a dilation of " + std::to_string(p.dilation.w);
    if (plan->gemm.rows >= kMaxExtent) return "2^30 rows or more";
    return "";
  }

  double cost(const ConvProblem& problem, const Device& device) const override {
    const ConvProblem p = join_rows(problem);
    const Plan plan = *make_plan(p, device, INT64_MAX);
    return plan.seconds + 2 * double(plan.gemm.splits * part_bytes(p)) / device.bandwidth;
  }

  WorkspaceRange workspace(const ConvProblem& problem, const Device& device) const override {
    const ConvProblem p = join_rows(problem);
    return {workspace_bytes(p, make_plan(p, device, 1)->gemm),
            workspace_bytes(p, make_plan(p, device, INT64_MAX)->gemm)};
  }

  void run(const ConvProblem& problem, const Operands& operands,
           const Execution& execution) const override {
    const ConvProblem p = join_rows(problem);
    Plan plan = *make_plan(p, *execution.device, INT64_MAX);
    if (workspace_bytes(p, plan.gemm) > execution.workspace_bytes) {
      const int64_t flags = flag_bytes(plan.gemm);
      plan = *make_plan(p, *execution.device, (execution.workspace_bytes - flags) / part_bytes(p));
    }
    WeightGemm& g = plan.gemm;
    auto* const workspace = static_cast<uint8_t*>(execution.workspace);
    WeightOperands gemm{static_cast<const float*>(operands.input),
                        static_cast<const float*>(operands.output),
                        reinterpret_cast<float*>(workspace + flag_bytes(g)),
                        workspace,
                        {}};
    make_grad_maps(p, plan.tile, g, gemm);
    sum_weight_parts_sm90(g, plan.tile, products(p), gemm, p.output, execution.stream);
    add_weight_parts(p.weight, gemm.partial, g.splits, static_cast<float*>(operands.weight),
                     execution.stream);
  }

 private:
  // Every row of a kind, from the last multiple of 16 bytes before where the first begins.
  static void make_grad_maps(const ConvProblem& p, const WeightTile& tile, WeightGemm& g,
                             WeightOperands& gemm) {
    const auto& [size, stride] = p.output;
    const int64_t astray =
        int64_t(reinterpret_cast<uintptr_t>(gemm.grad) / sizeof(float)) % kVector;
    for (int channel = 0; channel < g.channel_kinds; ++channel)
      for (int row = 0; row < std::min<int64_t>(g.row_kinds, size[2]); ++row) {
        const int64_t first = channel * stride[1] + row * stride[2] + astray;
        const int64_t before = first % kVector;
        const int kind = channel * g.row_kinds + row;
        g.row_begins[kind] = int(before);
        gemm.maps[kind] =
            make_map(gemm.grad - astray + first - before,
                     {size[3] + before, ceil_divide(size[2] - row, g.row_kinds),
                      size[1] / g.channel_kinds, size[0]},
                     {g.row_kinds * stride[2], g.channel_kinds * stride[1], stride[0]},
                     {g.pitch, 1, tile.out_channels() / g.channel_kinds, 1});
      }
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_implicit_gemm_weight() {
  return std::make_unique<ImplicitGemmWeight>();
}

}  // namespace convops::cuda

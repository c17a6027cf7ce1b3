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

int products(const ConvProblem& p) { return p.precision == Precision::kIeee ? 3 : 1; }

// `parts`: that memory allows.
WeightGemm describe(const ConvProblem& p, const WeightTile& tile, int processors, int64_t parts) {
  WeightGemm g{};
  g.groups = int(p.groups);
  g.channels = int(p.group_in_channels());
  g.out_channels = int(p.group_out_channels());
  g.height = int(p.input.size[2]);
  g.width = int(p.input.size[3]);
  g.out_height = int(p.output.size[2]);
  g.out_width = int(p.output.size[3]);
  g.kernel_h = int(p.kernel().h);
  g.kernel_w = int(p.kernel().w);
  g.padding_h = int(p.padding.h);
  g.padding_w = int(p.padding.w);
  g.dilation_h = g.kernel_h > 1 ? int(p.dilation.h) : 1;
  g.dilation_w = g.kernel_w > 1 ? int(p.dilation.w) : 1;
  g.image_stride = p.input.stride[0];
  g.channel_stride = p.input.stride[1];
  g.row_stride = p.input.stride[2];
  g.channel_tiles = int(ceil_divide(g.channels, tile.channels()));
  g.out_channel_tiles = int(ceil_divide(g.out_channels, tile.out_channels()));
  g.taps_h = int(ceil_divide(g.kernel_h, tile.kernel_h));
  g.taps_w = int(ceil_divide(g.kernel_w, tile.kernel_w));
  g.segments = int(ceil_divide(g.out_width, kStagePixels));
  g.rows = p.batch() * g.segments * g.out_height;
  // One wave of blocks, or as many as keep shares short.
  const int64_t wave = std::max(1, processors / g.tiles());
  const int64_t waves = ceil_divide(g.rows, wave * kMostRows);
  const int64_t wanted = std::max<int64_t>(1, std::min(wave * waves, g.rows / kFewestRows));
  g.splits = int(std::min(wanted, std::max<int64_t>(1, parts)));
  g.row_kinds = int(kVector / std::gcd(p.output.stride[2], int64_t{kVector}));
  g.smallest = smallest_element(products(p), p.batch() * p.output_pixels(), 1);
  return g;
}

// Seconds, by cycles of a stage: of the tensor cores, or of those that prepare it. Measured on an
// H200.
double estimate(const ConvProblem& p, const WeightGemm& g, const WeightTile& tile,
                const Device& device) {
  constexpr double kMultiply = 2.1, kPrepare = 3100, kLaunchSeconds = 25e-6;
  constexpr double kFlopsOfCycle = 256, kBandwidthFraction = 0.65;
  const int columns = tile.kernel_h * tile.octets * kOctet;
  const double multiply = kMultiply * (kStagePixels / 16) * products(p) * tile.kernel_w * columns;
  const double clock = device.fp32_flops / (kFlopsOfCycle * device.processors);
  const int64_t waves = ceil_divide(int64_t{g.tiles()} * g.splits, device.processors);
  const double stages = double(waves) * double(ceil_divide(g.rows, g.splits));
  return kLaunchSeconds + std::max(stages * std::max(multiply, kPrepare) / clock,
                                   p.bytes() / (device.bandwidth * kBandwidthFraction));
}

bool reaches(const ConvProblem& p, const WeightTile& tile) {
  const int64_t taps = std::min<int64_t>(tile.kernel_w, p.kernel().w);
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
    if (!reaches(p, tile)) continue;
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

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (device.compute_capability != 90) return "made for compute capability 9.0 (Hopper)";
    if (p.dtype != DType::kFloat32) return "float32 only";
    if (p.direction != Direction::kBackwardWeight) return "only backward-weight";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    if (p.stride.h != 1 || p.stride.w != 1) return window_text(p) + ": only stride 1";
    if (p.weight.numel() == 0 || p.batch() * p.output_pixels() == 0) return "nothing to sum";
    if (p.input.stride[3] != 1) return "input's column stride " + std::to_string(p.input.stride[3]);
    // What a tensor map wants.
    constexpr int64_t kMaxStride = int64_t{1} << 36;
    if (p.output.stride[3] != 1)
      return "grad_output's column stride " + std::to_string(p.output.stride[3]);
    for (int i = 0; i < 3; ++i) {
      const int64_t stride = p.output.stride[i];
      if (stride < 1 || stride >= kMaxStride || (i < 2 && stride % kVector != 0))
        return "grad_output's stride " + std::to_string(stride) + " in dimension " +
               std::to_string(i);
    }
    for (const int64_t extent :
         {p.batch(), p.in_channels(), p.out_channels(), p.input.size[2], p.input.size[3],
          p.output.size[2], p.output.size[3] * (p.batch() + 1), p.padding.h, p.padding.w,
          p.kernel().h * p.dilation.h, p.kernel().w * p.dilation.w})
      if (extent >= kMaxExtent) return "a side or padding of 2^30 or more";
    const std::optional<Plan> plan = make_plan(p, device, 1);
    if (!plan) return "a dilation of " + std::to_string(p.dilation.w);
    if (plan->gemm.rows >= kMaxExtent) return "2^30 rows or more";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    const Plan plan = *make_plan(p, device, INT64_MAX);
    return plan.seconds + 2 * double(plan.gemm.splits * part_bytes(p)) / device.bandwidth;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    return {workspace_bytes(p, make_plan(p, device, 1)->gemm),
            workspace_bytes(p, make_plan(p, device, INT64_MAX)->gemm)};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
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
    for (int kind = 0; kind < std::min<int64_t>(g.row_kinds, size[2]); ++kind) {
      const int64_t first = kind * stride[2] + astray, before = first % kVector;
      g.row_begins[kind] = int(before);
      gemm.maps[kind] = make_map(
          gemm.grad - astray + first - before,
          {size[3] + before, ceil_divide(size[2] - kind, g.row_kinds), size[1], size[0]},
          {g.row_kinds * stride[2], stride[1], stride[0]}, {kRawPitch, 1, tile.out_channels(), 1});
    }
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_implicit_gemm_weight() {
  return std::make_unique<ImplicitGemmWeight>();
}

}  // namespace convops::cuda

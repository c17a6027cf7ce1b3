// implicit_gemm_weight: backward-weight of dense and grouped convolutions of float32, float16 and
// bfloat16 tensors on Hopper's tensor cores, straight from NCHW (of 16 bits from channels_last,
// too): no columns. Its kernels are in implicit_gemm_weight_kernel.cuh, the sum of their parts in
// weight_parts.cu.
// docs/implicit_gemm_weight.md tells how and how fast.
#include "cuda/implicit_gemm_weight.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <numeric>
#include <optional>
#include <span>

#include "cuda/algorithms.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_parts.h"

namespace convops::cuda {
namespace {

// A thread adds the sums of so many rows at most, one after the other: that bounds the rounding
// error of large batches. A share of fewer rows is not worth a block's start.
constexpr int64_t kMostRows = 4096, kFewestRows = 8;

constexpr double kEvenSplits = 0.9;  // of the blocks, that must be left where shares are even
constexpr int kVectorBytes = 16;
constexpr int kWarpRows = 16;  // out channels of a warp: of one kind

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

int64_t vector(const ConvProblem& p) { return vector_elements(int(element_size(p.dtype))); }

// The rows of an image as one row, where all its pixels follow each other and are multiplied one by
// one.
ConvProblem join_rows(ConvProblem p) {
  const auto joins = [](const Tensor4& t) {
    return t.size[2] == 1 || t.stride[2] == t.size[3] * t.stride[3];
  };
  if (!p.is_pointwise() || !joins(p.input) || !joins(p.output)) return p;
  for (Tensor4* const t : {&p.input, &p.output}) {
    t->size[3] *= t->size[2];
    t->size[2] = 1;
    t->stride[2] = round_up(t->size[3] * t->stride[3], vector(p));
  }
  return p;
}

bool is_half(const ConvProblem& p) { return element_size(p.dtype) == 2; }
int products(const ConvProblem& p) {
  return !is_half(p) && p.precision == Precision::kIeee ? 3 : 1;
}

// Of places in 16 bytes, of what is so many elements apart.
int kinds_log(const ConvProblem& p, int64_t stride) {
  return std::countr_zero(uint64_t(vector(p) / std::gcd(stride, vector(p))));
}
RowKinds row_kinds(const ConvProblem& p, const Tensor4& t) {
  return {kinds_log(p, t.stride[1]), kinds_log(p, t.stride[2]), {}};
}

// What tensor maps want of strides.
bool maps(const ConvProblem& p, const Tensor4& t, int dimension) {
  const int64_t stride = t.stride[dimension];
  return stride > 0 && stride < kMaxMapStride && (dimension > 0 || stride % vector(p) == 0);
}
bool has_octets(const ConvProblem& p, const Tensor4& t) {
  return cuda::has_octets(int(element_size(p.dtype)), t);
}
// Boxes of channels must begin with 16 aligned bytes.
bool has_grad_channels(const ConvProblem& p) {
  return has_octets(p, p.output) && (p.groups == 1 || p.group_out_channels() % kOctet == 0) &&
         maps(p, p.output, 0) && maps(p, p.output, 2) && maps(p, p.output, 3);
}

InputWay input_way(const ConvProblem& p) {
  const Pair phase = phases(p);
  if (phase.h * phase.w > 1) return InputWay::kElements;
  if (has_octets(p, p.input) && p.group_in_channels() % kOctet == 0) return InputWay::kOctets;
  const RowKinds kinds = row_kinds(p, p.input);
  const bool boxes = p.stride.w == 1 && p.input.stride[3] == 1 && maps(p, p.input, 0) &&
                     maps(p, p.input, 1) && maps(p, p.input, 2) &&
                     kinds.channels() * kinds.rows() <= kMaxRowKinds &&
                     p.input.size[1] >= kinds.channels() && p.input.size[2] >= kinds.rows() &&
                     (p.groups == 1 || p.group_in_channels() % kinds.channels() == 0);
  return boxes ? InputWay::kBoxes : InputWay::kElements;
}

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
  g.column_stride = p.input.stride[3];
  g.grad_last = has_grad_channels(p);
  g.grad_kinds = g.grad_last ? RowKinds{} : row_kinds(p, p.output);
  g.input_way = is_half(p) ? input_way(p) : InputWay::kElements;
  g.input_kinds = g.input_way == InputWay::kBoxes ? row_kinds(p, p.input) : RowKinds{};
  g.channel_tiles =
      int(ceil_divide(round_up(g.channels, kOctet << g.input_kinds.channels_log), tile.channels()));
  g.out_channel_tiles = int(ceil_divide(g.out_channels, tile.out_channels()));
  g.taps_h = int(ceil_divide(taps.h, tile.kernel_h));
  g.taps_w = int(ceil_divide(taps.w, tile.kernel_w));
  g.segments = int(ceil_divide(g.out_width, kStagePixels));
  g.images = int(p.batch());
  g.rows = int64_t{g.images} * g.segments * g.out_height;
  const int64_t pixels = std::min<int64_t>(round_up(g.out_width, kStepPixels), kStagePixels);
  g.pitch = weight_pitch(tile.narrow ? int(pixels) : kStagePixels);
  g.stage_rows = kMostPitch / g.pitch;
  g.ring = std::min(tile.slots(is_half(p)) * kMostPitch / g.pitch - tile.mirrored(), kMaxRing);
  // One wave of blocks, or as many as keep shares short.
  const int64_t wave = std::max(1, processors / g.tiles());
  const int64_t waves = ceil_divide(g.rows, wave * kMostRows);
  const int64_t wanted = std::max<int64_t>(1, std::min(wave * waves, g.rows / kFewestRows));
  g.splits = int(std::min(wanted, std::max<int64_t>(1, parts)));
  // Shares that begin at the same rows of all segments (Rows), where that costs few blocks.
  const int even = g.splits / g.segments * g.segments;
  if (g.out_height > 1 && even >= kEvenSplits * g.splits) g.splits = even;
  g.smallest = smallest_element(products(p), p.batch() * p.output_pixels(), 1);
  return g;
}

int64_t part_bytes(const ConvProblem& p) { return p.weight.numel() * int64_t(sizeof(float)); }

// Of a block's rows of so many cycles, or of what memory moves, where it moves a fraction of what
// it could.
double estimate_rows(const ConvProblem& p, const WeightGemm& g, double row, double fraction,
                     const Device& device) {
  constexpr double kFlopsOfCycle = 256;
  const double clock = device.fp32_flops / (kFlopsOfCycle * device.processors);
  const int64_t waves = ceil_divide(int64_t{g.tiles()} * g.splits, device.processors);
  const double rows = double(waves) * double(ceil_divide(g.rows, g.splits));
  return std::max(rows * row / clock, p.bytes() / (device.bandwidth * fraction));
}

// Seconds, by cycles of a row: of the tensor cores, or of those that prepare it (to gather phases
// of the input takes longer). Rows that share a stage save little. Measured on an H200.
double estimate_float(const ConvProblem& p, const WeightGemm& g, const WeightTile& tile,
                      const Device& device) {
  constexpr double kMultiply = 2.1, kPromote = 400, kGather = 1900, kLaunchSeconds = 25e-6;
  constexpr double kPrepare = 3200, kSharedSaves = 0.1, kIeeeShared = 1.15;
  constexpr double kPrepareLayers = 4900, kIeeeLayers = 5600;
  constexpr double kBandwidthFraction = 0.65, kLayersFraction = 0.8;
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
  const double fraction = layered ? kLayersFraction : kBandwidthFraction;
  const double parts = 2 * double(g.splits * part_bytes(p)) / device.bandwidth;
  return kLaunchSeconds + parts +
         estimate_rows(p, g, std::max(multiply, prepare), fraction, device);
}

// The same of 16 bits, where instructions take as long as if columns were multiples of 32, 16
// channels of a row are prepared at a time, and small blocks take most of their time to store parts
// of many numbers a thread.
double estimate_half(const ConvProblem& p, const WeightGemm& g, const WeightTile& tile,
                     const Device& device) {
  constexpr double kMultiply = 1.35, kInstruction = 45, kRow = 300, kLaunchSeconds = 15e-6;
  constexpr double kBandwidthFraction = 0.65, kPartsFraction = 0.07;
  constexpr int kPieceChannels = 16, kColumns = 32;
  const int64_t columns = round_up(tile.window() * tile.octets * kOctet, kColumns);
  const int steps = (g.pitch - kReach) / kStepPixels;
  const double multiply = steps * tile.kernel_w * (kMultiply * columns + kInstruction) + kRow;
  const double piece = g.input_way == InputWay::kBoxes    ? 1070
                       : g.input_way == InputWay::kOctets ? 690
                                                          : 5300.0 * g.pitch / kMostPitch;
  const double prepare = piece * tile.layers * ceil_divide(tile.slot_channels(), kPieceChannels);
  const double parts = double(g.splits * part_bytes(p)) / (device.bandwidth * kPartsFraction);
  return kLaunchSeconds + parts +
         estimate_rows(p, g, std::max(multiply, prepare), kBandwidthFraction, device);
}

bool fits(const ConvProblem& p, const WeightTile& tile) {
  const bool strided = p.stride.h > 1 || p.stride.w > 1;
  const int channel_kinds = has_grad_channels(p) ? 1 : row_kinds(p, p.output).channels();
  if (!is_half(p) && !tile.narrow && tile.layers == 1 && (strided || channel_kinds > 1))
    return false;
  if (channel_kinds * kWarpRows > tile.out_channels()) return false;
  const int64_t taps = std::min<int64_t>(tile.kernel_w, phase_taps(p).w);
  return (taps - 1) * p.dilation.w <= kReach;
}

// A byte a block.
int64_t flag_bytes(const WeightGemm& g) { return round_up(int64_t{g.tiles()} * g.splits, 256); }
int64_t workspace_bytes(const ConvProblem& p, const WeightGemm& g) {
  return flag_bytes(g) + g.splits * part_bytes(p);
}

// The fastest by estimate, or none.
std::optional<Plan> make_plan(const ConvProblem& p, const Device& device, int64_t parts) {
  std::optional<Plan> best;
  const std::span<const WeightTile> tiles =
      is_half(p) ? std::span<const WeightTile>(kHalfWeightTiles) : kFloatWeightTiles;
  for (const WeightTile& tile : tiles) {
    if (!fits(p, tile)) continue;
    const WeightGemm gemm = describe(p, tile, device.processors, parts);
    const double seconds =
        is_half(p) ? estimate_half(p, gemm, tile, device) : estimate_float(p, gemm, tile, device);
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
    if (p.dtype == DType::kFloat64) return "no float64";
    if (p.direction != Direction::kBackwardWeight) return "only backward-weight";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    if ((p.stride.h > 1 && p.kernel().h > 1 && p.dilation.h > 1) ||
        (p.stride.w > 1 && p.kernel().w > 1 && p.dilation.w > 1))
      return "a stride and a dilation in one direction";
    if (p.weight.numel() == 0 || p.batch() * p.output_pixels() == 0) return "nothing to sum";
    if (!is_half(p) && p.input.stride[3] != 1)
      return "input's column stride " + std::to_string(p.input.stride[3]);
    if (const std::string reason = refuse_grad(p); !reason.empty()) return reason;
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
    return make_plan(p, device, INT64_MAX)->seconds;
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
    WeightOperands gemm{operands.input,
                        operands.output,
                        reinterpret_cast<float*>(workspace + flag_bytes(g)),
                        workspace,
                        {},
                        {}};
    const auto is_astray = [](const void* tensor) {
      return reinterpret_cast<uintptr_t>(tensor) % kVectorBytes != 0;
    };
    g.is_astray = g.grad_last && is_astray(gemm.grad);
    if (g.input_way == InputWay::kOctets && is_astray(gemm.input))
      g.input_way = InputWay::kElements;
    if (g.grad_last && !g.is_astray)
      gemm.grad_maps[0] = make_channels_map(p, g, gemm.grad);
    else if (!g.grad_last)
      make_row_maps(p, p.output, gemm.grad, g.pitch,
                    plan.tile.out_channels() / g.grad_kinds.channels(), g.grad_kinds,
                    gemm.grad_maps);
    if (g.input_way == InputWay::kBoxes)
      make_row_maps(p, p.input, gemm.input, weight_raw_pitch(g.pitch), kOctet, g.input_kinds,
                    gemm.input_maps);
    const auto sum_parts = p.dtype == DType::kFloat32   ? sum_weight_parts_float
                           : p.dtype == DType::kFloat16 ? sum_weight_parts_half
                                                        : sum_weight_parts_bfloat16;
    sum_parts(g, plan.tile, products(p), gemm, p.output, execution.stream);
    add_weight_parts(p.weight, gemm.partial, g.splits, p.dtype, operands.weight, execution);
  }

 private:
  // Why the copy engine cannot have grad_output.
  static std::string refuse_grad(const ConvProblem& p) {
    if (has_grad_channels(p)) return "";
    if (p.output.stride[3] != 1)
      return "grad_output's column stride " + std::to_string(p.output.stride[3]);
    for (int i = 0; i < 3; ++i)
      if (!maps(p, p.output, i))
        return "grad_output's stride " + std::to_string(p.output.stride[i]) + " in dimension " +
               std::to_string(i);
    const RowKinds kinds = row_kinds(p, p.output);
    if (p.group_out_channels() % kinds.channels() != 0 ||
        kinds.channels() * kinds.rows() > kMaxRowKinds)
      return "rows of " + std::to_string(p.group_out_channels()) + " out channels that begin in " +
             std::to_string(kinds.channels()) + " × " + std::to_string(kinds.rows()) +
             " places of 16 bytes";
    return "";
  }

  // Every row of a kind, from the last multiple of 16 bytes before where the first begins.
  static void make_row_maps(const ConvProblem& p, const Tensor4& t, const void* data, int pixels,
                            int channels, RowKinds& kinds, CUtensorMap* maps) {
    const auto& [size, stride] = t;
    const int bytes = int(element_size(p.dtype));
    const auto address = reinterpret_cast<uintptr_t>(data);
    const int64_t astray = int64_t(address % kVectorBytes) / bytes;
    for (int channel = 0; channel < kinds.channels(); ++channel)
      for (int row = 0; row < std::min<int64_t>(kinds.rows(), size[2]); ++row) {
        const int64_t first = channel * stride[1] + row * stride[2] + astray;
        const int64_t before = first % vector(p);
        const int kind = kinds.kind(channel, row);
        kinds.begins[kind] = int(before);
        maps[kind] = make_map(static_cast<const uint8_t*>(data) + (first - before - astray) * bytes,
                              {size[3] + before, ceil_divide(size[2] - row, kinds.rows()),
                               ceil_divide(size[1] - channel, kinds.channels()), size[0]},
                              {kinds.rows() * stride[2], kinds.channels() * stride[1], stride[0]},
                              {pixels, 1, channels, 1}, bytes);
      }
  }
  static CUtensorMap make_channels_map(const ConvProblem& p, const WeightGemm& g,
                                       const void* data) {
    const auto& [size, stride] = p.output;
    return make_map(data, {size[1], size[3], size[2], size[0]}, {stride[3], stride[2], stride[0]},
                    {kBoxChannels, g.pitch - kReach, 1, 1}, int(element_size(p.dtype)),
                    kBoxChannels * 2);
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_implicit_gemm_weight() {
  return std::make_unique<ImplicitGemmWeight>();
}

}  // namespace convops::cuda

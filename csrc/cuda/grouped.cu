// Grouped convolution with few channels a group, forward and backward-input, on tensor cores: the
// choice of the kernel and of the bands its warps walk down. How the kernel works: grouped.cuh.
//
// float32 as `ieee`: three TF32 products of an element's two parts (four for 1×1, whose sums are
// short). As `tf32`: one.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/grouped.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

using namespace grouped;

constexpr int64_t kMaxChannels = 64;  // of a group: dense kernels are better from there on
constexpr int64_t kMaxGridY = 65535;
// Coordinates are int: a side times the stride (2) plus a kernel must fit.
constexpr int64_t kMaxSide = int64_t{1} << 29;

using Forward3 = Taps<Direction::kForward, 3, 1, 0>;
using Forward3Strided = Taps<Direction::kForward, 3, 2, 0>;
using Forward1 = Taps<Direction::kForward, 1, 1, 0>;
template <int kParity>
using Backward3Strided = Taps<Direction::kBackwardInput, 3, 2, kParity>;
// The sums of both phases of rows and columns leave no registers for a second tile.
template <typename Taps>
constexpr int kMaxTiles = Taps::kPhases > 1 ? 1 : 2;
// Of a step and tile.
template <typename Taps>
constexpr int64_t kFragments = Taps::kSize * Taps::kSize * kWarp;

// Calls f with the Taps of the problem; false if none are compiled.
template <typename F>
bool with_taps(const ConvProblem& p, F&& f) {
  if (p.kernel().h != p.kernel().w || p.stride.h != p.stride.w) return false;
  const int64_t size = p.kernel().h, stride = p.stride.h;
  if (size == 1 && stride == 1) return f(Forward1{}), true;
  if (size != 3 || stride > 2) return false;
  if (stride == 1) return f(Forward3{}), true;
  if (p.direction == Direction::kForward) return f(Forward3Strided{}), true;
  if (p.padding.h % 2 != p.padding.w % 2) return false;
  if (p.padding.h % 2) return f(Backward3Strided<1>{}), true;
  return f(Backward3Strided<0>{}), true;
}

// Whether the direction is computed with the weight's axes exchanged.
bool is_backward(const ConvProblem& p) { return p.direction == Direction::kBackwardInput; }
const Tensor4& source_of(const ConvProblem& p) { return is_backward(p) ? p.output : p.input; }
const Tensor4& result_of(const ConvProblem& p) { return is_backward(p) ? p.input : p.output; }
int64_t source_channels(const ConvProblem& p) {
  return is_backward(p) ? p.group_out_channels() : p.group_in_channels();
}
int64_t result_channels(const ConvProblem& p) {
  return is_backward(p) ? p.group_in_channels() : p.group_out_channels();
}
// Groups that share the channels of an instruction.
int64_t merged_groups(const ConvProblem& p) {
  return std::clamp<int64_t>(kOctet / std::max(source_channels(p), result_channels(p)), 1,
                             p.groups);
}

// How the work is divided; what `cost` and `run` agree on.
struct Division {
  int64_t steps, merges;    // octets of source channels; merged groups
  int64_t strips, cells_h;  // of an image
  int64_t tiles, blocks;    // octets of result channels of a block; blocks of a merged group
  int64_t rows, items;      // of a band; strips · bands
  int64_t shared_bytes;
  double blocks_per_processor;  // at a time
  double row_waves;             // rows that a multiprocessor's warps walk down one after the other
};

// Rows of a band of the images' rows of cells on top of each other that its warps walk down: when
// it enters an image, kDelay of its own come before the first that is complete.
template <typename Taps>
int64_t steps_of(int64_t rows, int64_t images, int64_t cells_h) {
  const int64_t entered = cells_h % rows == 0   ? 1
                          : rows % cells_h == 0 ? rows / cells_h
                                                : std::min(images, (rows - 2) / cells_h + 2);
  return rows + entered * Taps::kDelay;
}

template <typename Taps, int kProducts>
Division divide(const ConvProblem& p, const Device& device) {
  // Of every architecture since sm_80.
  constexpr int64_t kMaxShared = 99 * 1024;
  // Rows as long as it takes to begin: to find the strips, and to pack a tile's weights.
  constexpr double kStartRows = 2, kPackRows = 1;

  Division d{};
  const int64_t merged = merged_groups(p);
  const Tensor4& result = result_of(p);
  d.steps = ceil_divide(merged * source_channels(p), kOctet);
  d.merges = ceil_divide(p.groups, merged);
  d.strips = ceil_divide(ceil_divide(result.size[3], Taps::kPhases), kCells);
  d.cells_h = ceil_divide(result.size[2], Taps::kPhases);
  const int64_t octets = ceil_divide(merged * result_channels(p), kOctet);
  const int64_t images = result.size[0], all_rows = images * d.cells_h;

  // Waves of blocks, each as long as its band is high: high bands load fewer rows twice, low ones
  // leave less of the last wave idle.
  for (int64_t tiles = 1; tiles <= kMaxTiles<Taps>; ++tiles) {
    const int64_t shared =
        int64_t{kWarps * kRingBytes<Taps>} +
        d.steps * tiles * kFragments<Taps> * int64_t{sizeof(WeightFragment<kProducts>)};
    if (octets % tiles != 0 || (tiles > 1 && shared > kMaxShared)) continue;
    const int64_t resident = (tiles > 1 ? kResidentBlocks<Taps, kProducts, 2>
                                        : kResidentBlocks<Taps, kProducts, 1>)*device.processors;
    const int64_t lines = d.merges * (octets / tiles);  // of blocks that share a band
    const int64_t strips_of_block = kWarps * kStrips;
    const int64_t least = ceil_divide(lines * ceil_divide(d.strips, strips_of_block), resident);
    const auto consider = [&](int64_t rows) {
      const int64_t items = d.strips * ceil_divide(all_rows, rows);
      const int64_t blocks = ceil_divide(items, strips_of_block) * lines;
      const double row_waves =
          double(ceil_divide(blocks, resident)) *
          (double(steps_of<Taps>(rows, images, d.cells_h)) + kStartRows + kPackRows * tiles);
      if (d.rows != 0 && row_waves >= d.row_waves) return;
      d.tiles = tiles;
      d.blocks = octets / tiles;
      d.rows = rows;
      d.items = items;
      d.shared_bytes = shared;
      d.blocks_per_processor = double(std::min(blocks, resident)) / device.processors;
      d.row_waves = row_waves;
    };
    constexpr int64_t kMoreWaves = 8;
    for (int64_t waves = least; waves < least + kMoreWaves; ++waves) {
      // The lowest bands of so many waves, and the next that begin and end with an image.
      const int64_t bands = waves * resident / lines * strips_of_block / d.strips;
      const int64_t rows = ceil_divide(all_rows, std::clamp<int64_t>(bands, 1, all_rows));
      consider(rows);
      consider(rows <= d.cells_h ? ceil_divide(d.cells_h, d.cells_h / rows)
                                 : round_up(rows, d.cells_h));
    }
  }
  return d;
}

// The largest vector of results, up to 4, that is aligned wherever a strip begins.
int vector_of(const Tensor4& t, const void* data, int64_t element) {
  for (const int count : {4, 2})
    if (t.size[3] % count == 0 && t.stride[0] % count == 0 && t.stride[1] % count == 0 &&
        t.stride[2] % count == 0 && reinterpret_cast<uintptr_t>(data) % (count * element) == 0)
      return count;
  return 1;
}

template <typename Taps>
Grouped describe(const ConvProblem& p, const Division& d, const void* source_data,
                 const void* result_data) {
  const Tensor4 &source = source_of(p), &result = result_of(p), &w = p.weight;
  const bool backward = is_backward(p);
  const bool turned = backward && Taps::kForward;
  const auto origin = [&](int64_t padding) {
    if (turned) return int(padding - (Taps::kSize - 1));
    return Taps::kForward ? int(-padding) : int(padding / Taps::kPhases + Taps::kFirst);
  };
  const auto bytes = [](int64_t elements) { return elements * int64_t{sizeof(float)}; };
  constexpr int64_t kLast = Taps::kSize - 1;
  const int64_t octets = (d.steps - 1) * kOctet * source.stride[1];
  const int64_t image_cells = d.cells_h + Taps::kDelay;
  return {.source_image = source.stride[0],
          .source_channel = source.stride[1],
          .source_row = source.stride[2],
          .next_octet = bytes(kOctet * source.stride[1]),
          .next_row = bytes(source.stride[2] - octets),
          .next_source = bytes(source.stride[0] - image_cells * Taps::kSources * source.stride[2]),
          .result_image = result.stride[0],
          .result_channel = result.stride[1],
          .result_row = result.stride[2],
          .next_cell = bytes(Taps::kPhases * result.stride[2]),
          .next_result = bytes(result.stride[0] - image_cells * Taps::kPhases * result.stride[2]),
          .source_height = int(source.size[2]),
          .source_width = int(source.size[3]),
          .result_height = int(result.size[2]),
          .result_width = int(result.size[3]),
          .origin_h = origin(p.padding.h),
          .origin_w = origin(p.padding.w),
          .end_row = int(origin(p.padding.h) + image_cells * Taps::kSources),
          .source_channels = int(source_channels(p)),
          .result_channels = int(result_channels(p)),
          .groups = int(p.groups),
          .merged = int(merged_groups(p)),
          .weight_first = turned ? kLast * (w.stride[2] + w.stride[3]) : 0,
          .weight_group = p.group_out_channels() * w.stride[0],
          .weight_result = w.stride[backward ? 1 : 0],
          .weight_source = w.stride[backward ? 0 : 1],
          .weight_row = turned ? -w.stride[2] : w.stride[2],
          .weight_column = turned ? -w.stride[3] : w.stride[3],
          .bias_stride = p.bias_stride,
          .strips = int(d.strips),
          .cells_h = int(d.cells_h),
          .rows = int(d.rows),
          .all_rows = int(result.size[0] * d.cells_h),
          .items = int(d.items),
          .steps = int(d.steps),
          .source_vector = (origin(p.padding.w) + Taps::kAligned) % kCells
                               ? 1
                               : vector_of(source, source_data, element_size(p.dtype)),
          .result_vector = vector_of(result, result_data, element_size(p.dtype)),
          .skips_outside = backward};
}

template <typename Taps, int kProducts, int kTiles, bool kResident>
void launch(const ConvProblem& p, const Operands& operands, const Division& d,
            cudaStream_t stream) {
  const bool backward = is_backward(p);
  const auto source = static_cast<const float*>(backward ? operands.output : operands.input);
  const auto weight = static_cast<const float*>(operands.weight);
  const auto bias = static_cast<const float*>(operands.bias);
  const auto result = static_cast<float*>(backward ? operands.input : operands.output);
  const dim3 grid(unsigned(ceil_divide(d.items, kWarps * kStrips)), unsigned(d.merges * d.blocks));
  constexpr int64_t kSharedByDefault = 48 * 1024;
  const auto kernel = grouped_kernel<Taps, kProducts, kTiles, kResident>;
  if (d.shared_bytes > kSharedByDefault)
    CONVOPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            int(d.shared_bytes)));
  kernel<<<grid, kThreads, d.shared_bytes, stream>>>(describe<Taps>(p, d, source, result), source,
                                                     weight, bias, result);
  CONVOPS_LAUNCH_CHECK("grouped");
}

template <typename Taps, int kProducts>
void launch_tiles(const ConvProblem& p, const Operands& operands, const Division& d,
                  cudaStream_t stream) {
  if constexpr (kMaxTiles<Taps> > 1)
    if (d.tiles > 1) return launch<Taps, kProducts, 2, false>(p, operands, d, stream);
  if (d.steps > 1) return launch<Taps, kProducts, 1, false>(p, operands, d, stream);
  launch<Taps, kProducts, 1, true>(p, operands, d, stream);
}

// Calls f with the Taps and the number of products of the problem.
template <typename F>
void with_kernel(const ConvProblem& p, F&& f) {
  with_taps(p, [&](auto taps) {
    // Sums of 1×1 are so short that the product of the low parts shows.
    constexpr int kProducts = decltype(taps)::kSize > 1 ? 3 : 4;
    if (p.precision == Precision::kTf32)
      f(taps, std::integral_constant<int, 1>{});
    else
      f(taps, std::integral_constant<int, kProducts>{});
  });
}

class GroupedConv final : public Algorithm {
 public:
  std::string name() const override { return "grouped"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (p.direction == Direction::kBackwardWeight) return "backward-weight";
    if (p.dtype != DType::kFloat32) return std::string("dtype ") + to_string(p.dtype);
    if (p.groups < 2) return "one group";
    const int64_t most = std::max(p.group_in_channels(), p.group_out_channels());
    if (p.group_in_channels() < 2 || p.group_out_channels() < 2)
      return "groups of a single channel";
    if (most > kMaxChannels) return "groups of " + std::to_string(most) + " channels";
    if (p.is_dilated()) return "dilated";
    if (!with_taps(p, [](auto) {}))
      return "no kernel of " + window_text(p) + " and padding " + std::to_string(p.padding.h) +
             'x' + std::to_string(p.padding.w) + " is compiled";
    for (const Tensor4* t : {&p.input, &p.output})
      if (!t->has_dense_columns())
        return "columns " + std::to_string(t->stride[3]) + " elements apart";
    for (const Pair side : {p.input_size(), p.output_size(), p.padding})
      if (std::max(side.h, side.w) > kMaxSide) return "a side or padding of more than 2^29";
    if (p.groups * ceil_divide(kMaxChannels, kOctet) > kMaxGridY)
      return std::to_string(p.groups) + " groups";
    const Tensor4& result = result_of(p);
    // Steps of all strips; an image has at most kDelay more than rows.
    if (result.size[0] * (result.size[2] + Forward3::kDelay) * ceil_divide(result.size[3], kCells) >
        INT32_MAX / 2)
      return "more than 2^32 pixels";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted to measurements on an H200: a step's seconds if its warp is alone, and what each of a
    // multiprocessor's blocks adds for the copies it starts, the columns it splits and the
    // products, and after a row's last step for its results, which go in pieces like the copies;
    // the share of the bandwidth that is reached.
    constexpr double kStepSeconds = 94e-9, kCopySeconds = 9e-9, kColumnSeconds = 9.4e-9;
    constexpr double kMmaSeconds = 2.7e-9, kStoreSeconds = 37e-9;
    constexpr double kBandwidthShare = 0.51, kLaunchSeconds = 3.8e-6;
    if (p.result().numel() == 0) return kLaunchSeconds;
    double seconds = 0;
    with_kernel(p, [&](auto taps, auto products) {
      using Taps = decltype(taps);
      const Division d = divide<Taps, products>(p, device);
      constexpr double kColumns = 2 * Taps::kColumns * Taps::kSources;
      const double copies =
          double(2 * Taps::kVectors * kCells) / vector_of(source_of(p), nullptr, sizeof(float));
      const double mmas = double(Taps::kSize * Taps::kSize * products * kMmas * d.tiles);
      const double step =
          kStepSeconds + d.blocks_per_processor * (copies * kCopySeconds +
                                                   kColumns * kColumnSeconds + mmas * kMmaSeconds);
      const double stores = double(d.tiles * Taps::kPhases * Taps::kPhases) * copies;
      const double row = double(d.steps) * step + d.blocks_per_processor * stores * kStoreSeconds;
      seconds = std::max(d.row_waves * row, p.bytes() / (device.bandwidth * kBandwidthShare));
    });
    return seconds + kLaunchSeconds;
  }

  WorkspaceRange workspace(const ConvProblem&, const Device&) const override { return {0, 0}; }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    if (p.result().numel() == 0) return;
    const auto stream = static_cast<cudaStream_t>(execution.stream);
    with_kernel(p, [&](auto taps, auto products) {
      using Taps = decltype(taps);
      launch_tiles<Taps, products>(p, operands, divide<Taps, products>(p, *execution.device),
                                   stream);
    });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_grouped() { return std::make_unique<GroupedConv>(); }

}  // namespace convops::cuda

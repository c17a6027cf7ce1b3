// Depthwise convolution (channel multiplier 1, stride 1) with large kernels: bound by arithmetic,
// not by memory. One kernel for all directions, the correlation of two planes,
//
//   result[r, q] = sum over i, j of source[r + i - pad_h, q + j - pad_w] · filter[i, j]
//
//                    source        filter                      result         pad
//   forward          input         weight                      output         p
//   backward-input   grad_output   weight turned by 180°       grad_input     k - 1 - p
//   backward-weight  input         grad_output, summed over    grad_weight    p
//                                  images
//
// A block has one channel. It stages planes of the source and the filter in shared memory, so that
// every element is read from memory once, and hands the arithmetic to a core: FMA units for float32
// (depthwise_large_fma.cuh), tensor cores for float16 and bfloat16 (depthwise_large_mma.cuh).
// Planes larger than shared memory are cut: tiles of the result, or of the filter where that is
// grad_output. Several small planes share a block.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/depthwise_large.cuh"
#include "cuda/depthwise_large_fma.cuh"
#include "cuda/depthwise_large_mma.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

using namespace large;

// Coordinates are int: a side plus a kernel and a padding must fit.
constexpr int64_t kMaxSide = int64_t{1} << 29;
constexpr int64_t kMaxChunks = INT32_MAX, kMaxGridYZ = 65535;
// What every architecture has, and what leaves room for three blocks on an H200.
constexpr int64_t kMaxShared = 99 << 10, kWantedShared = 64 << 10;
// Sides of a tile of grad_output; 56 columns are what the diagonals of an MmaCore hold.
constexpr int64_t kFilterTileRows = 64, kFilterTileColumns = 56;
// What to fill the device with.
constexpr int64_t kBlocksPerProcessor = 3;
// A sum has short blocks, which hide how they wait for the planes of the next stage.
constexpr int64_t kSumBlocksPerProcessor = 8;

// Fewer rows a block than this only to fit shared memory.
constexpr int64_t kFewestRows = 16;
// Products a thread adds one after the other; bounds the rounding error of long sums.
constexpr int64_t kMaxChain = 8192;

// The size of the parts of equal size, none larger than `most`, that `size` is cut into.
int64_t even_part(int64_t size, int64_t most) {
  return size == 0 ? 1 : ceil_divide(size, ceil_divide(size, most));
}

// What cutting needs to know of a core: a unit of `threads` has `rows` rows of `columns` results.
struct CoreShape {
  bool tensor_cores;
  int64_t threads, rows, columns;
  int64_t units_w;       // side by side at most
  int64_t max_filter;    // columns
  int64_t filter_pitch;  // of a tensor core's filter
  int64_t element;       // bytes
};
template <int kColumns>
CoreShape shape_of(FmaCore<kColumns>*) {
  return {false, 1, 1, kColumns, 64 / kColumns, kMaxSide, 0, sizeof(float)};
}
template <typename T, int kTiles, int kSteps>
CoreShape shape_of(MmaCore<T, kTiles, kSteps>*) {
  using Core = MmaCore<T, kTiles, kSteps>;
  return {true,     kWarp, Core::kRows, Core::kColumns, 1, Core::kMaxFilter, Core::kFilterPitch,
          sizeof(T)};
}

// Calls f with a null pointer to the core for the problem.
template <typename F>
void with_core(const ConvProblem& p, F&& f) {
  const int64_t results = p.result().size[3];
  const int64_t filter = p.direction == Direction::kBackwardWeight
                             ? even_part(p.output.size[3], kFilterTileColumns)
                             : p.kernel().w;
  if (p.dtype == DType::kFloat32) {
    // The share of the FMA peak a width reaches is in `rate`; a wide thread computes more columns
    // that nobody wants.
    const auto seconds = [&](int64_t columns, double rate) {
      return double(round_up(results, columns)) / rate;
    };
    const double narrow = seconds(8, 0.6), middle = seconds(16, 0.8), wide = seconds(28, 0.87);
    if (wide <= std::min(narrow, middle))
      f(static_cast<FmaCore<28>*>(nullptr));
    else if (middle <= narrow)
      f(static_cast<FmaCore<16>*>(nullptr));
    else
      f(static_cast<FmaCore<8>*>(nullptr));
    return;
  }
  const auto with_type = [&]<typename T>(T) {
    const auto with_tiles = [&]<int kTiles>(std::integral_constant<int, kTiles>) {
      if (filter <= MmaCore<T, kTiles, 2>::kMaxFilter)
        f(static_cast<MmaCore<T, kTiles, 2>*>(nullptr));
      else if (filter <= MmaCore<T, kTiles, 3>::kMaxFilter)
        f(static_cast<MmaCore<T, kTiles, 3>*>(nullptr));
      else
        f(static_cast<MmaCore<T, kTiles, 4>*>(nullptr));
    };
    if (results <= MmaCore<T, 2, 2>::kColumns)
      with_tiles(std::integral_constant<int, 2>());
    else if (results <= MmaCore<T, 4, 2>::kColumns)
      with_tiles(std::integral_constant<int, 4>());
    else
      with_tiles(std::integral_constant<int, 7>());
  };
  if (p.dtype == DType::kFloat16)
    with_type(__half());
  else
    with_type(__nv_bfloat16());
}

Planes planes_of(const Tensor4& t) {
  return {t.stride[0], t.stride[1], t.stride[2], t.stride[3], int(t.size[2]), int(t.size[3])};
}

// A problem cut into blocks.
struct Cut {
  Correlation work;
  int64_t tiles;  // of the result
  int64_t threads, shared;

  int64_t blocks() const { return work.chunks * work.channels * tiles; }

  int64_t result_elements() const { return work.channels * work.result.height * work.result.width; }
};

// The threads and the shared memory that tiles of these sizes take.
void lay_out(const CoreShape& core, Cut& cut) {
  Correlation& w = cut.work;
  const int64_t units_w = ceil_divide(w.tile_columns, core.columns);
  const int64_t units_h = ceil_divide(w.rows(), core.rows);
  cut.threads = round_up(w.groups() * units_h * units_w * core.threads, kWarp);

  constexpr int64_t kVector = 16;  // bytes; a pitch is an odd number of them
  const int64_t a_vector = kVector / core.element;
  const int64_t columns = core.tensor_cores
                              ? round_up(w.tile_columns, a_vector) +
                                    round_up(w.filter_columns + a_vector - 1, 2 * a_vector)
                              : units_w * core.columns + round_up(w.filter_columns, a_vector);
  const int64_t pitch = (ceil_divide(columns, a_vector) | 1) * a_vector;
  const int64_t rows = std::min<int64_t>(w.source.height, w.tile_rows + w.filter_rows - 1);
  const int64_t filter_pitch =
      core.tensor_cores ? core.filter_pitch : round_up(w.filter_columns, a_vector);
  const int64_t filter_items = w.sum ? w.stage_items : 1;
  const int64_t begin = pitch + w.stage_items * rows * pitch;
  const int64_t elements = begin + filter_items * w.filter_rows * filter_pitch;
  cut.shared = std::max(elements * core.element,
                        w.groups() * w.rows() * w.tile_columns * int64_t(sizeof(float)));
  if (cut.shared > kMaxShared) return;  // the rest may not fit int
  w.source_pitch = int(pitch);
  w.source_item = int(rows * pitch);
  w.filter_pitch = int(filter_pitch);
  w.filter_item = int(w.filter_rows * filter_pitch);
  w.filter_begin = int(begin);
  w.elements = int(elements);
}

// Forward and backward-input: a block's threads get a unit each, of one tile of a large plane or of
// several small planes, or several a unit's rows of the filter; smaller parts where blocks are few.
Cut cut_pixels(Cut cut, const CoreShape& core, int64_t images, int64_t processors) {
  Correlation& w = cut.work;
  w.filter_rows = w.filter.height;
  w.filter_columns = w.filter.width;
  w.filter_tiles_w = w.filter_tiles = 1;
  w.items = images;
  const int64_t units_w = ceil_divide(w.tile_columns, core.columns);
  const int64_t tiles_w = ceil_divide(w.result.width, w.tile_columns);
  const int64_t most_rows = kMaxThreads / core.threads / units_w * core.rows;
  int64_t rows = w.result.height, items = 1;
  if (rows > most_rows)
    rows = round_up(even_part(rows, most_rows), core.rows);
  else
    items = std::clamp<int64_t>(most_rows / std::max<int64_t>(rows, 1), 1,
                                std::max<int64_t>(images, 1));
  for (;;) {
    items = even_part(images, items);
    w.stage_items = int(items);
    w.tile_rows = int(rows);
    w.items_each = items;
    w.chunks = ceil_divide(images, items);
    // Threads without rows take rows of the filter.
    const int64_t units = ceil_divide(items * rows, core.rows) * units_w * core.threads;
    w.splits = int(std::clamp<int64_t>(kMaxThreads / units, 1, w.filter_rows));
    lay_out(core, cut);
    cut.tiles = ceil_divide(w.result.height, rows) * tiles_w;
    if (items > 1 &&
        (cut.shared > kWantedShared || cut.blocks() < kBlocksPerProcessor * processors))
      items = ceil_divide(items, 2);
    else if (rows > 1 &&
             (cut.shared > kMaxShared || (cut.blocks() < processors && rows > kFewestRows)))
      rows = ceil_divide(rows, 2);
    else
      return cut;
  }
}

// Backward-weight: the threads of a stage share out its images or, where these are few, their rows.
Cut cut_sum(Cut cut, const CoreShape& core, int64_t images, int64_t processors,
            int64_t workspace_bytes) {
  Correlation& w = cut.work;
  const int64_t units_w = ceil_divide(w.tile_columns, core.columns);
  const int64_t most_rows = kMaxThreads / core.threads / units_w * core.rows;
  w.tile_rows = int(even_part(w.result.height, most_rows));
  cut.tiles =
      ceil_divide(w.result.height, w.tile_rows) * ceil_divide(w.result.width, w.tile_columns);
  w.filter_columns = int(even_part(w.filter.width, kFilterTileColumns));
  w.filter_rows = int(even_part(w.filter.height, kFilterTileRows));
  w.filter_tiles_w = int(ceil_divide(w.filter.width, w.filter_columns));
  const int64_t groups =
      kMaxThreads / (ceil_divide(w.tile_rows, core.rows) * units_w * core.threads);
  int64_t items = groups;
  for (;;) {
    const int64_t tiles = w.filter_tiles_w * ceil_divide(w.filter.height, w.filter_rows);
    w.filter_tiles = int(tiles);
    w.items = images * tiles;
    items = tiles > 1 ? 1 : std::clamp<int64_t>(items, 1, std::max<int64_t>(images, 1));
    w.stage_items = int(items);
    w.splits = int(std::clamp<int64_t>(groups / items, 1, w.filter_rows));
    lay_out(core, cut);
    const bool few = w.items / items * w.channels * cut.tiles < processors;
    if (items > 1 && (cut.shared > kWantedShared || few))
      items = ceil_divide(items, 2);
    else if (cut.shared > kMaxShared && w.filter_rows > 1)
      w.filter_rows = int(ceil_divide(w.filter_rows, 2));
    else
      break;
  }
  // As many chunks as fill the device or keep sums short, as the workspace allows.
  const int64_t fill =
      kSumBlocksPerProcessor * processors / std::max<int64_t>(1, w.channels * cut.tiles);
  const int64_t products = int64_t(w.filter_rows) * w.filter_columns * w.items / w.stage_items /
                           w.splits;  // one after the other
  const int64_t affordable =
      workspace_bytes / std::max<int64_t>(1, cut.result_elements() * int64_t(sizeof(float)));
  const int64_t chunks =
      std::max<int64_t>(1, std::min({std::max(fill, ceil_divide(products, kMaxChain)),
                                     ceil_divide(w.items, w.stage_items), affordable}));
  w.items_each = round_up(ceil_divide(std::max<int64_t>(w.items, 1), chunks), w.stage_items);
  w.chunks = std::max<int64_t>(1, ceil_divide(w.items, w.items_each));
  return cut;
}

Cut cut_problem(const ConvProblem& p, const Device& device, const CoreShape& core,
                int64_t workspace_bytes) {
  const bool input = p.direction == Direction::kBackwardInput;
  const bool sum = p.direction == Direction::kBackwardWeight;
  const Pair kernel = p.kernel();
  Cut cut{};
  Correlation& w = cut.work;
  w.source = planes_of(input ? p.output : p.input);
  w.filter = planes_of(sum ? p.output : p.weight);
  w.result = planes_of(input ? p.input : sum ? p.weight : p.output);
  w.pad_h = int(input ? kernel.h - 1 - p.padding.h : p.padding.h);
  w.pad_w = int(input ? kernel.w - 1 - p.padding.w : p.padding.w);
  if (!sum) w.filter.channel = w.filter.image, w.filter.image = 0;
  if (sum) w.result.channel = w.result.image, w.result.image = 0;
  if (input) w.filter.row = -w.filter.row, w.filter.column = -w.filter.column;
  w.sum = sum;
  w.padding_is_zeros = !input;
  w.channels = p.in_channels();
  w.bias_stride = p.bias_stride;
  const int64_t unit = core.tensor_cores ? 8 : core.columns;
  w.tile_columns = int(std::min<int64_t>(
      w.result.width, round_up(even_part(w.result.width, core.columns * core.units_w), unit)));
  return sum ? cut_sum(cut, core, p.batch(), device.processors, workspace_bytes)
             : cut_pixels(cut, core, p.batch(), device.processors);
}

Cut cut_problem(const ConvProblem& p, const Device& device, int64_t workspace_bytes) {
  Cut cut;
  with_core(p, [&](auto core) { cut = cut_problem(p, device, shape_of(core), workspace_bytes); });
  return cut;
}

// Adds the chunks in order; rounds once.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    add_chunks_kernel(const __grid_constant__ Correlation p, const float* __restrict__ partial,
                      T* __restrict__ result) {
  const int64_t plane = int64_t(p.result.height) * p.result.width, count = p.channels * plane;
  const int64_t element = int64_t(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (element >= count) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += partial[chunk * count + element];
  const int64_t channel = element / plane, row = element % plane / p.result.width;
  result[channel * p.result.channel + row * p.result.row +
         element % p.result.width * p.result.column] = convert<T>(sum);
}

template <typename Core>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  using T = typename Core::T;
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  const Cut cut = cut_problem(p, *execution.device, shape_of(static_cast<Core*>(nullptr)),
                              execution.workspace_bytes);
  if (cut.blocks() == 0) return;
  const Correlation& w = cut.work;
  const bool input = p.direction == Direction::kBackwardInput;
  const auto source = static_cast<const T*>(input ? operands.output : operands.input);
  const auto result = static_cast<T*>(input   ? operands.input
                                      : w.sum ? operands.weight
                                              : operands.output);
  auto filter = static_cast<const T*>(w.sum ? operands.output : operands.weight);
  if (input)  // from its last element on
    filter +=
        (w.filter.height - 1) * p.weight.stride[2] + (w.filter.width - 1) * p.weight.stride[3];
  const auto partial = w.sum && w.chunks > 1 ? static_cast<float*>(execution.workspace) : nullptr;
  CONVOPS_CUDA_CHECK(cudaFuncSetAttribute(kernel<Core>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(cut.shared)));
  const dim3 grid(unsigned(w.chunks), unsigned(w.channels), unsigned(cut.tiles));
  kernel<Core><<<grid, unsigned(cut.threads), size_t(cut.shared), stream>>>(
      w, source, filter, static_cast<const T*>(operands.bias), result, partial);
  CONVOPS_LAUNCH_CHECK("depthwise_large");
  if (!partial) return;
  add_chunks_kernel<T>
      <<<unsigned(ceil_divide(cut.result_elements(), kMaxThreads)), kMaxThreads, 0, stream>>>(
          w, partial, result);
  CONVOPS_LAUNCH_CHECK("depthwise_large sum of chunks");
}

class DepthwiseLarge final : public Algorithm {
 public:
  std::string name() const override { return "depthwise_large"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (!p.is_depthwise()) return "not depthwise";
    if (p.group_out_channels() != 1)
      return "channel multiplier " + std::to_string(p.group_out_channels());
    if (p.dtype == DType::kFloat64) return "float64";
    const Pair kernel = p.kernel();
    if (p.stride.h > 1 || p.stride.w > 1)
      return "stride " + std::to_string(p.stride.h) + 'x' + std::to_string(p.stride.w);
    if (p.is_dilated()) return "dilated";
    for (const Pair side : {p.input_size(), p.output_size(), p.padding, kernel})
      if (std::max(side.h, side.w) > kMaxSide) return "a side or padding of more than 2^29";
    std::string reason;
    with_core(p, [&](auto core) {
      const CoreShape shape = shape_of(core);
      if (p.direction != Direction::kBackwardWeight && kernel.w > shape.max_filter) {
        reason = "a 16-bit kernel wider than " + std::to_string(shape.max_filter);
        return;
      }
      const Cut cut = cut_problem(p, device, shape, 0);
      if (cut.shared > kMaxShared)
        reason = "needs " + std::to_string(cut.shared) + " bytes of shared memory, a block has " +
                 std::to_string(kMaxShared);
      else if (p.in_channels() > kMaxGridYZ)
        reason = std::to_string(p.in_channels()) + " channels, more than a grid has";
      else if (cut.tiles > kMaxGridYZ)
        reason = std::to_string(cut.tiles) + " tiles of a plane, more than a grid has";
      else if (p.batch() > kMaxChunks)
        reason = "more than 2^31 images";
    });
    return reason;
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted on an H200. To stage and store an element takes as long as so many FMAs at the peak,
    // more where it does not go with three others, and most where columns are apart, a sector of
    // memory each, some of which come out of L2; the products, those with zeros of a core's tiles
    // included, reach these shares of it. A block's elements take kElementSeconds each, its
    // threads, where they wait for tensor cores, kThreadSeconds; then the next wave begins.
    constexpr double kElementFmas = 90, kLoneElementFmas = 220, kApartElementFmas = 450;
    constexpr double kFmaShare = 0.7, kMmaShare = 4;
    constexpr double kElementSeconds = 0.85e-9, kThreadSeconds = 13e-9;
    constexpr int64_t kResidentThreads = 1024;
    constexpr double kLaunchSeconds = 6.7e-6, kHalfLaunchSeconds = 6e-6, kSecondLaunch = 3e-6;
    const bool apart = p.input.stride[3] != 1 || p.output.stride[3] != 1;
    const bool tensor_cores = p.dtype != DType::kFloat32;
    const bool sum = p.direction == Direction::kBackwardWeight;
    const double results = double(sum ? p.kernel().w : p.result().size[3]);
    const double filter = double(sum ? p.output.size[3] : p.kernel().w);
    const double columns = double(round_up(int64_t(results), tensor_cores ? 8 : 4)) / results;
    const double taps = tensor_cores ? double(round_up(int64_t(filter) + 7, 16)) / filter
                                     : double(round_up(int64_t(filter), 4)) / filter;
    const Cut cut = cut_problem(p, device, INT64_MAX);
    const int64_t plane = int64_t(cut.work.source.height) * cut.work.source.width;
    const bool in_fours = plane % 4 == 0 && (sum || cut.tiles == 1);
    const double elements = p.bytes() / double(element_size(p.dtype));
    const double fmas = p.flops() / 2 * columns * taps / (tensor_cores ? kMmaShare : kFmaShare) +
                        elements * (apart      ? kApartElementFmas
                                    : in_fours ? kElementFmas
                                               : kLoneElementFmas);
    const double of_a_block = elements / double(std::max<int64_t>(1, cut.blocks()));
    const int64_t resident =
        device.processors * (kResidentThreads / std::max<int64_t>(kWarp, cut.threads));
    const double waves = double(ceil_divide(cut.blocks(), resident));
    const double threads = tensor_cores ? waves * double(cut.threads) : 0;
    return std::max({fmas / (device.fp32_flops / 2), of_a_block * kElementSeconds,
                     threads * kThreadSeconds}) +
           (tensor_cores ? kHalfLaunchSeconds : kLaunchSeconds) +
           (sum && cut.work.chunks > 1 ? kSecondLaunch : 0);
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    if (p.direction != Direction::kBackwardWeight) return {0, 0};
    const Cut cut = cut_problem(p, device, INT64_MAX);
    if (cut.work.chunks == 1) return {0, 0};
    return {0, cut.work.chunks * cut.result_elements() * int64_t(sizeof(float))};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    with_core(p, [&](auto core) {
      launch<std::remove_pointer_t<decltype(core)>>(p, operands, execution);
    });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_depthwise_large() { return std::make_unique<DepthwiseLarge>(); }

}  // namespace convops::cuda

// Forward and backward-input of stride 1: the walk of depthwise_channels_last.cu by warps that each
// have a ring of their own, and wait for no other. Rows above and below the source cost no steps:
// what they would multiply is zero, unless a weight is not finite, and then the results are
// computed once more by the definition. A thread of 3×3 has 4 neighbouring channels, so some lanes
// lie along W.
//
//                    7×7     5×5     3×3
//   channels         1       1       4               a thread
//   sums             49      40      48              registers
//   weights          49      25      36
//   FMA a read       26      17      6               a multiprocessor does 4 in the time of a read
#include "cuda/check.h"
#include "cuda/depthwise_channels_last_pixels.cuh"
#include "cuda/depthwise_channels_last_warps.cuh"
#include "cuda/depthwise_channels_last_warps.h"

namespace convops::cuda::depthwise_channels_last {
namespace {

// How a warp's lanes lie: kLaneBytes of a pixel side by side where threads have several channels.
template <typename W, typename T, int kLaneBytes>
struct Layout {
  static constexpr int kVector = W::kTaps > 9 ? 1 : 4;
  static constexpr int kLanes = W::kTaps > 9 ? kWarp : kLaneBytes / (kVector * int(sizeof(T)));
  static constexpr int kChannels = kLanes * kVector;
  static constexpr int kColumns = kWarp / kLanes * W::kColumns;
  static constexpr int kSourceColumns = W::span(kColumns);
  static constexpr int kStage = kSourceColumns * kChannels;
  // Steps of the ring, all but one of them on the way. What the rings leave of shared memory is L1.
  static constexpr int kStages = kLaneBytes > 128 ? 3 : 4;
  static constexpr int kRingBytes = kStages * kStage * int(sizeof(T));
  static_assert(kTeam * kRingBytes <= kSharedBytes);
};
// Blocks a multiprocessor that the registers leave; as kBlocks.
template <typename W>
constexpr int kTeams =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    W::kTaps > 25 ? 3 : 4;
#else
    2;
#endif

// Grid: x tiles, those of different channels next to each other.
template <typename W, typename T, int kLaneBytes>
__global__ void __launch_bounds__(kTeam* kWarp, kTeams<W>)
    warps_kernel(const __grid_constant__ Pixels p, const T* __restrict__ source,
                 const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ result) {
  using Lanes = Layout<W, T, kLaneBytes>;
  constexpr int kV = Lanes::kVector, kC = Lanes::kChannels, kStages = Lanes::kStages;
  constexpr int kStage = Lanes::kStage;
  extern __shared__ uint4 shared[];

  const Tile tile = p.tiling.tile<kC, Lanes::kColumns>(
      blockIdx.x % unsigned(p.tiling.channel_tiles), blockIdx.x / unsigned(p.tiling.channel_tiles));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_column = tile.column + warp * Lanes::kColumns;
  const int rows = min(p.tiling.rows, p.result.height - tile.row);
  const int steps = rows + W::kLag;
  // The steps that have a row of the source; a warp beyond the last column has none.
  const int tile_row = p.source_row + tile.row, width = p.result.width;
  const int begin = min(steps, max(0, -tile_row));
  const int end =
      warp_column < width ? max(begin, min(steps, p.source.image.height - tile_row)) : begin;

  WarpCopier<T, kC, Lanes::kSourceColumns> copier(
      p.source, source + tile.image * p.source.image.image_stride + tile.channel, tile_row + begin,
      p.source.image.height, p.source_column + warp_column, p.channels - tile.channel);
  T* const ring = reinterpret_cast<T*>(shared) + warp * kStages * kStage;
  WarpPlace<T, kStage, kStages> write(ring, 0);
  const auto copy_step = [&](int step) {
    if (step < end) {
      copier.copy_row(write.place);
      write.next();
    }
    ptx::copy_commit();  // an empty one too, so that the groups can be counted
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy_step(begin + stage);

  if (warp_column >= width) return;
  const int channel = tile.channel + lane % Lanes::kLanes * kV;
  const int channels = p.channels - channel;  // this one and those after it
  const int thread_column = warp_column + lane / Lanes::kLanes * W::kColumns;
  // All at once, from where they lie: a block's through shared memory would be two latencies more.
  float taps[W::kH][W::kW][kV], shift[kV] = {};
#pragma unroll
  for (int tap = 0; tap < W::kTaps * kV; ++tap) {
    const int kh = tap / kV / W::kW, kw = tap / kV % W::kW, v = tap % kV;
    taps[kh][kw][v] =
        v < channels ? convert<float>(weight[p.weight_place(channel + v, kh, kw)]) : 0.0f;
  }
#pragma unroll
  for (int v = 0; v < kV; ++v)
    if (bias && v < channels) shift[v] = convert<float>(bias[(channel + v) * p.bias_stride]);

  // Where the thread's next row goes, and how many of its columns exist.
  T* place = result + tile.image * p.result.image_stride + channel +
             (tile.row - W::kLag) * p.result.row_stride +
             int64_t(thread_column) * p.result.column_stride;
  const int end_column = p.result.width - thread_column;
  const bool together = are_vectors<kV>(place, p.result, channels);

  float sums[W::kOpen][W::kColumns][kV];
#pragma unroll
  for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
    for (int j = 0; j < W::kColumns; ++j)
#pragma unroll
      for (int v = 0; v < kV; ++v) sums[open][j][v] = shift[v];

  int done = -W::kLag;  // the row that sums[0] is
  // Stores the row that a step completes and moves the others up.
  const auto complete = [&] {
    if (done >= 0 && channels > 0)
      store_row<W>(place, p.result.column_stride, 0, end_column, channels, together, sums[0]);
    ++done;
    place += p.result.row_stride;
#pragma unroll
    for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
      for (int j = 0; j < W::kColumns; ++j)
#pragma unroll
        for (int v = 0; v < kV; ++v)
          sums[open][j][v] = open + 1 < W::kOpen ? sums[open + 1][j][v] : shift[v];
  };
  int step = 0;
#pragma unroll 1
  for (; step < begin; ++step) complete();
  WarpPlace<const T, kStage, kStages> read(
      ring, lane / Lanes::kLanes * W::kColumns * kC + channel - tile.channel);
#pragma unroll 1
  for (; step < end; ++step, read.next()) {
    ptx::copy_wait<kStages - 2>();
    __syncwarp();  // the step's rows are there, and those before them are read
    copy_step(step + kStages - 1);
    float values[W::kReads][kV];
#pragma unroll
    for (int i = 0; i < W::kReads; ++i) load_channels(read.place + i * kC, values[i]);
    for_products<W>(0, [&](int open, int kh, int j, int kw, int read) {
#pragma unroll
      for (int v = 0; v < kV; ++v) sums[open][j][v] += taps[kh][kw][v] * values[read][v];
    });
    complete();
  }
#pragma unroll 1
  for (; step < steps; ++step) complete();

  // The walk leaves out rows around the source and multiplies its columns by zeros.
#pragma unroll 1
  for (int v = 0; v < min(kV, channels); ++v) {
    const auto weight_of = [&](int tap) {
      return convert<float>(weight[p.weight_place(channel + v, tap / W::kW, tap % W::kW)]);
    };
    bool finite = true;
    for (int tap = 0; tap < W::kTaps; ++tap) finite &= isfinite(weight_of(tap));
    if (!finite)
      store_by_definition<W, true>(
          p, tile, thread_column, channel + v, weight_of,
          bias ? convert<float>(bias[(channel + v) * p.bias_stride]) : 0.0f, source, result);
  }
}

template <typename W, typename Lanes>
Tiling tiling_of(const ConvProblem& p, const Device& device) {
  const Tensor4& to = p.result();
  return make_tiling<W>(p, to.size[2], to.size[3], kMaxSide, device,
                        {Lanes::kChannels, Lanes::kColumns, kTeam, 12, true});
}

template <typename W, typename T, int kLaneBytes>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  using Lanes = Layout<W, T, kLaneBytes>;
  const bool backward = Pixels::backward(p);
  const Tiling tiling = tiling_of<W, Lanes>(p, *execution.device);
  const int64_t blocks = tiling.count * tiling.channel_tiles;
  if (blocks == 0) return;
  warps_kernel<W, T, kLaneBytes>
      <<<unsigned(blocks), tiling.warps * kWarp, tiling.warps * Lanes::kRingBytes,
         static_cast<cudaStream_t>(execution.stream)>>>(
          Pixels(p, operands, tiling),
          static_cast<const T*>(backward ? operands.output : operands.input),
          static_cast<const T*>(operands.weight), static_cast<const T*>(operands.bias),
          static_cast<T*>(backward ? operands.input : operands.output));
  CONVOPS_LAUNCH_CHECK("depthwise_channels_last by warps");
}

}  // namespace

// 256 of float32, 128 of 16 bits, for memory's sake; half of that, and half again, where more than
// a quarter of the lanes would idle.
int lane_bytes(const ConvProblem& p) {
  const int size = int(element_size(p.dtype)), widest = 64 * size;
  const auto taken = [&](int bytes) { return round_up(p.in_channels() * size, int64_t{bytes}); };
  int bytes = widest;
  while (bytes > widest / 4 && 3 * taken(bytes) > 4 * taken(bytes / 2)) bytes /= 2;
  return bytes;
}

double steps_of_a_row(const ConvProblem& p, const Device& device) {
  double steps = 1;
  with_type(p.dtype, [&](auto tag) {
    const auto f = [&](auto window) {
      using W = decltype(window);
      const Tiling tiling = tiling_of<W, Layout<W, decltype(tag), 128>>(p, device);
      if (tiling.strips > 1) steps += double(W::kLag) / tiling.rows;
    };
    with_window(p, f, Large{});
  });
  return steps;
}

void run_pixels_by_warps(const ConvProblem& p, const Operands& operands,
                         const Execution& execution) {
  with_type(p.dtype, [&](auto tag) {
    const auto f = [&](auto window) {
      using W = decltype(window);
      using T = decltype(tag);
      if constexpr (W::kTaps == 9) {
        constexpr int kWidest = 64 * sizeof(T);
        const int bytes = lane_bytes(p);
        const bool backward = Pixels::backward(p);
        const Source source(Pixels::from(p), backward ? operands.output : operands.input, p.dtype);
        // Chunks of fewer than 16 bytes are more than a warp's lanes where it takes 256.
        if (bytes == kWidest && (kWidest <= 128 || source.chunk_bytes == 16))
          return launch<W, T, kWidest>(p, operands, execution);
        if (bytes >= kWidest / 2) return launch<W, T, kWidest / 2>(p, operands, execution);
        return launch<W, T, kWidest / 4>(p, operands, execution);
      } else {
        launch<W, T, 128>(p, operands, execution);
      }
    };
    with_window(p, f, Small{}) || with_window(p, f, Large{});
  });
}

}  // namespace convops::cuda::depthwise_channels_last

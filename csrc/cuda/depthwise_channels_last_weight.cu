// Backward-weight of depthwise convolution on channels_last tensors: the walk of
// depthwise_channels_last.cu with the roles of weights and sums exchanged. A thread keeps one sum
// of every tap in registers, and of grad_output the kOpen rows of kColumns positions that the row
// of input at hand meets. Rings are for 5×5 and 7×7 where there is much to do; the rest is in
// depthwise_channels_last_weight_registers.cu.
//
// A block works through tiles (chunk, chunk + chunks, ...). After each it adds its warps' sums in a
// tree and the result to its partial sums in the workspace, so no chain of additions in a thread is
// longer than a tile; a second kernel adds the chunks. Every order depends on the problem, the
// device and the workspace only.
#include "cuda/check.h"
#include "cuda/depthwise_channels_last_warps.cuh"
#include "cuda/depthwise_channels_last_weight.h"
#include "cuda/launch.h"
#include "cuda/ptx/launch.cuh"

namespace convops::cuda::depthwise_channels_last {
namespace {

// Products of a chain: this times kColumns.
constexpr int64_t kMostRows = 64;

using StridedLarge = WindowList<Window<5, 5, 1, 2>, Window<7, 7, 1, 2>>;

// Warps that have a ring each: where they have enough to do by themselves.
template <typename W>
constexpr bool kByWarps = W::kDown == 1;
template <typename W>
constexpr int kMostWarps = kByWarps<W> ? kTeam : kMaxWarps;
// Elements of a stage of such a ring: a row of the input, and one of grad_output.
template <typename W, typename T>
constexpr int kWarpStage = (W::span(W::kColumns) + W::kColumns) * kChannels<W, T>;

struct Taps {
  Tiling tiling;
  Source input, grad;
  int channels;
  unsigned chunks;
  int pad_h, pad_w;
};

template <typename W, typename T>
using Sums = float[W::kH][W::kW][kVector<W, T>];

// What a thread's positions add to one tap, by the definition: for inputs that are not finite,
// whose infinities the walk multiplies by the zeros around grad_output.
template <typename W, typename T>
__device__ float sum_by_definition(const Taps& p, const Tile& tile, int kh, int kw, int column,
                                   int channel, const T* input, const T* grad) {
  const T* const from = input + tile.image * p.input.image.image_stride + channel;
  const T* const gradient = grad + tile.image * p.grad.image.image_stride + channel;
  float sum = 0;
#pragma unroll 1
  for (int h = tile.row; h < min(tile.row + p.tiling.rows, p.grad.image.height); ++h)
#pragma unroll 1
    for (int w = column; w < min(column + W::kColumns, p.grad.image.width); ++w) {
      const int row = h * W::kDown + W::kH - 1 - kh - p.pad_h;
      const int source = w * W::kDown + W::kW - 1 - kw - p.pad_w;
      const bool inside = unsigned(row) < unsigned(p.input.image.height) &&
                          unsigned(source) < unsigned(p.input.image.width);
      const float factor = inside
                               ? convert<float>(from[row * p.input.image.row_stride +
                                                     int64_t(source) * p.input.image.column_stride])
                               : 0.0f;
      sum += factor *
             convert<float>(
                 gradient[h * p.grad.image.row_stride + int64_t(w) * p.grad.image.column_stride]);
    }
  return sum;
}

// Adds the warps' sums in a tree; they end in `shared` as [tap][channel].
template <typename W, typename T>
__device__ __forceinline__ void add_warps(float* shared, Sums<W, T>& sums) {
  constexpr int kV = kVector<W, T>, kC = kChannels<W, T>;
  const int warp = threadIdx.x / kWarp, channel = threadIdx.x % kWarp * kV;
  const auto for_sums = [&](int slot, auto&& f) {
    float* const place = shared + slot * W::kTaps * kC + channel;
#pragma unroll
    for (int tap = 0; tap < W::kTaps; ++tap)
#pragma unroll
      for (int v = 0; v < kV; ++v) f(place[tap * kC + v], sums[tap / W::kW][tap % W::kW][v]);
  };
  for (int warps = blockDim.x / kWarp; warps > 1;) {
    const int half = (warps + 1) / 2;
    __syncthreads();
    if (warp >= half && warp < warps)
      for_sums(warp - half, [](float& place, float& sum) { place = sum; });
    __syncthreads();
    if (warp + half < warps) for_sums(warp, [](float& place, float& sum) { sum += place; });
    warps = half;
  }
  __syncthreads();
  if (warp == 0) for_sums(0, [](float& place, float& sum) { place = sum; });
  __syncthreads();
}

// Walks down a tile, the block together; sums start as zeros.
template <typename W, typename T>
__device__ __forceinline__ void walk_block(const Taps& p, const Tile& tile, const T* input,
                                           const T* grad, T* ring, Sums<W, T>& sums) {
  constexpr int kV = kVector<W, T>, kC = kChannels<W, T>, kS = kSteps<W>;
  const int warp = threadIdx.x / kWarp, lane_channel = threadIdx.x % kWarp * kV;
  const int positions = p.tiling.warps * W::kColumns, columns = W::span(positions);
  const int stage_size = kS * (W::kDown * columns + positions) * kC;
  const int rows = min(p.tiling.rows, p.grad.image.height - tile.row);
  const int stages = (rows + W::kLag + kS - 1) / kS;
  Copier<T, kC> input_copier(p.input,
                             input + tile.image * p.input.image.image_stride + tile.channel,
                             tile.row * W::kDown - p.pad_h, p.input.image.height,
                             tile.column * W::kDown - p.pad_w, columns, p.channels - tile.channel);
  Copier<T, kC> grad_copier(p.grad, grad + tile.image * p.grad.image.image_stride + tile.channel,
                            tile.row, tile.row + rows, tile.column, positions,
                            p.channels - tile.channel);
  // A stage: rows of the input, then of grad_output.
  RingPlace<T> write(ring, stage_size, 0);
  const auto copy_stage = [&](int stage) {
    if (stage < stages) {
      input_copier.template copy_rows<kS * W::kDown>(write.place, columns * kC);
      grad_copier.template copy_rows<kS>(write.place + kS * W::kDown * columns * kC,
                                         positions * kC);
      write.next();
    }
    __pipeline_commit();  // an empty one too, so that the groups can be counted
  };

  float gradients[W::kOpen][W::kColumns][kV];
#pragma unroll
  for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
    for (int j = 0; j < W::kColumns; ++j)
#pragma unroll
      for (int v = 0; v < kV; ++v) gradients[open][j][v] = 0;

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy_stage(stage);
  RingPlace<const T> read(ring, stage_size, warp * W::kColumns * W::kDown * kC + lane_channel);
  RingPlace<const T> read_grad(ring, stage_size,
                               (kS * W::kDown * columns + warp * W::kColumns) * kC + lane_channel);
  for (int stage = 0; stage < stages; ++stage, read.next(), read_grad.next()) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // the stage is there, and the one before it is read
    copy_stage(stage + kStages - 1);
    const T *from = read.place, *grad_from = read_grad.place;
#pragma unroll
    for (int step = 0; step < kS; ++step, grad_from += positions * kC) {
#pragma unroll
      for (int open = 0; open + 1 < W::kOpen; ++open)
#pragma unroll
        for (int j = 0; j < W::kColumns; ++j)
#pragma unroll
          for (int v = 0; v < kV; ++v) gradients[open][j][v] = gradients[open + 1][j][v];
#pragma unroll
      for (int j = 0; j < W::kColumns; ++j)
        load_channels(grad_from + j * kC, gradients[W::kOpen - 1][j]);
#pragma unroll
      for (int row = 0; row < W::kDown; ++row, from += columns * kC) {
        float values[W::kReads][kV];
#pragma unroll
        for (int i = 0; i < W::kReads; ++i) load_channels(from + i * kC, values[i]);
        for_products<W>(row, [&](int open, int kh, int j, int kw, int read) {
#pragma unroll
          for (int v = 0; v < kV; ++v) sums[kh][kw][v] += gradients[open][j][v] * values[read][v];
        });
      }
    }
  }
}

// The same, each warp by itself, at stride 1.
template <typename W, typename T>
__device__ __forceinline__ void walk_warp(const Taps& p, const Tile& tile, const T* input,
                                          const T* grad, T* rings, Sums<W, T>& sums) {
  constexpr int kC = kChannels<W, T>, kSourceColumns = W::span(W::kColumns);
  constexpr int kGradients = kSourceColumns * kC;  // where a stage's row of grad_output begins
  constexpr int kStage = kWarpStage<W, T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_column = tile.column + warp * W::kColumns;
  const int rows = min(p.tiling.rows, p.grad.image.height - tile.row);
  const int steps = warp_column < p.grad.image.width ? rows + W::kLag : 0;
  int row = tile.row - p.pad_h;
  WarpCopier<T, kC, kSourceColumns> input_copier(
      p.input, input + tile.image * p.input.image.image_stride + tile.channel, row,
      p.input.image.height, warp_column - p.pad_w, p.channels - tile.channel);
  WarpCopier<T, kC, W::kColumns> grad_copier(
      p.grad, grad + tile.image * p.grad.image.image_stride + tile.channel, tile.row,
      tile.row + rows, warp_column, p.channels - tile.channel);
  T* const ring = rings + warp * kStages * kStage;
  WarpPlace<T, kStage, kStages> write(ring, 0);
  const auto copy_step = [&](int step) {
    if (step < steps) {
      input_copier.copy_row(write.place);
      grad_copier.copy_row(write.place + kGradients);
      write.next();
    }
    ptx::copy_commit();  // an empty one too, so that the groups can be counted
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy_step(stage);

  float gradients[W::kOpen][W::kColumns][1];
#pragma unroll
  for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
    for (int j = 0; j < W::kColumns; ++j) gradients[open][j][0] = 0;
  WarpPlace<const T, kStage, kStages> read(ring, lane);
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ++row, read.next()) {
    ptx::copy_wait<kStages - 2>();
    __syncwarp();  // the step's rows are there, and those before them are read
    copy_step(step + kStages - 1);
#pragma unroll
    for (int open = 0; open + 1 < W::kOpen; ++open)
#pragma unroll
      for (int j = 0; j < W::kColumns; ++j) gradients[open][j][0] = gradients[open + 1][j][0];
#pragma unroll
    for (int j = 0; j < W::kColumns; ++j)
      load_channels(read.place + kGradients + j * kC, gradients[W::kOpen - 1][j]);
    if (unsigned(row) >= unsigned(p.input.image.height)) {
      // Zeros, which only count where an infinity or NaN meets them.
      float zero = 0;
#pragma unroll
      for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
        for (int j = 0; j < W::kColumns; ++j) zero += gradients[open][j][0] * 0.0f;
      if (zero == 0) continue;
    }
    float values[W::kReads][1];
#pragma unroll
    for (int i = 0; i < W::kReads; ++i) load_channels(read.place + i * kC, values[i]);
    for_products<W>(0, [&](int open, int kh, int j, int kw, int read) {
      sums[kh][kw][0] += gradients[open][j][0] * values[read][0];
    });
  }
}

// Partial sums lie [chunk][tap][channel]. Grid: x chunks, those of different channels next to each
// other.
template <typename W, typename T>
__global__ void __launch_bounds__(kMostWarps<W>* kWarp, kWeightBlocks<W>)
    taps_kernel(const __grid_constant__ Taps p, const T* __restrict__ input,
                const T* __restrict__ grad, float* __restrict__ partial) {
  constexpr int kV = kVector<W, T>, kC = kChannels<W, T>;
  extern __shared__ uint4 shared[];
  T* const ring = reinterpret_cast<T*>(shared);
  ptx::launch_dependents();
  const int warp = threadIdx.x / kWarp, lane_channel = threadIdx.x % kWarp * kV;
  const unsigned channel_tile = blockIdx.x % unsigned(p.tiling.channel_tiles);
  const unsigned chunk = blockIdx.x / unsigned(p.tiling.channel_tiles);

  for (unsigned index = chunk; index < p.tiling.count; index += p.chunks) {
    const Tile tile = p.tiling.tile<kC, W::kColumns>(channel_tile, index);
    Sums<W, T> sums;
#pragma unroll
    for (int tap = 0; tap < W::kTaps * kV; ++tap)
      sums[tap / kV / W::kW][tap / kV % W::kW][tap % kV] = 0;
    __syncthreads();  // the last tile's sums are read
    if constexpr (kByWarps<W>)
      walk_warp<W>(p, tile, input, grad, ring, sums);
    else
      walk_block<W>(p, tile, input, grad, ring, sums);

    bool defined = true;
#pragma unroll
    for (int tap = 0; tap < W::kTaps * kV; ++tap)
      defined &= !isnan(sums[tap / kV / W::kW][tap / kV % W::kW][tap % kV]);
    if (!defined) {
#pragma unroll 1
      for (int tap = 0; tap < W::kTaps * kV; ++tap) {
        const int channel = tile.channel + lane_channel + tap % kV;
        const float sum =
            channel < p.channels
                ? sum_by_definition<W>(p, tile, tap / kV / W::kW, tap / kV % W::kW,
                                       tile.column + warp * W::kColumns, channel, input, grad)
                : 0.0f;
#pragma unroll
        for (int i = 0; i < W::kTaps * kV; ++i)  // registers have no index at run time
          if (i == tap) sums[i / kV / W::kW][i / kV % W::kW][i % kV] = sum;
      }
    }
    float* const tile_sums = reinterpret_cast<float*>(shared);
    add_warps<W, T>(tile_sums, sums);
    for (int i = threadIdx.x; i < W::kTaps * kC; i += blockDim.x) {
      const int tap = W::kTaps - 1 - i / kC;  // the walk's taps are turned
      const int channel = tile.channel + i % kC;
      if (channel >= p.channels) continue;
      float* const place = partial + (int64_t(chunk) * W::kTaps + tap) * p.channels + channel;
      *place = index == chunk ? tile_sums[i] : *place + tile_sums[i];
    }
  }
}

// Adds the chunks: a lane an element, a warp every kMaxWarps-th chunk; rounds once.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    reduce_kernel(const __grid_constant__ Tensor4 weight, const float* partial, unsigned chunks,
                  T* __restrict__ result) {
  __shared__ float shared[kMaxWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t elements = weight.numel(), element = int64_t(blockIdx.x) * kWarp + lane;
  const int64_t tap = element / weight.size[0], channel = element % weight.size[0];
  ptx::wait_for_prerequisites();
  float sum = 0;
  if (element < elements) {
#pragma unroll 8
    for (unsigned chunk = warp; chunk < chunks; chunk += kMaxWarps)
      sum += partial[chunk * elements + element];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || element >= elements) return;
#pragma unroll
  for (int other = 1; other < kMaxWarps; ++other) sum += shared[other][lane];
  result[channel * weight.stride[0] + tap / weight.size[3] * weight.stride[2] +
         tap % weight.size[3] * weight.stride[3]] = convert<T>(sum);
}

// The rings, which the tree of add_warps takes over.
template <typename W, typename T>
int shared_bytes(int warps) {
  return std::max(kByWarps<W> ? warps * kStages * kWarpStage<W, T> * int(sizeof(T))
                              : ring_bytes<W, T>(warps, true),
                  std::max(1, warps / 2) * W::kTaps * kChannels<W, T> * int(sizeof(float)));
}

template <typename W, typename T>
Tiling weight_tiling(const ConvProblem& p, const Device& device) {
  Shape shape = block_shape<W, T>(shared_bytes<W, T>);
  if (kByWarps<W>) shape = {kChannels<W, T>, W::kColumns, kTeam, 12, true};
  return make_tiling<W>(p, p.output.size[2], p.output.size[3], kMostRows, device, shape);
}

// One chunk a tile, but no more than keep every multiprocessor busy: partial sums cost bandwidth.
int64_t wanted_chunks(const Tiling& tiling, const Device& device) {
  constexpr int64_t kWarpsPerProcessor = 64;
  const int64_t fill = std::max<int64_t>(
      1, kWarpsPerProcessor * device.processors / (tiling.warps * tiling.channel_tiles));
  const int64_t each = std::max<int64_t>(1, ceil_divide(tiling.count, fill));
  return ceil_divide(tiling.count, each);
}

template <typename W, typename T>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  const Tiling tiling = weight_tiling<W, T>(p, *execution.device);
  // Fewer chunks where the workspace is short.
  const int64_t affordable = execution.workspace_bytes / chunk_bytes(p);
  const Taps taps{
      .tiling = tiling,
      .input = Source(p.input, operands.input, p.dtype),
      .grad = Source(p.output, operands.output, p.dtype),
      .channels = int(p.in_channels()),
      .chunks = unsigned(std::min(wanted_chunks(tiling, *execution.device), affordable)),
      .pad_h = int(p.padding.h),
      .pad_w = int(p.padding.w)};
  if (taps.chunks > 0) {
    taps_kernel<W, T><<<unsigned(taps.chunks * tiling.channel_tiles), tiling.warps * kWarp,
                        shared_bytes<W, T>(tiling.warps), stream>>>(
        taps, static_cast<const T*>(operands.input), static_cast<const T*>(operands.output),
        static_cast<float*>(execution.workspace));
    CONVOPS_LAUNCH_CHECK("depthwise_channels_last backward-weight");
  }
  add_chunks(p, taps.chunks, operands, execution);
}

template <typename F>
void with_kernel(const ConvProblem& p, F&& f) {
  with_type(p.dtype, [&](auto tag) {
    const auto typed = [&](auto window) { f(window, tag); };
    with_window(p, typed, Large{}) || with_window(p, typed, StridedLarge{});
  });
}

}  // namespace

void add_chunks(const ConvProblem& p, int64_t chunks, const Operands& operands,
                const Execution& execution) {
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch_early(reduce_kernel<T>, ceil_divide(p.weight.numel(), kWarp), kMaxWarps * kWarp, 0,
                 execution, p.weight, static_cast<const float*>(execution.workspace),
                 unsigned(chunks), static_cast<T*>(operands.weight));
  });
}

WorkspaceRange weight_workspace(const ConvProblem& p, const Device& device) {
  WorkspaceRange range{};
  if (find_workspace_by_registers(p, device, range)) return range;
  with_kernel(p, [&](auto window, auto tag) {
    using W = decltype(window);
    const Tiling tiling = weight_tiling<W, decltype(tag)>(p, device);
    const int64_t chunks = wanted_chunks(tiling, device);
    range = {std::min<int64_t>(chunks, 1) * chunk_bytes(p), chunks * chunk_bytes(p)};
  });
  return range;
}

void run_weight(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  if (run_weight_by_registers(p, operands, execution)) return;
  with_kernel(p, [&](auto window, auto tag) {
    launch<decltype(window), decltype(tag)>(p, operands, execution);
  });
}

}  // namespace convops::cuda::depthwise_channels_last

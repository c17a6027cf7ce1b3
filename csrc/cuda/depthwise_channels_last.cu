// Depthwise convolution with channel multiplier 1 of tensors whose channels are dense
// (channels_last): forward and backward-input with a stride; those of stride 1 are in
// depthwise_channels_last_warps.cu, those that patches are faster for in
// depthwise_channels_last_patches.cu, backward-weight is in depthwise_channels_last_weight*.cu.
// float32 is IEEE whatever the precision asked for.
//
// Lanes lie along channels, a block's warps side by side along W. The block walks down its tile: it
// copies each row of the source once, through a ring in shared memory that hides the latency, and
// a thread adds what it reads of a row to all the sums that the row belongs to: kOpen rows of
// kColumns positions, in registers, as the weights are. The rows of sums move up with the walk;
// that costs nothing, since a fused multiply-add may write another register than it adds to.
#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/depthwise_channels_last_patches.h"
#include "cuda/depthwise_channels_last_pixels.cuh"
#include "cuda/depthwise_channels_last_warps.h"
#include "cuda/depthwise_channels_last_weight.h"

namespace convops::cuda {
namespace depthwise_channels_last {
namespace {

constexpr int64_t kMaxTiles = int64_t{1} << 29, kMaxLines = int64_t{1} << 30;

// Grid: x tiles, those of different channels next to each other.
template <typename W, typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, (kBlocks<W, T>))
    pixels_kernel(const __grid_constant__ Pixels p, const T* __restrict__ source,
                  const T* __restrict__ weight, const T* __restrict__ bias,
                  T* __restrict__ result) {
  constexpr int kV = kVector<W, T>, kC = kChannels<W, T>, kS = kSteps<W>;
  extern __shared__ uint4 shared[];
  __shared__ float weights[W::kTaps][kC + 1];  // + 1: written along taps, read along channels
  T* const ring = reinterpret_cast<T*>(shared);

  const Tile tile = p.tiling.tile<kC, W::kColumns>(blockIdx.x % unsigned(p.tiling.channel_tiles),
                                                   blockIdx.x / unsigned(p.tiling.channel_tiles));
  const int warp = threadIdx.x / kWarp, channel = threadIdx.x % kWarp * kV;
  const int rows = min(p.tiling.rows, p.result.height - p.result_row - tile.row);
  const int steps = (rows + W::kUp - 1) / W::kUp + W::kLag, stages = (steps + kS - 1) / kS;

  const int columns = W::span(p.tiling.warps * W::kColumns);
  Copier<T, kC> copier(p.source, source + tile.image * p.source.image.image_stride + tile.channel,
                       p.source_row + tile.row / W::kUp * W::kDown, p.source.image.height,
                       p.source_column + tile.column / W::kUp * W::kDown, columns,
                       p.channels - tile.channel);
  const int stage_size = kS * W::kDown * columns * kC;
  RingPlace<T> write(ring, stage_size, 0);
  const auto copy_stage = [&](int stage) {
    if (stage < stages) {
      copier.template copy_rows<kS * W::kDown>(write.place, columns * kC);
      write.next();
    }
    __pipeline_commit();  // an empty one too, so that the groups can be counted
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy_stage(stage);

#pragma unroll 8  // loads in flight
  for (int i = threadIdx.x; i < W::kTaps * kC; i += blockDim.x) {
    const int c = i / W::kTaps, tap = i % W::kTaps;
    weights[tap][c] =
        tile.channel + c < p.channels
            ? convert<float>(weight[p.weight_first + (tile.channel + c) * p.weight_channel +
                                    tap / W::kW * p.weight_row + tap % W::kW * p.weight_column])
            : 0.0f;
  }
  __syncthreads();
  float taps[W::kH][W::kW][kV], shift[kV] = {};
#pragma unroll
  for (int tap = 0; tap < W::kTaps; ++tap)
#pragma unroll
    for (int v = 0; v < kV; ++v) taps[tap / W::kW][tap % W::kW][v] = weights[tap][channel + v];
  const int channels = p.channels - tile.channel - channel;  // this one and those after it
#pragma unroll
  for (int v = 0; v < kV; ++v)
    if (bias && v < channels)
      shift[v] = convert<float>(bias[(tile.channel + channel + v) * p.bias_stride]);

  const int thread_column = tile.column + warp * W::kColumns;
  // Where the thread's next row goes, and which of its rows and columns exist.
  T* place = result + tile.image * p.result.image_stride + tile.channel + channel +
             (tile.row + p.result_row - W::kLag * W::kUp) * p.result.row_stride +
             int64_t(thread_column + p.result_column) * p.result.column_stride;
  const int first_store = max(0, -(tile.row + p.result_row)),
            stores = channels > 0 ? rows - first_store : 0;
  const int first_column = W::kUp == 1 ? 0 : -(thread_column + p.result_column);
  const int end_column = p.result.width - thread_column - p.result_column;
  const bool together = are_vectors<kV>(place, p.result, channels);

  float sums[W::kOpen][W::kColumns][kV];
#pragma unroll
  for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
    for (int j = 0; j < W::kColumns; ++j)
#pragma unroll
      for (int v = 0; v < kV; ++v) sums[open][j][v] = shift[v];

  RingPlace<const T> read(ring, stage_size, warp * W::kColumns / W::kUp * W::kDown * kC + channel);
  for (int stage = 0; stage < stages; ++stage, read.next()) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // the stage is there, and the one before it is read
    copy_stage(stage + kStages - 1);
    const T* from = read.place;
#pragma unroll
    for (int step = 0; step < kS; ++step) {
#pragma unroll
      for (int row = 0; row < W::kDown; ++row, from += columns * kC) {
        float values[W::kReads][kV];
#pragma unroll
        for (int i = 0; i < W::kReads; ++i) load_channels(from + i * kC, values[i]);
        for_products<W>(row, [&](int open, int kh, int j, int kw, int read) {
#pragma unroll
          for (int v = 0; v < kV; ++v) sums[open][j][v] += taps[kh][kw][v] * values[read][v];
        });
      }
      const int done = (stage * kS + step - W::kLag) * W::kUp;
#pragma unroll
      for (int open = 0; open < W::kUp; ++open, place += p.result.row_stride)
        if (unsigned(done + open - first_store) < unsigned(stores))
          store_row<W>(place, p.result.column_stride, first_column, end_column, channels, together,
                       sums[open]);
#pragma unroll
      for (int open = 0; open < W::kOpen; ++open)
#pragma unroll
        for (int j = 0; j < W::kColumns; ++j)
#pragma unroll
          for (int v = 0; v < kV; ++v)
            sums[open][j][v] = open + W::kUp < W::kOpen ? sums[open + W::kUp][j][v] : shift[v];
    }
  }
  if (!p.skips_outside) return;
  for (int v = 0; v < kV; ++v) {
    const auto weight_of = [&](int tap) { return weights[tap][channel + v]; };
    bool finite = true;
    for (int tap = 0; tap < W::kTaps; ++tap) finite &= isfinite(weight_of(tap));
    if (!finite && tile.channel + channel + v < p.channels)
      store_by_definition<W, false>(p, tile, thread_column, tile.channel + channel + v, weight_of,
                                    0.0f, source, result);
  }
}

template <typename W, typename T>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const Tensor4& to = p.result();
  const bool backward = Pixels::backward(p);
  const auto shared_bytes = [](int warps) {
    return ring_bytes<W, T>(warps, false) + int(sizeof(float)) * W::kTaps * (kChannels<W, T> + 1);
  };
  // Where the padding is odd, position 0 lies before the result's first row.
  const int64_t height = to.size[2] + (backward ? p.padding.h % W::kUp : 0);
  const int64_t width = to.size[3] + (backward ? p.padding.w % W::kUp : 0);
  const Tiling tiling = make_tiling<W>(p, height, width, kMaxSide, *execution.device,
                                       block_shape<W, T>(shared_bytes));
  const int64_t blocks = tiling.count * tiling.channel_tiles;
  if (blocks == 0) return;
  pixels_kernel<W, T>
      <<<unsigned(blocks), tiling.warps * kWarp, ring_bytes<W, T>(tiling.warps, false),
         static_cast<cudaStream_t>(execution.stream)>>>(
          Pixels(p, operands, tiling),
          static_cast<const T*>(backward ? operands.output : operands.input),
          static_cast<const T*>(operands.weight), static_cast<const T*>(operands.bias),
          static_cast<T*>(backward ? operands.input : operands.output));
  CONVOPS_LAUNCH_CHECK("depthwise_channels_last");
}

void run_pixels(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  if (run_patches(p, operands, execution)) return;
  if (p.stride.h == 1) return run_pixels_by_warps(p, operands, execution);
  with_type(p.dtype, [&](auto tag) {
    const auto f = [&](auto window) {
      launch<decltype(window), decltype(tag)>(p, operands, execution);
    };
    with_window(p, f, Strided{}) || with_window(p, f, Inserted{});
  });
}

bool is_compiled(const ConvProblem& p) {
  const auto nothing = [](auto) {};
  return with_window(p, nothing, Small{}) || with_window(p, nothing, Large{}) ||
         with_window(p, nothing, Strided{}) || with_window(p, nothing, Inserted{});
}

class DepthwiseChannelsLast final : public Algorithm {
 public:
  std::string name() const override { return "depthwise_channels_last"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (!p.is_depthwise()) return "not depthwise";
    if (p.group_out_channels() != 1)
      return "channel multiplier " + std::to_string(p.group_out_channels());
    if (p.dtype == DType::kFloat64) return "float64";
    if (p.is_dilated()) return "dilated";
    if (!is_compiled(p)) return "no kernel of " + window_text(p) + " is compiled";
    for (const Tensor4* t : {&p.input, &p.output}) {
      if (t->stride[1] != 1 && t->size[1] > 1)
        return "channels are " + std::to_string(t->stride[1]) + " elements apart";
      if (std::max(t->size[2], t->size[3]) > kMaxSide) return "a side of more than 2^29";
      if (t->stride[3] > INT32_MAX) return "columns are more than 2^31 elements apart";
      // Tiles have at least a column, and strips, unless there are fewer blocks than places, 64
      // rows.
      const int64_t strips = ceil_divide(t->size[2], 64);
      if (t->size[0] * ceil_divide(t->size[1], kWarp) * t->size[3] * strips > kMaxTiles)
        return "more than 2^29 tiles";
    }
    if (p.batch() * (p.output.size[2] + p.kernel().h) > kMaxLines) return "more than 2^30 rows";
    if (std::max(p.padding.h, p.padding.w) > kMaxSide) return "padding of more than 2^29";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted on an H200: shares of the peaks, and what a call takes whose tensors are small, which
    // grows with the kernel: weights are loaded, code is, and the first rows store nothing.
    struct Fit {
      double bandwidth, flops, seconds, seconds_per_tap;
    };
    constexpr Fit kSmallPatches{0.84, 0.2, 3.9e-6, 0.06e-6}, kLargePatches{0.84, 0.5, 6.5e-6, 0},
        kVectorPixels{0.73, 0.5, 7.8e-6, 0}, kWarpPixels{0.72, 0.5, 5e-6, 0.1e-6},
        kBlockPixels{0.65, 0.45, 5e-6, 0.2e-6}, kWeights{0.65, 0.36, 6e-6, 0.1e-6};
    const auto memory = [&](const Fit& fit) {
      return p.bytes() / (device.bandwidth * fit.bandwidth);
    };
    const auto arithmetic = [&](const Fit& fit) {
      return p.flops() / (device.fp32_flops * fit.flops);
    };
    const auto fixed = [&](const Fit& fit) {
      return fit.seconds + fit.seconds_per_tap * double(p.taps());
    };
    // Lanes past the last channel work for nothing.
    const auto lanes = [&](int64_t group) {
      return double(round_up(p.in_channels(), group)) / double(p.in_channels());
    };
    const bool weight = p.direction == Direction::kBackwardWeight, by_warps = p.stride.h == 1;
    switch (weight ? Patches::kNone : which_patches(p, device)) {
      case Patches::kSmall:  // one after the other
        return memory(kSmallPatches) + arithmetic(kSmallPatches) + fixed(kSmallPatches);
      case Patches::kLarge:
        return memory(kLargePatches) + fixed(kLargePatches);
      case Patches::kNone:
        break;
    }
    if (by_warps && !weight && p.taps() == 9)
      return memory(kVectorPixels) * lanes(lane_bytes(p) / element_size(p.dtype)) +
             fixed(kVectorPixels);
    // Nor do steps before the first result count.
    const Fit& fit = weight ? kWeights : by_warps ? kWarpPixels : kBlockPixels;
    const double steps = by_warps && !weight
                             ? steps_of_a_row(p, device)
                             : 1 + double((p.kernel().h - 1) / p.stride.h) /
                                       double(std::max<int64_t>(1, p.output.size[2]));
    return std::max(memory(fit), arithmetic(fit) * lanes(kWarp) * steps) + fixed(fit);
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    if (p.direction != Direction::kBackwardWeight) return {0, 0};
    return weight_workspace(p, device);
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    if (p.direction == Direction::kBackwardWeight)
      run_weight(p, operands, execution);
    else
      run_pixels(p, operands, execution);
  }
};

}  // namespace
}  // namespace depthwise_channels_last

std::unique_ptr<Algorithm> make_depthwise_channels_last() {
  return std::make_unique<depthwise_channels_last::DepthwiseChannelsLast>();
}

}  // namespace convops::cuda
